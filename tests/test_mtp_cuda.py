"""Heads of multi-token prediction in a learner on a GPU, against the same learner on a CPU in float32."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cispo.batch.packing import pack
from cispo.learner.heads import Predictions
from cispo.learner.learner import Learner
from cispo.policies.loading import save_policy
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch
from tests.shard_group import TOKEN
from tests.test_learner_cuda import Dtype, error, no_waiting
from tests.test_learner_cuda import samples as long_samples
from tests.test_mtp import FAMILIES, config_of, drawn, packed, samples

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    save_policy(drawn({**config_of(request.param), "vocab_size": 320}), made)
    return made


def gradient(folder: Path, dtype: Dtype, device: str, mbs: list[MicroBatch]) -> tuple[Predictions, Tensor]:
    """Predictions, and the heads' gradient as one vector."""
    learner = Learner(str(folder), LearnerConfig(), heads=True, dtype=dtype, device=device)
    found = learner.forward_backward(mbs, TOKEN).predictions
    assert found is not None and learner.rank.heads is not None
    return found, torch.cat([g.float().flatten().cpu() for g in learner.rank.heads.gradients()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_trains_heads_as_a_cpu_does(folder: Path, dtype: Dtype) -> None:
    """Bounds of `test_learner_cuda`: 1e-4 of the gradient's norm in float32; in bfloat16 0.1, since experts that
    rounding exchanges enter whole."""
    mbs = packed(samples())
    expected, whole = gradient(folder, "float32", "cpu", mbs)
    found, own = gradient(folder, dtype, GPU, mbs)
    exact = dtype == "float32"
    assert found.count == expected.count
    assert found.loss == pytest.approx(expected.loss, rel=1e-4 if exact else 0.02)
    assert error(own, whole) <= (1e-4 if exact else 0.1)


def test_heads_learn_and_the_policy_stays_what_it_is_without(folder: Path) -> None:
    """To the bit, where two learners without heads agree so on this card."""
    mbs, runs = packed(samples()), []
    for heads in (False, False, True):
        learner = Learner(str(folder), LearnerConfig(), heads=heads, dtype="bfloat16", device=GPU)
        results = [learner.update(mbs, TOKEN, lr=1e-3) for _ in range(4)]
        runs.append({name: weight.clone() for name, weight in learner.policy.named_weights().items()})
    losses = [found.loss for r in results if (found := r.batch.predictions)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    if all(torch.equal(weight, runs[1][name]) for name, weight in runs[0].items()):
        assert all(torch.equal(weight, runs[2][name]) for name, weight in runs[0].items())


def test_a_micro_batch_with_heads_is_queued_without_waiting(folder: Path) -> None:
    learner = Learner(str(folder), LearnerConfig(), heads=True, dtype="bfloat16", device=GPU)
    (mbs,) = pack(long_samples(500, 40), reduction="token", max_tokens=500, tokens_per_micro_batch=16384)
    batches = learner.rank.to_device(mbs[:1])
    for attempt in range(2):
        # The first one compiles kernels.
        torch.cuda.synchronize()
        with no_waiting() if attempt else nullcontext():
            learner.rank._backward(batches[0], lambda mb: learner._loss(mb, TOKEN, None))
