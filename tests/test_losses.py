"""Losses against numbers worked by hand, and the invariants that any policy-gradient loss must keep; all in float64."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cispo.algorithms import ALGORITHMS, Algorithm
from cispo.algorithms.choice import resolve
from cispo.algorithms.corrections import Correction
from cispo.algorithms.losses import (
    Cispo,
    ClippedSurrogate,
    Gspo,
    LossFn,
    LossOutput,
    NegativeLogLikelihood,
    PolicyGradient,
    kl_estimate,
    value_loss,
)
from cispo.algorithms.objective import Objective
from cispo.errors import UserError
from cispo.recipe.schema import Algorithm as AlgorithmSection
from cispo.types import LossInputs

INF = float("inf")


def inputs(new: list[float], old: list[float], advantages: list[float], mask: list[bool] | None = None) -> LossInputs:
    """Per-token probabilities as loss inputs; logprobs carry a gradient."""
    logprobs = torch.tensor(new, dtype=torch.float64).log().requires_grad_()
    before = torch.tensor(old, dtype=torch.float64).log()
    return LossInputs(
        logprobs=logprobs,
        anchor_logprobs=before,
        rollout_logprobs=before,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        mask=torch.ones(len(new), dtype=torch.bool) if mask is None else torch.tensor(mask),
        cu_seqlens=torch.tensor([0, len(new)], dtype=torch.int32),
    )


def gradient(loss: LossFn, x: LossInputs, weights: Tensor | float = 1.0) -> Tensor:
    """d(sum of weighted loss) / d logprobs."""
    value = (loss(x).loss * weights).sum()
    (grad,) = torch.autograd.grad(value, x.logprobs)
    assert bool(grad.isfinite().all())
    return grad


# One token, p .01 -> .12, A = +1: a rare word that the first update made twelve times as likely.
@pytest.mark.parametrize(
    ("cap", "expected_gradient", "expected_loss"),
    [(5, -5, 10.6013177), (1.28, -1.28, 2.7139373), (4, -4, 8.4810541), (6, -6, 12.7215816), (INF, -12, 25.4431624)],
)
def test_cispo_single_token(cap: float, expected_gradient: float, expected_loss: float):
    x = inputs([0.12], [0.01], [1.0])
    assert gradient(Cispo(ratio_max=cap), x).item() == pytest.approx(expected_gradient, rel=1e-12)
    assert Cispo(ratio_max=cap)(x).loss.item() == pytest.approx(expected_loss, abs=5e-7)


@pytest.mark.parametrize(("high", "loss"), [(0.2, -1.2), (0.28, -1.28)])
def test_clipped_surrogate_drops_the_single_token(high: float, loss: float):
    x = inputs([0.12], [0.01], [1.0])
    assert gradient(ClippedSurrogate(clip_low=0.2, clip_high=high), x).item() == 0
    output = ClippedSurrogate(clip_low=0.2, clip_high=high)(x)
    assert output.loss.item() == pytest.approx(loss, rel=1e-12)
    assert output.weight.item() == 0


def test_negative_advantage_single_token():
    x = inputs([0.12], [0.01], [-1.0])
    assert gradient(Cispo(ratio_max=5), x).item() == pytest.approx(5)
    assert gradient(ClippedSurrogate(clip_low=0.2, clip_high=0.2), x).item() == pytest.approx(12)


def test_token_mask_of_equation_7():
    x = inputs([0.12], [0.01], [1.0])
    output = Cispo(ratio_max=5, mask_high=1.28)(x)
    assert output.loss.item() == 0 and gradient(Cispo(ratio_max=5, mask_high=1.28), x).item() == 0
    # The other side of the mask: a token that became less likely is dropped only where its advantage is negative.
    fell = inputs([0.1, 0.1], [0.2, 0.2], [1.0, -1.0])
    assert gradient(Cispo(ratio_max=5, mask_low=0.8), fell).tolist() == pytest.approx([-0.5, 0])


# One prompt, two completions of 2 and 3 tokens, A = [+1, -1]; ratios [12, 1.2], [.5, .5, 1].
BATCH = inputs([0.12, 0.6, 0.1, 0.25, 0.9], [0.01, 0.5, 0.2, 0.5, 0.9], [1, 1, -1, -1, -1])
SEQUENCE_MEAN = torch.tensor([0.25, 0.25, 1 / 6, 1 / 6, 1 / 6], dtype=torch.float64)


@pytest.mark.parametrize(
    ("low", "high", "total", "token_mean", "sequence_mean", "grads"),
    [
        (0, 5, 9.264508, 1.852902, 2.478610, [-1.0, -0.24, 0.1, 0.1, 0.2]),
        (0, 1.2, 1.207507, 0.241501, 0.464360, [-0.24, -0.24, 0.1, 0.1, 0.2]),
        (0.8, 1.2, 0.100843, 0.020169, 0.279916, [-0.24, -0.24, 0.16, 0.16, 0.2]),
        (0, INF, 24.106353, 4.821271, 6.189072, [-2.4, -0.24, 0.1, 0.1, 0.2]),
    ],
)
def test_two_sequence_batch(
    low: float, high: float, total: float, token_mean: float, sequence_mean: float, grads: list
):
    loss = Cispo(ratio_min=low, ratio_max=high)(BATCH).loss
    assert loss.sum().item() == pytest.approx(total, abs=5e-7)
    assert loss.mean().item() == pytest.approx(token_mean, abs=5e-7)
    assert (loss * SEQUENCE_MEAN).sum().item() == pytest.approx(sequence_mean, abs=5e-7)
    assert gradient(Cispo(ratio_min=low, ratio_max=high), BATCH, 0.2).tolist() == pytest.approx(grads, abs=1e-12)


def test_clipped_surrogate_on_the_batch():
    # 1.19 instead of 1.2: the bound itself is a kink, where rounding decides.
    x = inputs([0.12, 0.595, 0.1, 0.25, 0.9], [0.01, 0.5, 0.2, 0.5, 0.9], [1, 1, -1, -1, -1])
    got = gradient(ClippedSurrogate(clip_low=0.2, clip_high=0.2), x, 0.2)
    assert got.tolist() == pytest.approx([0, -0.238, 0, 0, 0.2], abs=1e-12)


def test_mismatch_anchors():
    """mu .008, old .01, new .12: the old anchor gives ratio 12, the rollout anchor 15; both are capped at 5."""
    assert Cispo(ratio_max=INF)(inputs([0.12], [0.01], [1.0])).ratio.item() == pytest.approx(12)
    rollout = Cispo(ratio_max=5)(inputs([0.12], [0.008], [1.0]))
    assert rollout.ratio.item() == pytest.approx(15) and rollout.weight.item() == 5


probabilities = st.floats(0.001, 0.999)
# In thousandths: the product of a subnormal advantage and a weight would be 0, which says nothing about the loss.
advantages = st.integers(-3000, 3000).map(lambda thousandths: thousandths / 1000)
batches = st.lists(st.tuples(probabilities, probabilities, advantages), min_size=1, max_size=20)


def from_rows(rows: list[tuple[float, float, float]]) -> LossInputs:
    return inputs([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])


@settings(max_examples=200, deadline=None)
@given(batches, st.floats(1, 10))
def test_cispo_gradient_is_the_capped_weight_times_the_advantage(rows: list, cap: float):
    x = from_rows(rows)
    ratio = (x.logprobs - x.anchor_logprobs).exp().detach()
    expected = -ratio.clamp(max=cap) * x.advantages
    got = gradient(Cispo(ratio_max=cap), x)
    assert torch.allclose(got, expected, rtol=1e-12, atol=0)
    assert bool(((got == 0) == (x.advantages == 0)).all()), "no token with an advantage may lose its gradient"


@settings(max_examples=200, deadline=None)
@given(batches)
def test_on_policy_all_losses_have_the_same_gradient(rows: list):
    x = from_rows([(new, new, advantage) for new, _, advantage in rows])
    plain = -x.advantages
    for got in (
        gradient(Cispo(ratio_max=1.0), x),
        gradient(Cispo(ratio_max=5.0), x),
        gradient(ClippedSurrogate(clip_low=0.2, clip_high=0.2), x),
        gradient(ClippedSurrogate(clip_low=0.2, clip_high=0.28, dual_clip=3.0), x),
        gradient(Gspo(clip_low=3e-4, clip_high=4e-4), x),
        gradient(PolicyGradient(), x),
    ):
        assert torch.allclose(got, plain, rtol=1e-12, atol=0)


@settings(max_examples=300, deadline=None)
@given(batches)
def test_unified_form_is_ppo(rows: list):
    """Eq. 6-7 with the weight clip off and PPO's epsilons in the mask is PPO's gradient, token by token."""
    x = from_rows(rows)
    ratio = (x.logprobs - x.anchor_logprobs).exp()
    if bool((((ratio - 1.2).abs() < 1e-9) | ((ratio - 0.8).abs() < 1e-9)).any()):
        return
    unified = gradient(Cispo(ratio_max=INF, mask_low=0.8, mask_high=1.2), x)
    ppo = gradient(ClippedSurrogate(clip_low=0.2, clip_high=0.2), x)
    assert torch.allclose(unified, ppo, rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(batches, st.floats(0.1, 10))
def test_gradient_scales_with_the_advantages(rows: list, factor: float):
    x = from_rows(rows)
    scaled = replace(x, advantages=x.advantages * factor)
    assert torch.allclose(gradient(Cispo(ratio_max=5), scaled), gradient(Cispo(ratio_max=5), x) * factor, rtol=1e-12)


def test_cispo_gradient_matches_finite_differences_of_the_frozen_weight_loss():
    x = BATCH
    weight = Cispo(ratio_max=5)(x).weight
    step = 1e-6
    for t in range(5):
        moved = [x.logprobs.detach().clone() for _ in range(2)]
        moved[0][t] -= step
        moved[1][t] += step
        low, high = ((-weight * x.advantages * lp).sum().item() for lp in moved)
        assert gradient(Cispo(ratio_max=5), x)[t].item() == pytest.approx((high - low) / (2 * step), rel=1e-8)


@pytest.mark.parametrize(
    "loss", [Cispo(ratio_max=5.0), ClippedSurrogate(clip_low=0.2, clip_high=0.2), NegativeLogLikelihood()]
)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_values_do_not_leak(loss: LossFn, poison: float):
    clean = inputs([0.12, 0.6, 0.3], [0.01, 0.5, 0.3], [1.0, -1.0, 1.0])
    kept = gradient(loss, clean)
    logprobs = torch.cat([clean.logprobs.detach(), torch.tensor([poison, poison])]).requires_grad_()
    bad = torch.full((2,), poison, dtype=torch.float64)
    poisoned = LossInputs(
        logprobs=logprobs,
        anchor_logprobs=torch.cat([clean.anchor_logprobs, bad]),
        rollout_logprobs=torch.cat([clean.rollout_logprobs, bad]),
        advantages=torch.cat([clean.advantages, bad]),
        mask=torch.tensor([True, True, True, False, False]),
        cu_seqlens=torch.tensor([0, 5], dtype=torch.int32),
    )
    output = loss(poisoned)
    assert output.loss[3:].tolist() == [0, 0] and output.weight[3:].tolist() == [0, 0]
    assert torch.equal(gradient(loss, poisoned), torch.cat([kept, torch.zeros(2, dtype=torch.float64)]))


def test_extreme_ratios_stay_finite_and_keep_their_gradient():
    x = inputs([1.0, 1e-300], [1e-300, 1.0], [1.0, -1.0])
    got = gradient(Cispo(ratio_max=5), x)
    assert got[0].item() == -5 and 0 < got[1].item() < 1e-8


def test_each_loss_has_a_gradient_of_its_own_on_the_batch():
    grads = [
        gradient(Cispo(ratio_max=5), BATCH),
        gradient(Cispo(ratio_max=1.2, ratio_min=0.8), BATCH),
        gradient(ClippedSurrogate(clip_low=0.2, clip_high=0.2), BATCH),
        gradient(NegativeLogLikelihood(), BATCH),
    ]
    assert all(not torch.allclose(a, b) for i, a in enumerate(grads) for b in grads[:i])


@settings(max_examples=100, deadline=None)
@given(batches, st.floats(1, 10), st.floats(1, 10))
def test_cispo_between_its_limits(rows: list, cap: float, other: float):
    """Cap inf is importance-weighted REINFORCE, [1, 1] the plain one; gradients grow with the cap, up to the ratio."""
    x = from_rows(rows)
    ratio = (x.logprobs - x.anchor_logprobs).exp().detach()
    unlimited = gradient(Cispo(ratio_max=INF), x)
    assert torch.allclose(unlimited, -ratio * x.advantages, rtol=1e-12)
    assert torch.equal(gradient(Cispo(ratio_max=1.0, ratio_min=1.0), x), gradient(PolicyGradient(), x))
    low, high = (gradient(Cispo(ratio_max=c), x).abs() for c in sorted((cap, other)))
    assert bool((low <= high).all()) and bool((high <= unlimited.abs()).all())
    if float(ratio.max()) <= cap:
        assert torch.equal(gradient(Cispo(ratio_max=cap), x), unlimited)


ALL = [pytest.param(resolve(a, AlgorithmSection()), id=name) for name, a in ALGORITHMS.items()]
CORRECTED = [
    pytest.param(
        resolve(ALGORITHMS["grpo"], AlgorithmSection(correction=kind, correction_low=0.2, correction_high=3.0)),
        id=f"grpo {kind}",
    )
    for kind in ("tis", "icepop", "sequence_mask")
]


def full_inputs(rows: list[tuple[float, float, float]]) -> LossInputs:
    x = from_rows(rows)
    old = x.anchor_logprobs
    return replace(x, old_logprobs=old, rollout_logprobs=old - 0.1, ref_logprobs=old + 0.2)


@pytest.mark.parametrize("algorithm", [*ALL, *CORRECTED])
def test_only_logprobs_have_a_gradient(algorithm: Algorithm):
    """Ratios' anchors, references, advantages: constants, with or without a graph of their own."""
    x = full_inputs([(0.12, 0.01, 1.0), (0.6, 0.5, -1.0), (0.1, 0.2, 0.5)])
    constants = ("anchor_logprobs", "rollout_logprobs", "advantages", "old_logprobs", "ref_logprobs")
    leaves = {name: getattr(x, name).clone().requires_grad_() for name in constants}
    attached = replace(x, **leaves)
    detached = torch.autograd.grad(algorithm.objective(x).loss.sum(), x.logprobs)[0]
    loss = algorithm.objective(attached).loss.sum()
    # Advantages multiply and anchors divide as numbers: the learner gives them without a graph, and the gradient of the
    # policy is the same for inputs with a graph.
    assert torch.equal(torch.autograd.grad(loss, attached.logprobs)[0], detached)


