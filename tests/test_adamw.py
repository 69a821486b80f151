"""AdamW without torch's optimizer class: its numbers to the last bit, and a rank that starts without the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from cispo.learner.adamw import FusedAdamW, Group
from cispo.policies.loading import init_policy, save_policy
from tests.test_vllm_parity import lightning

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_the_numbers_are_those_of_torchs_own(device: str) -> None:
    """Two decays, two number formats, gradients that are missing in some steps, a learning rate that moves."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (33, 64), (64,), (3, 4, 8)]
    formats = [torch.float32, torch.float32, torch.float32, torch.float64]
    values = [torch.randn(s, generator=generator, dtype=d) for s, d in zip(shapes, formats, strict=True)]
    ours, theirs = ([Parameter(v.clone().to(device)) for v in values] for _ in range(2))
    options = {"betas": (0.9, 0.95), "eps": 1e-15}
    own = FusedAdamW([Group(ours[:2], 0.1), Group(ours[2:], 0.0)], betas=(0.9, 0.95), eps=1e-15)
    groups = [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, lr=0.0, fused=True, **options)  # type: ignore[arg-type]
    for step in range(6):
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(mine.shape, generator=generator, dtype=mine.dtype).to(device)
            missing = (step + number) % 3 == 0
            mine.grad, other.grad = (None, None) if missing else (gradient, gradient.clone())
        for group in torchs.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        own.step(1e-2 / (step + 1))
        torchs.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
            found, expected = own.state.get(mine, {}), torchs.state.get(other, {})
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)
    assert sum(float((mine.detach().cpu() - start).abs().sum()) for mine, start in zip(ours, values, strict=True)) > 1
    own.zero_grad()
    assert all(parameter.grad is None for parameter in ours)


RANK = """
import sys
from cispo.batch.packing import pack
from cispo.batch.samples import demonstration
from cispo.learner.learner import Learner, prepare
from cispo.policies.loading import config_of
from cispo.recipe.schema import Learner as Config
from cispo.warmup import _SFT

prepare(False, None, dict(config_of(sys.argv[1])))
learner = Learner(sys.argv[1], Config())
samples = [demonstration([3, 4], [5, 6], row) for row in range(4)]
(batch,) = pack(samples, reduction="token", max_tokens=4, tokens_per_micro_batch=64)
taken = learner.update(batch, _SFT, lr=1e-3).taken
print(taken, *(name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules))
"""


def test_a_rank_makes_its_first_step_without_the_compiler(tmp_path: Path) -> None:
    """Of the families that are not transformers' own: torch's compiler and sympy are two seconds of a start."""
    save_policy(init_policy(lightning(), seed=0), tmp_path)
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["True"]
