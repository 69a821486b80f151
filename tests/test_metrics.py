"""Metrics against values worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cispo.algorithms.dropped_tokens import DroppedTokens
from cispo.metrics import (
    alarms,
    group_metrics,
    importance_metrics,
    mismatch_metrics,
    pass_at_k,
    rollout_metrics,
    value_metrics,
)
from cispo.recipe.schema import Control, Policy, Recipe, Rollout
from cispo.rollout.rollout import Rollouts
from cispo.types import Completion, FinishReason, Prompt, TokenStats, Trajectory, TrajectoryGroup, Turn


def tokens(
    *, ratio: list[float], weight: list[float], advantages: list[float], targets: tuple[int, ...] | None = None
) -> TokenStats:
    """Tokens with an entropy of 1; values that the tests do not read are zeros."""
    zeros = torch.zeros(len(ratio), dtype=torch.float64)
    return TokenStats(
        targets=torch.tensor(targets or [0] * len(ratio)),
        logprobs=zeros,
        rollout_logprobs=zeros,
        versions=zeros.int(),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        ratio=torch.tensor(ratio, dtype=torch.float64),
        weight=torch.tensor(weight, dtype=torch.float64),
        entropy=zeros + 1,
    )


def test_importance_metrics():
    trained = tokens(ratio=[12, 1.2, 0.5, 0.5, 1], weight=[5, 1.2, 0.8, 0.5, 0], advantages=[1, 1, -1, -1, -1])
    m = importance_metrics(trained)
    assert m["is/ratio_max"] == 12 and m["is/ratio_min"] == 0.5 and m["is/ratio_mean"] == pytest.approx(15.2 / 5)
    assert m["is/clip_frac"] == pytest.approx(2 / 5)  # one capped, one dropped
    assert m["is/clip_frac_posadv"] == 0.5 and m["is/clip_frac_negadv"] == pytest.approx(1 / 3)
    assert m["is/low_frac"] == pytest.approx(1 / 5) and m["is/dropped_frac"] == pytest.approx(1 / 5)
    assert m["is/ppo_dropped_posadv"] == 0.5 and m["is/ppo_dropped_negadv"] == pytest.approx(2 / 3)
    assert m["is/dropped_frac_posadv"] == 0 and m["is/dropped_frac_negadv"] == pytest.approx(1 / 3)
    assert m["is/dapo_dropped_posadv"] == 0.5 and m["is/dapo_dropped_negadv"] == pytest.approx(2 / 3)
    assert m["is/ratio_p99"] == 12 and m["entropy"] == 1


def test_dropped_tokens_are_counted_by_token_and_sign():
    """Over two steps: token 7 is dropped twice by PPO's band (once more than by DAPO's), token 3 once with A < 0."""
    table = DroppedTokens()
    table.add(tokens(targets=(7, 7, 3, 5), ratio=[12, 1.25, 0.5, 1], weight=[5, 1.25, 0, 1], advantages=[1, 1, -1, 1]))
    table.add(tokens(targets=(9,), ratio=[1.0], weight=[1], advantages=[1]))
    assert table.rows(str) == [
        {
            "token": "7", "id": 7, "ppo_dropped": 2, "count": 2, "kept": 2,
            "ppo_dropped_posadv": 2, "ppo_dropped_negadv": 0, "dapo_dropped_posadv": 1, "dapo_dropped_negadv": 0,
        },
        {
            "token": "3", "id": 3, "ppo_dropped": 1, "count": 1, "kept": 0,
            "ppo_dropped_posadv": 0, "ppo_dropped_negadv": 1, "dapo_dropped_posadv": 0, "dapo_dropped_negadv": 1,
        },
    ]  # fmt: skip
    assert len(table.rows(str, limit=1)) == 1 and DroppedTokens().rows(str) == []


def test_value_metrics():
    perfect = value_metrics(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert perfect["critic/explained_variance"] == 1
    constant = value_metrics(torch.tensor([1.5, 1.5]), torch.tensor([1.0, 2.0]))
    assert constant["critic/explained_variance"] == 0 and constant["critic/return_mean"] == 1.5
    assert value_metrics(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0]))["critic/explained_variance"] == 0


def test_mismatch_metrics():
    all_fresh = torch.tensor([True, True])
    same = mismatch_metrics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]), all_fresh)
    assert (
        same["mismatch/kl_k1"] == 0
        and same["mismatch/kl_k3"] == 0
        and same["mismatch/prob_pearson"] == pytest.approx(1)
    )
    off = mismatch_metrics(torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log(), all_fresh)
    assert off["mismatch/kl_k1"] == pytest.approx(0, abs=1e-6)
    assert off["mismatch/kl_k3"] == pytest.approx(0.25, abs=1e-6)  # mean of 2 - 1 - ln 2 and .5 - 1 + ln 2
    assert off["mismatch/token_mult_prob_error"] == pytest.approx(2, abs=1e-5)
    assert off["mismatch/prob_pearson"] == pytest.approx(-1, abs=1e-6)
    learner, engine = torch.tensor([-1.0, -9.0, -2.0]), torch.tensor([-1.0, -0.1, -2.0])
    assert mismatch_metrics(learner, engine, torch.tensor([True, False, True]))["mismatch/logprob_max"] == 0
    assert mismatch_metrics(learner, engine, torch.tensor([False] * 3)) == {}


def group(
    rewards: list[float],
    lengths: list[int],
    reason: FinishReason = FinishReason.STOP,
    *,
    newer: int = 0,
    accepted: int = 0,
) -> TrajectoryGroup:
    """Completions of version 3, but for their last `newer` tokens; `accepted` drafts in each."""
    trajectories = []
    for index, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        completion = Completion(
            token_ids=(1,) * length,
            logprobs=(-1.0,) * length,
            finish_reason=reason,
            versions=(3,) * (length - newer) + (5,) * newer,
            accepted=accepted,
        )
        turn = Turn(context_ids=(0,), completion=completion)
        trajectories.append(
            Trajectory(group_id=0, index=index, turns=(turn,), text="", reward=reward, rewards={"exact_match": reward})
        )
    return TrajectoryGroup(prompt=Prompt(id=0, messages=()), trajectories=tuple(trajectories))


def test_rollout_and_group_metrics():
    groups = [group([1, 0], [4, 2]), group([1, 1], [3, 3]), group([0, 0], [8, 8], FinishReason.LENGTH)]
    m = rollout_metrics(groups, version=5)
    assert m["reward/mean"] == 0.5 and m["reward/exact_match"] == 0.5
    assert m["length/mean"] == pytest.approx(28 / 6) and m["length/p99"] == 8
    assert m["truncation_frac"] == pytest.approx(1 / 3) and m["repetition_stop_frac"] == 0
    assert m["length/mean_better"] == 4 and m["length/mean_worse"] == pytest.approx(24 / 5)
    assert m["staleness/mean"] == 2 and m["staleness/max"] == 2 and m["staleness/tokens_mean"] == 2
    assert "rollout/accepted_frac" not in m
    mixed = rollout_metrics([group([1, 0], [4, 2], newer=2, accepted=1)], version=5)
    assert mixed["rollout/accepted_frac"] == pytest.approx(2 / 6)
    assert mixed["staleness/mean"] == 1 and mixed["staleness/max"] == 2
    assert mixed["staleness/tokens_mean"] == pytest.approx(2 * 2 / 6)
    g = group_metrics(groups)
    assert g["zero_variance_frac"] == pytest.approx(2 / 3)
    assert g["zero_variance_right_frac"] == pytest.approx(1 / 3) and g["zero_variance_wrong_frac"] == pytest.approx(
        1 / 3
    )


def test_rewards_that_differ_by_rounding_are_equal():
    tenth = torch.tensor(0.1).item()
    groups = [group([0.1 + 0.2, 0.3, 0.3], [1, 2, 3]), group([tenth, 0.1], [4, 4]), group([5e-17, 0], [5, 5])]
    g = group_metrics(groups)
    assert g["zero_variance_frac"] == 1 and g["zero_variance_right_frac"] == pytest.approx(1 / 3)
    assert "length/mean_better" not in rollout_metrics(groups, version=5)
    assert value_metrics(torch.tensor([0.0, 1]), torch.tensor([0.1, tenth]))["critic/explained_variance"] == 0


def test_a_mean_over_some_completions_says_over_how_many():
    some, whole = group([1, 0], [4, 2]), group([1, 1], [3, 3])
    part = replace(some, trajectories=(some.trajectories[0], replace(some.trajectories[1], rewards={"other": 1.0})))
    m = rollout_metrics([part, whole], version=5)
    assert m["reward/exact_match"] == 1 and m["reward/exact_match_count"] == 3
    assert m["reward/other"] == 1 and m["reward/other_count"] == 1
    assert not [name for name in rollout_metrics([whole], version=5) if name.endswith("_count")]


class Failures:
    last_problem = "reward f raised OSError on prompt 3"


def kinds(metrics: dict[str, float], *, recipe: Recipe | None = None, **changes: Any) -> dict[str, str]:
    rollouts = Rollouts(
        **{
            "groups": [group([1, 0], [4, 2])],
            "dropped": 0,
            "tokens": 6,
            "seconds_scoring": 1.0,
        }
        | changes
    )
    learned = {"learner/updates": 1, "learner/skipped": 0} | metrics
    return dict(alarms(recipe or Recipe(), learned, rollouts, Failures(), step=2))  # type: ignore[arg-type]


def test_alarms():
    assert kinds({}) == {}
    assert "cut at 1024 tokens" in kinds({"truncation_frac": 0.2})["truncation"]
    assert set(kinds({"learner/updates": 0})) == {"constant"}
    lost = kinds({"learner/updates": 0}, groups=[], dropped=4)
    assert set(lost) == {"dropped"} and "4 groups of step 2" in lost["dropped"] and "OSError" in lost["dropped"]
    assert "no reward function applied to 3 completions of step 2" in kinds({}, unscored=3)["unscored"]
    broken = kinds({}, unscored=2, problems=("env: my_envs:Game raised OSError (prompt 3, turn 0)",))
    assert set(broken) == {"failed"} and "1 groups of step 2" in broken["failed"] and "OSError" in broken["failed"]
    skipped = kinds({"learner/skipped": 1}, groups=[group([1e38, 0], [4, 2])])["skipped"]
    assert "1 updates of step 2 were skipped" in skipped and "rewards reach 1e+38" in skipped
    assert "skipped" in kinds({"critic/skipped": 1})


def test_a_mismatch_that_rounding_does_not_explain_is_an_alarm():
    """Apertus in float32 through vLLM logged 1.9e-3 where other models have 1e-5."""
    low, high = {"mismatch/logprob_max": 9e-5}, {"mismatch/logprob_max": 1.9e-3, "mismatch/logprob_mean": 1e-4}
    assert kinds(low) == {} and "mismatch/logprob_max of step 2 is 1.9e-03" in kinds(high)["mismatch"]
    half, cold = Recipe(policy=Policy(dtype="bfloat16")), Recipe(rollout=Rollout(temperature=0.1))
    assert kinds(high, recipe=half) == {} and kinds(high, recipe=cold) == {}
    assert "mismatch" in kinds({"mismatch/logprob_mean": 0.2}, recipe=half)
    ahead = {"max_staleness": 1}
    assert kinds(high, recipe=Recipe(control=Control(**ahead, on_update="keep"))) == {}, "keys of older weights"
    assert "mismatch" in kinds(high, recipe=Recipe(control=Control(**ahead, on_update="recompute")))


def test_pass_at_k():
    assert pass_at_k(0, 4, 2) == 0 and pass_at_k(3, 4, 2) == 1 and pass_at_k(1, 4, 2) == pytest.approx(0.5)
