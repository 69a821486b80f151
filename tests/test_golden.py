"""Every algorithm against tests/golden/losses.json, which plain Python wrote without this package: float64, 1e-10."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cispo.algorithms import ALGORITHMS, Algorithm
from cispo.algorithms.advantages import ADVANTAGES, TokenRewards, generalised_advantages
from cispo.algorithms.choice import resolve
from cispo.algorithms.corrections import Correction, correction_factors
from cispo.algorithms.losses import (
    Cispo,
    ClippedSurrogate,
    Gspo,
    Loss,
    PolicyGradient,
    kl_estimate,
    value_loss,
)
from cispo.algorithms.objective import Objective
from cispo.batch.packing import reduction_weights
from cispo.recipe.schema import Algorithm as AlgorithmSection
from cispo.rollout.rollout import overlong_penalty
from cispo.types import LossInputs, Sample

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
TOLERANCE = 1e-10  # float64: sums of a few dozen numbers in another order

LOSSES: dict[str, type[Loss]] = {
    "cispo": Cispo,
    "clipped_surrogate": ClippedSurrogate,
    "gspo": Gspo,
    "policy_gradient": PolicyGradient,
}
# Forms that the file has for contrast, and that we do not train with.
FOREIGN = {"sapo", "clamped_ratio", "batch_norm"}


def entries(*, with_losses: bool) -> list[Any]:
    return [
        pytest.param(case, name, id=f"{case['name']}-{name}")
        for case in GOLDEN["cases"]
        for name, entry in case.get("expected", {}).items()
        if ("losses" in entry) == with_losses
        and not FOREIGN & {entry["algorithm"].get("loss"), entry["algorithm"]["advantage"]}
    ]


def flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


@cache
def values_of(case: str, name: str) -> Tensor | None:
    sequences = CASES[case]["sequences"]
    return flat([s[name] for s in sequences]) if name in sequences[0] else None


def close(got: Tensor, expected: list[list[float]]) -> None:
    wanted = flat(expected)
    assert got.shape == wanted.shape and bool(got.isfinite().all())
    assert float((got - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


def samples_of(case: dict) -> list[Sample]:
    return [
        Sample(
            token_ids=torch.zeros(len(s["mask"]), dtype=torch.int64),
            loss_mask=torch.tensor(s["mask"]).bool(),
            rollout_logprobs=torch.zeros(len(s["mask"])),
            versions=torch.zeros(len(s["mask"]), dtype=torch.int32),
            group_id=s["group"],
            index=index,
        )
        for index, s in enumerate(case["sequences"])
    ]


def token_rewards(case: dict, entry: dict) -> list[list[TokenRewards]]:
    """[groups][completions], over unmasked tokens, with the KL stream where the algorithm has one."""
    spec, groups = entry["algorithm"], {}
    for s in case["sequences"]:
        mask = torch.tensor(s["mask"]).bool()
        streams = {name: torch.tensor(values, dtype=torch.float64)[mask] for name, values in s["rewards"].items()}
        if spec.get("kl_in") == "reward":
            policy, reference = (
                torch.tensor(s[k], dtype=torch.float64)[mask] for k in (f"{spec['anchor']}_logprobs", "ref_logprobs")
            )
            kl = kl_estimate(policy, reference, torch.ones_like(policy).bool(), spec["kl"])
            streams["kl"] = -spec["kl_coef"] * kl
        values = torch.tensor(s["values"], dtype=torch.float64)[mask] if "values" in s else None
        groups.setdefault(s["group"], []).append(TokenRewards(streams=streams, values=values))
    return list(groups.values())


def on_every_token(case: dict, per_trajectory: list[list[Tensor]]) -> Tensor:
    """[T]: values over unmasked tokens at their places, 0 where masked. Groups are stored one after another."""
    mask = values_of(case["name"], "mask")
    assert mask is not None
    return torch.zeros(len(mask), dtype=torch.float64).masked_scatter(
        mask.bool(), torch.cat([t for group in per_trajectory for t in group])
    )


def advantages(case: dict, entry: dict) -> Tensor:
    spec = entry["algorithm"]
    if spec["advantage"] == "given":
        return flat(case["advantages"])
    settings = dict(spec["advantage_settings"])
    if "whiten" in settings:
        settings["whitened"] = settings.pop("whiten")
    return on_every_token(case, type(ADVANTAGES[spec["advantage"]])(**settings)(token_rewards(case, entry)))


@pytest.mark.parametrize(("case", "name"), [*entries(with_losses=True), *entries(with_losses=False)])
def test_advantages(case: dict, name: str):
    close(advantages(case, case["expected"][name]), case["expected"][name]["advantages"])


@pytest.mark.parametrize(("case", "name"), entries(with_losses=True))
def test_losses_weights_and_gradients(case: dict, name: str):
    entry = case["expected"][name]
    spec, where = entry["algorithm"], case["name"]
    settings = {"ratio_max": math.inf, "ratio_min": 0.0} if spec["loss"] == "cispo" else {}
    settings |= {k: v for k, v in spec["settings"].items() if v is not None}
    bounds = spec.get("correction_settings") or {}
    objective = Objective(
        loss=LOSSES[spec["loss"]](**settings),
        ratio_anchor=spec["anchor"] or "rollout",
        kl=spec["kl"] or "k3",
        kl_coef=spec["kl_coef"] if spec["kl_in"] == "loss" else 0.0,
        correction=Correction(kind=spec["correction"], low=bounds.get("min") or 0.0, high=bounds["max"])
        if spec["correction"]
        else None,
    )
    logprobs, mask = values_of(where, "logprobs"), values_of(where, "mask")
    anchor, rollout = values_of(where, f"{objective.ratio_anchor}_logprobs"), values_of(where, "rollout_logprobs")
    assert logprobs is not None and mask is not None and anchor is not None and rollout is not None
    x = LossInputs(
        logprobs=logprobs.clone().requires_grad_(),
        anchor_logprobs=anchor,
        rollout_logprobs=rollout,
        advantages=advantages(case, entry),
        mask=mask.bool(),
        cu_seqlens=torch.tensor([0, *(len(s["mask"]) for s in case["sequences"])]).cumsum(0).int(),
        old_logprobs=values_of(where, "old_logprobs"),
        ref_logprobs=values_of(where, "ref_logprobs"),
    )
    output = objective(x)
    close(output.loss.detach(), entry["losses"])
    per_sample = reduction_weights(samples_of(case), spec["reduction"], max_tokens=case["max_tokens"])
    weights = torch.cat(
        [torch.tensor(s["mask"], dtype=torch.float64) * w for s, w in zip(case["sequences"], per_sample, strict=True)]
    )
    close(weights, entry["loss_weights"])
    total = (output.loss * weights).sum()
    assert total.item() == pytest.approx(entry["total"], rel=TOLERANCE, abs=TOLERANCE)
    close(torch.autograd.grad(total, x.logprobs)[0], entry["gradients"])
    # The metrics' factor is the gradient's: weight * A is the gradient without the KL's part.
    if objective.kl_coef == 0:
        close(-output.weight * x.advantages * weights, entry["gradients"])
    if objective.correction:
        assert x.old_logprobs is not None
        factors = correction_factors(objective.correction, x.old_logprobs, rollout, x.mask, x.cu_seqlens)
        close(factors * x.mask, [[c * m for c, m in zip(*rows, strict=True)] for rows in _correction_rows(case, entry)])


def _correction_rows(case: dict, entry: dict) -> list[tuple[list[float], list[int]]]:
    return [(c, s["mask"]) for c, s in zip(entry["correction_weights"], case["sequences"], strict=True)]


@pytest.mark.parametrize(
    ("case", "name"), [p for p in entries(with_losses=True) if "value_losses" in p.values[0]["expected"][p.values[1]]]
)
def test_value_function(case: dict, name: str):
    entry, where = case["expected"][name], case["name"]
    settings = entry["algorithm"]["advantage_settings"]
    rewards = token_rewards(case, entry)
    gains = [[generalised_advantages(t, gamma=settings["gamma"], lam=settings["lam"]) for t in g] for g in rewards]
    returns = on_every_token(case, gains) + values_of(where, "values") * values_of(where, "mask")  # type: ignore[operator]
    close(returns, entry["returns"])
    new, old, mask = values_of(where, "new_values"), values_of(where, "values"), values_of(where, "mask")
    assert new is not None and old is not None and mask is not None
    values = new.clone().requires_grad_()
    losses = value_loss(values, old, returns, mask.bool(), clip=entry["algorithm"]["value_clip"])
    close(losses.detach(), entry["value_losses"])
    close(torch.autograd.grad(losses.sum() / mask.sum(), values)[0], entry["value_gradients"])


def test_overlong():
    case = CASES["overlong"]
    got = [overlong_penalty(n, max_tokens=case["max_length"], buffer=case["cache_length"]) for n in case["lengths"]]
    assert got == pytest.approx(case["rewards"], abs=1e-15)


def test_the_records_are_what_the_file_calls_by_their_names():
    """The file's settings of reinforce, ppo, grpo ... are those of ALGORITHMS: the vectors pin the records too."""
    specs = {name: entry["algorithm"] for name, entry in CASES["ragged"]["expected"].items()}
    assert specs.keys() >= ALGORITHMS.keys()
    for name, algorithm in ALGORITHMS.items():
        spec = specs[name]
        assert type(algorithm.loss) is LOSSES[spec["loss"]]
        assert spec["settings"] == asdict(algorithm.loss)  # type: ignore[arg-type]  # every loss here is a dataclass
        assert ADVANTAGES[spec["advantage"]] == algorithm.advantage and spec["reduction"] == algorithm.reduction
        assert spec["anchor"] in (algorithm.ratio_anchor, None) and spec["kl_coef"] == algorithm.kl_coef
        assert algorithm.kl_coef == 0 or (spec["kl"], spec["kl_in"]) == (algorithm.kl, algorithm.kl_in)
        assert algorithm.correction is None and spec["correction"] is None


