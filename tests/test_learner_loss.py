"""The loss in the LM head's own pass equals the loss over whole sequences, in every number that the learner returns."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from cispo.algorithms import ALGORITHMS
from cispo.algorithms.corrections import Correction
from cispo.algorithms.losses import (
    Cispo,
    ClippedSurrogate,
    LossOutput,
    NegativeLogLikelihood,
    PolicyGradient,
    sequence_means,
)
from cispo.algorithms.objective import Objective
from cispo.algorithms.presets import PRESETS
from cispo.batch.packing import pack
from cispo.learner.learner import Learner
from cispo.policies.loading import init_policy, save_policy
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import LossInputs, MicroBatch, Sample, TokenStats
from tests.test_learner import DENSE, TINY, samples

Dtype = Literal["float32", "float64"]

PPO = ClippedSurrogate(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
OBJECTIVES = {
    "cispo": Objective(loss=Cispo(ratio_max=1.5)),
    "masked, kl": Objective(loss=Cispo(ratio_max=1.5, mask_low=0.8, mask_high=1.28), kl="k2", kl_coef=0.3),
    "ppo, tis, kl": Objective(
        loss=PPO, ratio_anchor="old", kl_coef=0.3, correction=Correction(kind="tis", low=0.0, high=1.2)
    ),
    "icepop": Objective(loss=PPO, ratio_anchor="old", correction=Correction(kind="icepop", low=0.5, high=2.0)),
    "policy gradient": Objective(loss=PolicyGradient()),
    "sft": Objective(loss=NegativeLogLikelihood()),
}


@pytest.fixture(scope="module", params=[TINY, {"model_type": "qwen3", **DENSE}], ids=["lightning", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("policy")
    save_policy(init_policy(request.param, seed=0), made)
    return made


def given() -> list[Sample]:
    """Ragged samples with everything attached, NaN where it must not matter; the last has no trained token."""
    generator = torch.Generator().manual_seed(5)

    def near(sample: Sample) -> Tensor:
        moved = sample.rollout_logprobs + 0.3 * torch.randn(len(sample.token_ids), generator=generator)
        return torch.where(sample.loss_mask, moved, torch.nan)

    made = [replace(s, old_logprobs=near(s), ref_logprobs=near(s)) for s in samples()]
    return [*made[:-1], replace(made[-1], loss_mask=torch.zeros_like(made[-1].loss_mask))]


def undeclared(objective: Objective) -> Objective:
    """The same objective with a loss that says nothing of itself."""

    def loss(x: LossInputs) -> LossOutput:
        return objective.loss(x)

    return replace(objective, loss=loss)


def by_name(tokens: TokenStats) -> dict[str, Tensor]:
    """Every tensor of the record; those of `extra` under their own names."""
    values = {f.name: getattr(tokens, f.name) for f in fields(TokenStats) if f.name != "extra"}
    return {name: value for name, value in values.items() if value is not None} | dict(tokens.extra)


def results(folder: Path, objective: Objective, dtype: Dtype, mbs: list[MicroBatch]) -> dict[str, Tensor]:
    # A test's float64, which no recipe may ask for.
    learner = Learner(str(folder), LearnerConfig(), dtype=dtype, temperature=1.3)  # type: ignore[arg-type]
    batch = learner.forward_backward(mbs, objective)
    assert batch.tokens is not None
    gradients = torch.cat([g.flatten() for g in learner.rank.optimizer.gradients()])
    return {"gradients": gradients, "loss": torch.tensor(batch.loss, dtype=torch.float64), **by_name(batch.tokens)}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_both_paths_agree(folder: Path, name: str, dtype: Dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cispo.ops.logprobs._CHUNK_ELEMENTS", 7 * 40)
    objective = OBJECTIVES[name]
    assert objective.per_token and not undeclared(objective).per_token
    (mbs,) = pack(given(), reduction="prompt", max_tokens=16, tokens_per_micro_batch=60)
    assert len(mbs) > 2 and max(len(mb.loss_index) for mb in mbs) > 3 * 7
    fused, whole = (results(folder, o, dtype, mbs) for o in (objective, undeclared(objective)))
    assert fused.keys() == whole.keys() and "old_logprobs" in fused
    assert ("kl/reference" in fused) == (objective.kl_coef > 0)
    assert ("correction/factor" in fused) == (objective.correction is not None)
    assert float(whole["gradients"].abs().max()) > 1e-3 and float(whole["loss"].abs()) > 1e-3
    for key, expected in whole.items():
        assert fused[key].dtype == expected.dtype and bool(expected.isfinite().all()), key
        assert float((fused[key] - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max())), key


def test_a_micro_batch_without_trained_tokens(folder: Path):
    """Alone it has a loss of 0 and empty tensors; first in a batch it takes none from the others."""
    nothing = replace(given()[-1], group_id=99)
    (empty,) = pack([nothing], reduction="token", max_tokens=16, tokens_per_micro_batch=60)
    (others,) = pack(given(), reduction="token", max_tokens=16, tokens_per_micro_batch=60)
    objective = OBJECTIVES["ppo, tis, kl"]
    alone = results(folder, objective, "float32", empty)
    assert float(alone["loss"]) == 0 and not alone["gradients"].any() and not len(alone["correction/factor"])
    both, expected = (results(folder, objective, "float32", mbs) for mbs in ([*empty, *others], others))
    assert both.keys() == expected.keys() and all(torch.equal(both[key], expected[key]) for key in expected)


def test_which_objectives_are_per_token():
    whole = {name for name, a in {**ALGORITHMS, **PRESETS}.items() if not a.objective.per_token}
    assert whole == {"gspo"}
    masked = Correction(kind="sequence_mask", low=0.9, high=1.1)
    assert not replace(OBJECTIVES["icepop"], correction=masked).per_token


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_declared_per_token_is(name: str):
    """Any part of the tokens, in any order and without sequences, has the same losses."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    mask = torch.rand(30, generator=generator) < 0.8
    some = torch.randperm(30, generator=generator)[:17]

    def output(pick: Tensor, cu_seqlens: Tensor) -> LossOutput:
        logprobs, anchor, rollout, advantages, reference = values[:, pick]
        return OBJECTIVES[name](
            LossInputs(
                logprobs=logprobs,
                anchor_logprobs=anchor,
                rollout_logprobs=rollout,
                advantages=advantages,
                mask=mask[pick],
                cu_seqlens=cu_seqlens,
                old_logprobs=anchor,
                ref_logprobs=reference,
            )
        )

    starts = torch.tensor([0, 11, 30], dtype=torch.int32)
    every, part = output(torch.arange(30), starts), output(some, starts[:0])
    assert torch.equal(every.loss[some], part.loss) and torch.equal(every.weight[some], part.weight)
    assert all(torch.equal(values[some], part.extra[key]) for key, values in every.extra.items())


def test_a_loss_that_declares_too_much_fails(folder: Path):
    """It reads sequences and is given none: better than a mean over the wrong tokens."""

    class Centred:
        per_token = True

        def __call__(self, x: LossInputs) -> LossOutput:
            ratio = torch.ones_like(x.logprobs).detach()
            return LossOutput(-x.logprobs * sequence_means(x.advantages, x.mask, x.cu_seqlens), ratio, ratio)

    (mbs,) = pack(samples(), reduction="token", max_tokens=16, tokens_per_micro_batch=60)
    with pytest.raises(AssertionError, match="declared per_token"):
        Learner(str(folder), LearnerConfig()).forward_backward(mbs, Objective(loss=Centred()))