@pytest.mark.parametrize("algorithm", [*ALL, *CORRECTED])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_values_do_not_leak_from_any_algorithm(algorithm: Algorithm, poison: float):
    rows = [(0.12, 0.1, 1.0), (0.6, 0.5, -1.0), (0.3, 0.3, 1.0)]
    clean = full_inputs(rows)
    kept = torch.autograd.grad(algorithm.objective(clean).loss.sum(), clean.logprobs)[0]
    bad = torch.full((2,), poison, dtype=torch.float64)
    names = ("logprobs", "anchor_logprobs", "rollout_logprobs", "advantages", "old_logprobs", "ref_logprobs")
    poisoned = replace(
        clean,
        **{name: torch.cat([getattr(clean, name).detach(), bad]) for name in names},
        mask=torch.tensor([True, True, True, False, False]),
        cu_seqlens=torch.tensor([0, 5], dtype=torch.int32),
    )
    poisoned.logprobs.requires_grad_()
    output = algorithm.objective(poisoned)
    grad = torch.autograd.grad(output.loss.sum(), poisoned.logprobs)[0]
    assert output.loss[3:].tolist() == [0, 0] and torch.equal(grad, torch.cat([kept, torch.zeros(2).double()]))
    assert all(bool(values.isfinite().all()) for values in (output.ratio, output.weight, *output.extra.values()))


