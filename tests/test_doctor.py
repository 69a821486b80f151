"""The doctor's table of causes: each planted fault is named first, and a healthy policy has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cispo.engines.torch_engine as torch_engine
import cispo.engines.torch_sampler as torch_sampler
import cispo.learner.loss as learner_loss
from cispo.commands.doctor import doctor
from cispo.commands.readings import golden_section
from cispo.errors import UserError
from cispo.policies.attention import Documents
from cispo.policies.cache import Cache
from cispo.policies.minimax.model import LightningPolicy

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
# Two layers of each kind; weights large enough for attention to be far from uniform.
SMALL = [
    "runtime=local",
    "rollout.engine=torch",
    "learner.ranks=1",
    "eval.limit=2",
    "rollout.max_tokens=24",
    "policy.config.hidden_size=64",
    "policy.config.intermediate_size=32",
    "policy.config.head_dim=16",
    "policy.config.initializer_range=0.3",
]


class RoundedStates(Cache):
    """A sampler's cache with recurrent states in bfloat16."""

    def read(self, *args: object) -> Tensor:
        return self._rounded(super().read(*args))  # type: ignore[arg-type]

    def step(self, *args: object) -> Tensor:
        return self._rounded(super().step(*args))  # type: ignore[arg-type]

    def _rounded(self, hidden: Tensor) -> Tensor:
        for layer in self.states:
            layer.copy_(layer.bfloat16())
        return hidden


class Leaky(Documents):
    """Packed documents whose states run on into the next document."""

    def recurrent(self, op, *inputs: Tensor) -> Tensor:
        return op.packed(*inputs, torch.tensor([0, self.tokens], dtype=torch.int32))[0]


class Crowded(Cache):
    """A sampler's cache in which rows disturb one another."""

    def step(self, *args: object) -> Tensor:
        hidden = super().step(*args)  # type: ignore[arg-type]
        return hidden + 0.01 * (hidden.mean(0) - hidden)


def crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sampler, "Cache", Crowded)


def bfloat16_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sampler, "Cache", RoundedStates)


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_loss, "Documents", Leaky)


def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine.TorchEngine, "receive_weights", lambda self, message: None)


def wrong_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    load = torch_engine.load_policy

    def turned(folder: str, dtype: torch.dtype) -> LightningPolicy:
        policy = load(folder, dtype=dtype)
        assert isinstance(policy, LightningPolicy)
        policy.config = replace(policy.config, rope_theta=300.0)
        return policy

    monkeypatch.setattr(torch_engine, "load_policy", turned)


@pytest.mark.parametrize(
    ("plant", "name", "said"),
    [
        (stale, "stale weights (engine)", "weights are not the learner's"),
        (bfloat16_states, "recurrent states in bfloat16 (engine)", "mamba_cache_dtype: float32"),
        (leak, "packed documents (learner)", "learner.tokens_per_micro_batch: 1"),
        (crowd, "batch size (engine)", "max_num_seqs"),
        (wrong_rope, "base of the rotary positions (engine)", "rope_theta 10000"),
    ],
)
def test_a_planted_fault_is_named_first(
    plant: Callable[[pytest.MonkeyPatch], None],
    name: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("COLUMNS", "300")
    plant(monkeypatch)
    with pytest.raises(UserError, match="doctor found") as failure:
        doctor(QUICKSTART, SMALL, None)
    table = capsys.readouterr().out.split("one change at a time\n")[1].splitlines()
    assert name in table[1] and said in table[1], table
    assert int(table[1].split("%")[0]) >= 60 and name in str(failure.value)


def test_rounding_alone_is_no_cause(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    doctor(QUICKSTART, SMALL, None, explain=True)
    shown = capsys.readouterr().out
    assert "all checks passed" in shown
    table = shown.split("one change at a time\n")[1].splitlines()
    assert "100%" in table[1] and "rounding, in another order" in table[1]


def test_golden_section_finds_a_minimum_and_keeps_a_better_start():
    x, value = golden_section(lambda x: (x - 0.3) ** 2, -1, 1, (0.9, 0.36), rounds=30)
    assert abs(x - 0.3) < 1e-5 and value < 1e-10
    assert golden_section(abs, 1, 2, (0.0, 0.0)) == (0.0, 0.0)
