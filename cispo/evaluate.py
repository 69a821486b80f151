"""Held-out sampling accuracy: the rollouts of training, on prompts that training never sees."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cispo.metrics import pass_at_k
from cispo.rollout.rollout import RolloutSetup, roll_out
from cispo.types import Prompt, Sampling, Trajectory, TrajectoryGroup


def is_right(trajectory: Trajectory, judge: str) -> bool:
    """Whether the recipe's first reward function, the judge, gave at least 1."""
    return trajectory.rewards.get(judge, 0.0) >= 1.0


def num_right(group: TrajectoryGroup, judge: str) -> int:
    """Right attempts of the group."""
    return sum(is_right(trajectory, judge) for trajectory in group.trajectories)


async def evaluate(
    prompts: Sequence[Prompt], setup: RolloutSetup, *, samples: int, sampling: Sampling, seed: int
) -> tuple[dict[str, float], list[TrajectoryGroup]]:
    """Samples every prompt `samples` times at the training temperature; `setup` must have rewards.

    eval/accuracy is the share of right completions, with its standard error over prompts; eval/pass@k the chance that
    at least one of k = samples completions is right.
    """
    assert setup.rewards is not None, "accuracy needs a judge"
    rollouts = await roll_out(prompts, setup, group_size=samples, sampling=sampling, seed=seed)
    judge = setup.rewards.names[0]
    right = [num_right(group, judge) for group in rollouts.groups]
    if not right:
        return {}, []
    shares = [r / samples for r in right]
    accuracy = math.fsum(shares) / len(shares)
    spread = math.fsum((s - accuracy) ** 2 for s in shares) / max(len(shares) - 1, 1)
    trajectories = [t for group in rollouts.groups for t in group.trajectories]
    metrics = {
        "eval/accuracy": accuracy,
        "eval/accuracy_stderr": math.sqrt(spread / len(shares)),
        "eval/reward": math.fsum(t.reward for t in trajectories) / len(trajectories),
        "eval/length": math.fsum(t.length for t in trajectories) / len(trajectories),
    }
    if samples > 1:
        metrics[f"eval/pass@{samples}"] = math.fsum(pass_at_k(r, samples, samples) for r in right) / len(right)
    return metrics, rollouts.groups