@settings(max_examples=100, deadline=None)
@given(batches, st.floats(0.5, 3))
def test_dual_clip_bounds_the_surrogate_of_negative_advantages(rows: list, extra: float):
    dual = 1.2 + extra
    x = from_rows(rows)
    ratio = (x.logprobs - x.anchor_logprobs).exp().detach()
    if bool(((ratio - dual).abs() < 1e-9).any()):
        return
    plain = gradient(ClippedSurrogate(clip_low=0.2, clip_high=0.2), x)
    dual_gradient = gradient(ClippedSurrogate(clip_low=0.2, clip_high=0.2, dual_clip=dual), x)
    cut = (x.advantages < 0) & (ratio > dual)
    assert bool((dual_gradient[cut] == 0).all()) and torch.equal(dual_gradient[~cut], plain[~cut])
    output = ClippedSurrogate(clip_low=0.2, clip_high=0.2, dual_clip=dual)(x)
    assert bool((output.weight[cut] == 0).all())


def test_the_log_ratio_clamp_protects_only_what_overflows():
    """Within e^20 nothing changes; beyond, the weight is e^20 and the gradient finite."""
    near = inputs([1.0], [math.exp(-19.9)], [1.0])
    assert gradient(Cispo(ratio_max=INF), near).item() == pytest.approx(-math.exp(19.9), rel=1e-9)
    far = inputs([1.0], [math.exp(-40)], [1.0])
    assert gradient(Cispo(ratio_max=INF), far).item() == pytest.approx(-math.exp(20), rel=1e-9)


