"""Advantages, shaping, and how a recipe's settings reach an algorithm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.algorithms import ALGORITHMS, describe, resolve, warnings
from cispo.algorithms.advantages import ADVANTAGES, group_mean, group_norm, group_norm_sample
from cispo.algorithms.filters import overlong_penalty
from cispo.types import UserError


def rewards(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_worked_groups():
    assert group_norm([rewards(1, 0, 0, 0)])[0].tolist() == pytest.approx([1.7320508, *[-0.5773503] * 3])
    assert group_norm_sample([rewards(1, 0, 0, 0)])[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert group_mean([rewards(1, 0, 0, 0)])[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert group_norm([rewards(1, 1, 0, 0)])[0].tolist() == pytest.approx([1, 1, -1, -1])
    assert group_norm_sample([rewards(1, 1, 0, 0)])[0].tolist() == pytest.approx(
        [0.8660254, 0.8660254, -0.8660254, -0.8660254]
    )


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_give_exact_zeros(name: str, value: float):
    # 0.1 seven times has a mean that is not 0.1 in floating point: the zeros must be exact all the same.
    assert ADVANTAGES[name]([rewards(*[value] * 7)])[0].tolist() == [0.0] * 7


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=9), st.integers(-8, 8))
def test_shifting_a_group_changes_nothing(values: list[int], shift: int):
    for advantage in ADVANTAGES.values():
        before, after = advantage([rewards(*values)])[0], advantage([rewards(*(v + shift for v in values))])[0]
        assert torch.allclose(before, after, atol=1e-12) and bool(before.isfinite().all())


@pytest.mark.parametrize(
    ("length", "expected"), [(16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (20481, -1)]
)
def test_overlong_penalty(length: int, expected: float):
    assert overlong_penalty(length, max_tokens=20480, buffer=4096) == pytest.approx(expected, abs=1e-12)


def test_overlong_penalty_off():
    assert overlong_penalty(100, max_tokens=100, buffer=0) == 0


def test_a_recipe_changes_what_the_algorithm_has():
    changed = resolve(
        ALGORITHMS["cispo"], settings={"ratio_max": 4.0, "clip_low": None}, reduction="prompt", anchor="old"
    )
    assert changed.settings["ratio_max"] == 4.0 and changed.reduction == "prompt" and changed.anchor == "old"
    words = dict(describe(changed))
    assert "[0, 4]" in words["importance weight"] and "before this batch" in words["ratio divides by"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cispo", {"ratio_max": 0.2}, "below 1"),
        ("cispo", {"ratio_min": 1.5}, "ratio_min"),
        ("cispo", {"clip_low": 0.2}, "clip_low means nothing to cispo"),
        ("grpo", {"ratio_max": 5.0}, "ratio_max means nothing to grpo"),
        ("grpo", {"clip_high": -0.1}, "negative"),
    ],
)
def test_refused_settings(name: str, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        resolve(ALGORITHMS[name], settings=settings)


def test_warnings():
    assert warnings(ALGORITHMS["cispo"], updates_per_batch=1) == []
    narrow = resolve(ALGORITHMS["cispo"], settings={"ratio_max": 1.2, "ratio_min": 0.8}, anchor="old")
    found = " ".join(warnings(narrow, updates_per_batch=1))
    assert "PPO-like" in found and "ratio_min" in found and "inert" in found
