"""Metrics against values worked by hand."""

from __future__ import annotations

import pytest
import torch

from cispo.algorithms.dropped_tokens import DroppedTokens
from cispo.metrics import (
    group_metrics,
    importance_metrics,
    mismatch_metrics,
    pass_at_k,
    rollout_metrics,
    value_metrics,
)
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
    rewards: list[float], lengths: list[int], reason: FinishReason = FinishReason.STOP, newer: int = 0
) -> TrajectoryGroup:
    """Completions of version 3, but for their last `newer` tokens."""
    trajectories = []
    for index, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        completion = Completion(
            token_ids=(1,) * length,
            logprobs=(-1.0,) * length,
            finish_reason=reason,
            versions=(3,) * (length - newer) + (5,) * newer,
        )
        turn = Turn(prompt_ids=(0,), completion=completion)
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
    mixed = rollout_metrics([group([1, 0], [4, 2], newer=2)], version=5)
    assert mixed["staleness/mean"] == 1 and mixed["staleness/max"] == 2
    assert mixed["staleness/tokens_mean"] == pytest.approx(2 * 2 / 6)
    g = group_metrics(groups)
    assert g["zero_variance_frac"] == pytest.approx(2 / 3)
    assert g["zero_variance_right_frac"] == pytest.approx(1 / 3) and g["zero_variance_wrong_frac"] == pytest.approx(
        1 / 3
    )


def test_pass_at_k():
    assert pass_at_k(0, 4, 2) == 0 and pass_at_k(3, 4, 2) == 1 and pass_at_k(1, 4, 2) == pytest.approx(0.5)