def test_kl_estimators():
    """k1 = lp - ref, k2 = its half square, k3 never negative; all 0 where policy and reference agree."""
    new, ref = torch.tensor([0.5, 0.2]).double().log(), torch.tensor([0.25, 0.4]).double().log()
    mask = torch.ones(2).bool()
    log2 = math.log(2)
    assert kl_estimate(new, ref, mask, "k1").tolist() == pytest.approx([log2, -log2])
    assert kl_estimate(new, ref, mask, "k2").tolist() == pytest.approx([log2**2 / 2] * 2)
    assert kl_estimate(new, ref, mask, "k3").tolist() == pytest.approx([0.5 - 1 + log2, 2 - 1 - log2])
    for estimator in ("k1", "k2", "k3"):
        assert kl_estimate(new, new, mask, estimator).tolist() == [0, 0]


def test_a_correction_scales_the_policy_loss_and_not_the_kl():
    x = full_inputs([(0.12, 0.1, 1.0), (0.6, 0.5, -1.0)])
    grpo = resolve(ALGORITHMS["grpo"], AlgorithmSection(kl_coef=0.3))
    dropped = replace(grpo, correction=Correction(kind="icepop", low=5.0, high=6.0))
    only_kl = dropped.objective(x).loss
    assert only_kl.tolist() == pytest.approx((0.3 * kl_estimate(x.logprobs, x.ref_logprobs, x.mask, "k3")).tolist())  # type: ignore[arg-type]
    assert dropped.objective(x).weight.tolist() == [0, 0]


