"""Held-out sampling accuracy: the rollouts of training, on prompts that training never sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cispo.algorithms.advantages import reaches
from cispo.metrics import pass_at_k
from cispo.rollout.rewards import RewardRunner
from cispo.rollout.rollout import RolloutSetup, roll_out
from cispo.types import Prompt, Sampling, Trajectory, TrajectoryGroup


def is_right(trajectory: Trajectory, judge: str) -> bool:
    """Whether the recipe's first reward function, the judge, gave at least 1, but for rounding."""
    return reaches(trajectory.rewards.get(judge, 0.0), 1.0)


def num_right(group: TrajectoryGroup, judge: str) -> int:
    """Right attempts of the group."""
    return sum(is_right(trajectory, judge) for trajectory in group.trajectories)


def num_judged(group: TrajectoryGroup, judge: str) -> int:
    """Attempts of the group to which the judge gave a number, and not None."""
    return sum(judge in trajectory.rewards for trajectory in group.trajectories)


async def evaluate(
    prompts: Sequence[Prompt], setup: RolloutSetup, *, samples: int, sampling: Sampling, seed: int
) -> tuple[dict[str, float], list[TrajectoryGroup]]:
    """Samples every prompt `samples` times at the training temperature; `setup` must have rewards.

    eval/accuracy is the share of right completions, with its standard error over prompts; eval/pass@k the chance that
    at least one of k = samples completions is right. eval/prompts counts the prompts in the accuracy, eval/dropped
    those left out because a reward failed or the judge gave None to all their completions, eval/unjudged the
    completions of the others to which it gave None: accuracy is over the judged ones, pass@k over prompts with all
    judged.
    """
    assert setup.rewards is not None, "accuracy needs a judge"
    rollouts = await roll_out(prompts, setup, group_size=samples, sampling=sampling, seed=seed)
    judge = setup.rewards.names[0]
    counts = [(num_right(group, judge), num_judged(group, judge)) for group in rollouts.groups]
    counts = [(right, judged) for right, judged in counts if judged]
    metrics: dict[str, float] = {
        "eval/prompts": len(counts),
        "eval/dropped": len(prompts) - len(counts),
        "eval/unjudged": sum(samples - judged for _, judged in counts),
    }
    if not counts:
        return metrics, rollouts.groups
    shares = [right / judged for right, judged in counts]
    accuracy = math.fsum(shares) / len(shares)
    spread = math.fsum((s - accuracy) ** 2 for s in shares) / max(len(shares) - 1, 1)
    trajectories = [t for group in rollouts.groups for t in group.trajectories]
    metrics |= {
        "eval/accuracy": accuracy,
        "eval/accuracy_stderr": math.sqrt(spread / len(shares)),
        "eval/reward": math.fsum(t.reward for t in trajectories) / len(trajectories),
        "eval/length": math.fsum(t.length for t in trajectories) / len(trajectories),
    }
    whole = [right for right, judged in counts if judged == samples]
    if samples > 1 and whole:
        metrics[f"eval/pass@{samples}"] = math.fsum(pass_at_k(right, samples, samples) for right in whole) / len(whole)
    return metrics, rollouts.groups


def gaps(metrics: Mapping[str, float], rewards: RewardRunner) -> str:
    """A sentence on the prompts and completions that the held-out accuracy leaves out, "" where there are none."""
    dropped, unjudged = metrics.get("eval/dropped", 0), metrics.get("eval/unjudged", 0)
    parts = [f"{dropped} held-out prompts"] * bool(dropped) + [f"{unjudged} completions of others"] * bool(unjudged)
    if not parts:
        return ""
    reason = f" ({rewards.last_problem})" if rewards.problems else ""
    return (
        f"the held-out accuracy is over {metrics['eval/prompts']} prompts and leaves out {' and '.join(parts)}: a "
        f"reward failed or gave None{reason}"
    )
