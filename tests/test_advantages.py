"""Advantages, shaping, and how a recipe's settings reach an algorithm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.algorithms import ALGORITHMS, Algorithm
from cispo.algorithms.advantages import (
    ADVANTAGES,
    AdvantageFn,
    Gae,
    GroupMean,
    GroupNorm,
    GroupNormSample,
    LeaveOneOut,
    RewardToGo,
    TokenRewards,
    is_constant,
    reaches,
)
from cispo.algorithms.choice import resolve
from cispo.algorithms.describe import describe, warnings
from cispo.algorithms.losses import Cispo
from cispo.algorithms.presets import PRESETS
from cispo.errors import UserError
from cispo.recipe.schema import Algorithm as AlgorithmSection
from cispo.rollout.rollout import overlong_penalty


def outcomes(*values: float, length: int = 2) -> list[TokenRewards]:
    """A group of trajectories of `length` tokens with the reward on the last, and a critic that says nothing."""
    zeros = torch.zeros(length, dtype=torch.float64)
    return [
        TokenRewards(streams={"outcome": zeros.index_fill(0, torch.tensor([length - 1]), v)}, values=zeros)
        for v in values
    ]


def of_trajectories(advantage: AdvantageFn, *values: float) -> list[float]:
    """One number a trajectory, found on each of its tokens."""
    tokens = advantage([outcomes(*values)])[0]
    assert all(bool((t == t[0]).all()) for t in tokens)
    return [float(t[0]) for t in tokens]


def test_hand_worked_groups():
    assert of_trajectories(GroupNorm(), 1, 0, 0, 0) == pytest.approx([1.7320508, *[-0.5773503] * 3])
    assert of_trajectories(GroupNormSample(), 1, 0, 0, 0) == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert of_trajectories(GroupMean(), 1, 0, 0, 0) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert of_trajectories(LeaveOneOut(), 1, 0, 0, 0) == pytest.approx([1, *[-1 / 3] * 3])
    assert of_trajectories(GroupNorm(), 1, 1, 0, 0) == pytest.approx([1, 1, -1, -1])
    assert of_trajectories(GroupNormSample(), 1, 1, 0, 0) == pytest.approx(
        [0.8660254, 0.8660254, -0.8660254, -0.8660254]
    )


def test_reward_to_go_knows_when_a_reward_came():
    """MiniMax's form: a reward in the middle counts for the tokens up to it, the baseline is the group's mean total."""
    early = TokenRewards(
        streams={
            "outcome": torch.tensor([0.0, 0, 1], dtype=torch.float64),
            "speed": torch.tensor([-0.5, 0, 0], dtype=torch.float64),
        }
    )
    late = TokenRewards(streams={"outcome": torch.tensor([0.0, 0.5], dtype=torch.float64)})
    first, second = RewardToGo()([[early, late]])[0]
    assert early.total == 0.5 and first.tolist() == [0, 0.5, 0.5] and second.tolist() == [0, 0]


def test_gae_by_hand():
    """gamma .5, lambda .5, values 1 2 3, reward 4 at the end: deltas 0, -.5, 1."""
    one = TokenRewards(
        streams={"outcome": torch.tensor([0.0, 0, 4], dtype=torch.float64)},
        values=torch.tensor([1.0, 2, 3], dtype=torch.float64),
    )
    (advantages,) = Gae(gamma=0.5, lam=0.5, whitened=False)([[one]])[0]
    assert advantages.tolist() == pytest.approx([0 + 0.25 * (-0.5 + 0.25 * 1), -0.5 + 0.25 * 1, 1])


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_give_exact_zeros(name: str, value: float):
    # 0.1 seven times has a mean that is not 0.1 in floating point: the zeros must be exact all the same.
    assert of_trajectories(ADVANTAGES[name], *[value] * 7) == [0.0] * 7


@pytest.mark.parametrize("name", ADVANTAGES)
def test_rewards_that_differ_by_rounding_are_equal(name: str):
    """Sums in another order, float32 beside float64, and terms that cancel."""
    single = torch.tensor(0.1).item()
    assert 0.1 + 0.2 != 0.3 and single != 0.1
    for values in ([0.1 + 0.2, 0.3, 0.3], [single, 0.1], [0.1 + 0.2 - 0.3, 0.0, 0.0], [-1.0, -1.0 - 1e-7]):
        found = of_trajectories(ADVANTAGES[name], *values)
        assert found == [0.0] * len(values) or name == "reward_to_go" and max(map(abs, found)) < 1e-6
        assert is_constant(values)


def test_small_differences_are_not_rounding():
    for values in ([0.5, 0.5001], [1e6, 1e6 + 1], [1e-9, 2e-9], [0.0, 1e-6], [-1.0, 1.0]):
        assert not is_constant(values)
    assert of_trajectories(GroupNorm(), 1e6, 1e6 + 1) == pytest.approx([-1, 1])


def test_a_threshold_is_reached_but_for_rounding():
    assert reaches(1.0, 1.0) and reaches(sum([0.1] * 10), 1.0) and reaches(2.0, 1.0)
    assert not reaches(0.999, 1.0) and not reaches(0.0, 1.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=9), st.integers(-8, 8))
def test_shifting_a_group_changes_nothing(values: list[int], shift: int):
    relative = [advantage for advantage in ADVANTAGES.values() if advantage.group_relative]
    assert len(relative) == 5
    for advantage in (*relative, RewardToGo()):
        before, after = (of_trajectories(advantage, *(v + s for v in values)) for s in (0, shift))
        assert before == pytest.approx(after, abs=1e-12)


@pytest.mark.parametrize(
    ("length", "expected"), [(16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (20481, -1)]
)
def test_overlong_penalty(length: int, expected: float):
    assert overlong_penalty(length, max_tokens=20480, buffer=4096) == pytest.approx(expected, abs=1e-12)


def test_overlong_penalty_off():
    assert overlong_penalty(100, max_tokens=100, buffer=0) == 0


def changed(name: str, **changes) -> Algorithm:
    return resolve({**ALGORITHMS, **PRESETS}[name], AlgorithmSection(**changes))


def test_a_recipe_changes_what_the_algorithm_has():
    resolved = changed("cispo", ratio_max=4.0, clip_low=None, reduction="prompt", ratio_anchor="old")
    assert resolved.loss == Cispo(ratio_max=4.0)
    assert resolved.reduction == "prompt" and resolved.ratio_anchor == "old"
    words = dict(describe(resolved))
    assert "[0, 4]" in words["importance weight"] and "before this batch" in words["ratio divides by"]
    ppo = changed("ppo", gamma=0.9)
    assert ppo.advantage == Gae(gamma=0.9, lam=1.0) and ppo.critic
    without = changed("ppo", advantage="group_norm")
    assert not without.critic and without.advantage == GroupNorm()
    with_critic = changed("cispo", lam=0.9, advantage="gae")
    assert with_critic.critic and with_critic.zero_variance == "keep" and with_critic.advantage == Gae(lam=0.9)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cispo", {"ratio_max": 0.2}, "below 1"),
        ("trl_cispo", {"ratio_max": 0.3}, "below 1"),
        ("cispo", {"ratio_min": 1.5}, "ratio_min"),
        ("cispo", {"clip_low": 0.2}, "clip_low means nothing to cispo"),
        ("grpo", {"ratio_max": 5.0}, "ratio_max means nothing to grpo"),
        ("grpo", {"clip_high": -0.1}, "negative"),
        ("grpo", {"dual_clip": 1.1}, "dual_clip 1.1 must be above"),
        ("grpo", {"gamma": 0.9}, "gamma means nothing to grpo"),
        ("cispo", {"correction": "tis"}, "counts the mismatch twice"),
        ("grpo", {"correction_high": 3.0}, "need an algorithm.correction"),
        ("grpo", {"correction": "icepop", "correction_low": 6.0}, "correction_low 6.0"),
        ("dapo", {"zero_variance": "keep"}, "dynamic_sampling replaces"),
        ("cispo", {"advantage": "best"}, "advantage 'best' is unknown"),
    ],
)
def test_refused_settings(name: str, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        changed(name, **changes)


def test_warnings():
    assert warnings(ALGORITHMS["cispo"], updates_per_batch=1, max_staleness=0) == []
    narrow = changed("cispo", ratio_max=1.2, ratio_min=0.8, ratio_anchor="old")
    found = " ".join(warnings(narrow, updates_per_batch=1, max_staleness=0))
    assert "PPO-like" in found and "ratio_min" in found and "inert" in found
    assert "divides the learning rate by 5" in " ".join(
        warnings(changed("trl_cispo"), updates_per_batch=4, max_staleness=0)
    )
    assert "no importance weight" in " ".join(warnings(ALGORITHMS["rloo"], updates_per_batch=4, max_staleness=0))
    assert "k1 in the loss" in " ".join(warnings(changed("grpo", kl="k1"), updates_per_batch=4, max_staleness=0))
    stale = [" ".join(warnings(changed(name), updates_per_batch=4, max_staleness=2)) for name in ("grpo", "cispo")]
    assert "2 versions old" in stale[0] and not stale[1]


def test_presets_say_what_they_do_and_differ():
    """No two conventions of one family are the same algorithm under two names, but for those known to coincide."""
    seen: dict[tuple, str] = {}
    for name, preset in PRESETS.items():
        words = dict(describe(changed(name)))
        assert words["convention of"] and words["loss"]
        own = tuple((k, v) for k, v in describe(preset) if k not in ("name", "convention of"))
        assert own not in seen or {name, seen[own]} == {"trl_cispo", "ms_swift_cispo"}, f"{name} and {seen[own]}"
        seen[own] = name
    assert "[0, 0.2]" in dict(describe(PRESETS["trl_cispo"]))["importance weight"]
    assert "[0.8, 1.2]" in dict(describe(PRESETS["verl_cispo"]))["importance weight"]
    assert "[0, 6]" in dict(describe(PRESETS["nemo_rl_cispo"]))["importance weight"]