def test_value_loss_by_hand():
    """Old value 1, return 2, clip .2: at 1.1 the plain error counts, at 1.5 the clipped one, which has no gradient."""
    values = torch.tensor([1.1, 1.5, 0.5], dtype=torch.float64, requires_grad=True)
    old, returns = torch.ones(3).double(), torch.full((3,), 2.0).double()
    losses = value_loss(values, old, returns, torch.tensor([True, True, True]), clip=0.2)
    assert losses.tolist() == pytest.approx([0.5 * 0.81, 0.5 * 0.64, 0.5 * 2.25])
    assert torch.autograd.grad(losses.sum(), values)[0].tolist() == pytest.approx([-0.9, 0, -1.5])


@pytest.mark.parametrize(
    "wrong", [lambda x: x.logprobs.mean(), lambda x: PolicyGradient()(x)._replace(loss=x.logprobs[0])]
)
def test_a_loss_that_is_not_per_token_is_refused(wrong: LossFn):
    with pytest.raises(UserError, match="one loss a token"):
        Objective(loss=wrong)(BATCH)


@dataclass(frozen=True)
class Scaled:
    """A loss with a setting, without the base class."""

    ratio_max: float = 2.0
    per_token: ClassVar[bool] = True

    def __call__(self, x: LossInputs) -> LossOutput:
        return Cispo(ratio_max=self.ratio_max)(x)


def plain(x: LossInputs) -> LossOutput:
    return PolicyGradient()(x)


def test_a_loss_of_ones_own():
    """A function has no settings; a dataclass has its fields, which a recipe changes; both cross processes."""
    scaled, function = (Algorithm(name="own", loss=loss) for loss in (Scaled(), plain))
    changed = resolve(scaled, AlgorithmSection(ratio_max=3.0))
    assert changed.loss == Scaled(ratio_max=3.0) and changed.objective.per_token and not function.objective.per_token
    with pytest.raises(UserError, match="ratio_max means nothing to own, whose settings are: none"):
        resolve(function, AlgorithmSection(ratio_max=3.0))
    for objective in (changed.objective, function.objective, resolve(ALGORITHMS["dapo"], AlgorithmSection()).objective):
        again = pickle.loads(pickle.dumps(objective))
        assert again == objective and torch.equal(again(BATCH).loss, objective(BATCH).loss)