def test_each_name_has_a_gradient_of_its_own():
    """On the ragged batch no two algorithms agree (guards against a name that is dispatched to another's loss)."""
    expected = CASES["ragged"]["expected"]
    grads = {name: flat(expected[name]["gradients"]) for name in ALGORITHMS}
    for name, grad in grads.items():
        for other, compared in grads.items():
            assert name == other or not torch.allclose(grad, compared, rtol=1e-6), f"{name} and {other} agree"


# Pairs that differ in nothing but the advantage; and eq. 7's mask with DAPO's band, which is DAPO wherever the cap of
# the weight is not reached.
SAME_LOSS = {frozenset(pair) for pair in (("cispo", "cispo_agent"), ("ppo", "reinforce_pp"), ("cispo_masked", "dapo"))}


def own_gradient(algorithm: Algorithm) -> Tensor:
    """The gradient on the two-sequence batch: lengths 2 and 3, advantages +1 and -1, ratios 12, 1.25, .5, .5, 1."""
    old = torch.tensor([0.01, 0.5, 0.2, 0.5, 0.9], dtype=torch.float64).log()
    x = LossInputs(
        logprobs=torch.tensor([0.12, 0.625, 0.1, 0.25, 0.9], dtype=torch.float64).log().requires_grad_(),
        anchor_logprobs=old,
        rollout_logprobs=old,
        advantages=torch.tensor([1.0, 1, -1, -1, -1], dtype=torch.float64),
        mask=torch.ones(5).bool(),
        cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32),
        old_logprobs=old,
        ref_logprobs=old - 0.3,
    )
    weights = reduction_weights(samples_of(CASES["two_sequences"]), algorithm.reduction, max_tokens=8)
    per_token = torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor([2, 3]))
    return torch.autograd.grad((algorithm.objective(x).loss * per_token).sum(), x.logprobs)[0]


def test_each_loss_differs_on_the_two_sequences():
    grads = {name: own_gradient(resolve(algorithm, AlgorithmSection())) for name, algorithm in ALGORITHMS.items()}
    for name in grads:
        for other in grads:
            agree = torch.allclose(grads[name], grads[other], rtol=1e-6)
            assert agree == (name == other or frozenset((name, other)) in SAME_LOSS), f"{name} and {other}"


def test_the_file_is_what_its_script_writes():
    """The script holds every gradient against a finite difference and the printed numbers of the papers as it runs."""
    script = Path(__file__).parents[1] / "scripts" / "make_golden_losses.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
