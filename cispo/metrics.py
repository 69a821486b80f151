"""Metrics of a training step: pure functions from trajectories and trained tokens to named numbers.

    Rollouts --sampling_metrics--> reward/ length/ staleness/ ...
    Updates (of learner and critic ranks) --update_metrics--> is/ mismatch/ critic/ learner/ ...

Names are grouped by a prefix: reward/ adv/ is/ (importance weights) kl/ correction/ critic/ mismatch/ (engine against
learner) router/ (replayed experts) mtp/ (heads of multi-token prediction) length/ source/ (of one data source) data/
agent/ staleness/ learner/ curriculum/ time/ (seconds; time/sync/PART and time/start/PART are parts) total/ (since the
start) eval/; principal ones have none.
Fractions are shares of the trained tokens (is/, mismatch/), of the completions (truncation_frac, repetition_stop_frac)
or of the groups (zero_variance_*).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cispo.algorithms.advantages import is_constant, reaches
from cispo.algorithms.dropped_tokens import would_drop
from cispo.batch.samples import informative
from cispo.learner.critic import CriticResult
from cispo.learner.heads import prediction_metrics
from cispo.learner.learner import UpdateResult
from cispo.recipe.schema import Recipe
from cispo.rollout.curriculum import max_tokens_of
from cispo.rollout.rewards import RewardRunner
from cispo.rollout.rollout import Rollouts
from cispo.types import FinishReason, Sample, TokenStats, Trajectory, TrajectoryGroup

# Sampling


def sampling_metrics(rollouts: Rollouts, rewards: RewardRunner, *, version: int) -> dict[str, float]:
    """Metrics of a batch of rollouts that the policy `version` is trained on."""
    return (
        rollout_metrics(rollouts.groups, version=version)
        | group_metrics(rollouts.groups)
        | source_metrics(rollouts.groups, rewards)
        | {
            "reward/dropped_groups": rollouts.dropped,
            "reward/unscored": rollouts.unscored,
            "reward/errors": rewards.errors,
            "reward/timeouts": rewards.timeouts,
            "rollout/rounds": rollouts.rounds,
        }
    )


def rollout_metrics(groups: Sequence[TrajectoryGroup], *, version: int) -> dict[str, float]:
    """Rewards, lengths, finish reasons and staleness of a batch of groups that the policy `version` is trained on.

    Lengths are split into completions above their group's mean reward (_better) and the others (_worse). Staleness is
    in versions: of a completion that of its oldest token (mean, max), and of each token (tokens_mean).
    rollout/accepted_frac is the share of the tokens that were drafts of speculative decoding. reward/NAME is the mean
    over the completions that the function applies to, reward/NAME_count their number where some are left out.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    if not trajectories:
        return {}
    metrics = {
        "reward/mean": _mean([t.reward for t in trajectories]),
        "truncation_frac": _mean([t.finish_reason is FinishReason.LENGTH for t in trajectories]),
        "repetition_stop_frac": _mean([t.finish_reason is FinishReason.REPETITION for t in trajectories]),
    }
    sides: dict[str, list[Trajectory]] = {"": trajectories, "_better": [], "_worse": []}
    for group in groups:
        rewards = [t.reward for t in group.trajectories]
        mean = max(rewards) if is_constant(rewards) else _mean(rewards)
        for t in group.trajectories:
            sides["_better" if t.reward > mean else "_worse"].append(t)
    for side, some in sides.items():
        if some:
            lengths = sorted(t.length for t in some)
            metrics[f"length/mean{side}"] = _mean(lengths)
            metrics[f"length/p99{side}"] = float(lengths[math.ceil(0.99 * len(lengths)) - 1])
    by_turn = [turn.completion.versions for t in trajectories for turn in t.turns]
    stale = [version - min(versions) for versions in by_turn]
    metrics |= {
        "staleness/mean": _mean(stale),
        "staleness/max": float(max(stale)),
        "staleness/tokens_mean": version - sum(map(sum, by_turn)) / sum(map(len, by_turn)),
    }
    if accepted := sum(turn.completion.accepted for t in trajectories for turn in t.turns):
        metrics["rollout/accepted_frac"] = accepted / sum(map(len, by_turn))
    metrics |= agent_metrics([t for t in trajectories if t.status])
    names = dict.fromkeys(name for t in trajectories for name in t.rewards)
    for name in names:
        values = [t.rewards[name] for t in trajectories if name in t.rewards]
        metrics[f"reward/{name}"] = _mean(values)
        if len(values) < len(trajectories):
            metrics[f"reward/{name}_count"] = len(values)
    return metrics


def agent_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Turns, calls, ends and rewards of attempts with tools or an environment.

    agent/cached_frac is the share of the prompts' tokens, over all turns, that engines found in their prefix caches.
    agent/call_errors_frac is over the calls, agent/unreadable_frac over the replies, agent/context_frac the share of
    tokens that were read between a prompt and the last reply, agent/status_* are shares of the attempts.
    """
    if not trajectories:
        return {}
    turns = [len(t.turns) for t in trajectories]
    calls = sum(t.events["calls"] for t in trajectories)
    read = sum(len(turn.context_ids) for t in trajectories for turn in t.turns if turn.continues)
    metrics = {
        "agent/turns_mean": _mean(turns),
        "agent/turns_max": float(max(turns)),
        "agent/calls_mean": calls / len(trajectories),
        "agent/call_errors_frac": sum(t.events["failed"] for t in trajectories) / max(calls, 1),
        "agent/unreadable_frac": sum(t.events["unreadable"] for t in trajectories) / sum(turns),
        "agent/context_frac": read / max(read + sum(t.length for t in trajectories), 1),
        "agent/segments_mean": _mean([len(t.segments) for t in trajectories]),
    }
    if cached := sum(turn.completion.cached for t in trajectories for turn in t.turns):
        metrics["agent/cached_frac"] = cached / sum(_prompt_tokens(t) for t in trajectories)
    if any(turn.rewards for t in trajectories for turn in t.turns):
        metrics["reward/turns"] = _mean([sum(sum(turn.rewards.values()) for turn in t.turns) for t in trajectories])
    for status, count in sorted(Counter(t.status for t in trajectories).items()):
        metrics[f"agent/status_{status}"] = count / len(trajectories)
    return metrics


def _prompt_tokens(trajectory: Trajectory) -> int:
    """Tokens of the prompts of all turns."""
    total = 0
    for segment in trajectory.segments:
        length = 0
        for turn in segment:
            length += len(turn.context_ids)
            total += length
            length += len(turn.completion.token_ids)
    return total


def source_metrics(groups: Sequence[TrajectoryGroup], rewards: RewardRunner) -> dict[str, float]:
    """Each data source: source/NAME/prompts, reward, right_frac, length, truncation_frac, zero_variance_frac.

    right_frac is over the completions that the source's judge applies to.
    """
    metrics: dict[str, float] = {}
    for name in sorted({group.prompt.source for group in groups} - {""}):
        own = [group for group in groups if group.prompt.source == name]
        trajectories = [t for group in own for t in group.trajectories]
        judge = rewards.judge_of(name)
        judged = [reaches(t.rewards[judge], 1.0) for t in trajectories if judge in t.rewards]
        metrics |= {
            f"source/{name}/prompts": len(own),
            f"source/{name}/reward": _mean([t.reward for t in trajectories]),
            **({f"source/{name}/right_frac": _mean(judged)} if judged else {}),
            f"source/{name}/length": _mean([t.length for t in trajectories]),
            f"source/{name}/truncation_frac": _mean([t.finish_reason is FinishReason.LENGTH for t in trajectories]),
            f"source/{name}/zero_variance_frac": _mean([not informative(group) for group in own]),
        }
    return metrics


def group_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Shares of groups with equal rewards: all, those at the batch's highest reward, and the others."""
    if not groups:
        return {}
    constant = [g.trajectories[0].reward for g in groups if not informative(g)]
    highest = max(t.reward for g in groups for t in g.trajectories)
    right = sum(reaches(r, highest) and not reaches(0.0, r) for r in constant)
    return {
        "zero_variance_frac": len(constant) / len(groups),
        "zero_variance_right_frac": right / len(groups),
        "zero_variance_wrong_frac": (len(constant) - right) / len(groups),
    }


def pass_at_k(right: int, total: int, k: int) -> float:
    """Unbiased chance that k of `total` completions, `right` of them correct, hold a correct one (arXiv 2107.03374)."""
    if total - right < k:
        return 1.0
    return 1.0 - math.prod((total - right - i) / (total - i) for i in range(k))


# Updates


@dataclass(slots=True, kw_only=True)
class Updates:
    """The optimizer steps of one batch: [updates][ranks]."""

    policy: list[list[UpdateResult]] = field(default_factory=list)
    critic: list[list[CriticResult]] = field(default_factory=list)
    lr: float = 0.0
    """Learning rate of the policy's last step."""

    @property
    def taken(self) -> list[list[UpdateResult]]:
        """The policy's steps but for skipped ones, which may hold values that are not finite."""
        return [ranks for ranks in self.policy if ranks[0].taken]

    def tokens(self) -> TokenStats | None:
        """The trained tokens of all steps that were taken, None where none was."""
        return _tokens_of(self.taken) if self.taken else None


def update_metrics(
    samples: Sequence[Sample], updates: Updates, tokens: TokenStats | None, *, version: int, balanced: bool
) -> dict[str, float]:
    """Metrics of the updates of the policy `version` on a batch; `tokens` is the result of `updates.tokens()`.

    `balanced` says whether the router's balancing loss is trained on.
    """
    taken = updates.taken
    metrics = {
        "learner/updates": len(updates.policy),
        "learner/skipped": len(updates.policy) - len(taken),
        **_critic_metrics(samples, updates.critic),
    }
    if tokens is None:
        return metrics
    # Before its first step the learner is the policy that sampled: their difference there is the mismatch.
    first = tokens if tokens.old_logprobs is not None else _tokens_of(taken[:1])
    learner = first.logprobs if first.old_logprobs is None else first.old_logprobs
    metrics |= importance_metrics(tokens)
    metrics |= mismatch_metrics(learner, first.rollout_logprobs, first.versions == version)
    metrics |= {name: float(values.double().mean()) for name, values in tokens.extra.items()}
    metrics |= prediction_metrics(r.batch.predictions for ranks in taken for r in ranks)
    if balanced:
        metrics["learner/router_aux_loss"] = sum(r.batch.aux_loss for r in taken[-1])
    return metrics | {
        "adv/std": float(tokens.advantages.double().std(correction=0)),
        "grad_norm": sum(ranks[0].grad_norm for ranks in taken) / len(taken),
        "tokens_in_loss": len(tokens.advantages),
        "learner/lr": updates.lr,
        "learner/loss": sum(r.batch.loss for r in taken[-1]),
    }


def _tokens_of(updates: Sequence[Sequence[UpdateResult]]) -> TokenStats:
    return TokenStats.concat([r.batch.tokens for ranks in updates for r in ranks if r.batch.tokens is not None])


def importance_metrics(tokens: TokenStats) -> dict[str, float]:
    """Importance ratios, the weights they became, and entropy, over the trained tokens.

    clip_frac counts tokens with a weight below their ratio (capped or dropped), low_frac those lifted by a floor,
    dropped_frac those without any gradient. BAND_dropped_posadv and BAND_dropped_negadv are the tokens that another
    algorithm's band would have dropped, as shares of the tokens with that sign of the advantage.
    """
    ratio, weight, advantages = tokens.ratio.double(), tokens.weight.double(), tokens.advantages.double()
    positive, negative = advantages > 0, advantages < 0
    clipped, dropped = weight < ratio, weight == 0
    return {
        "is/ratio_mean": float(ratio.mean()),
        "is/ratio_max": float(ratio.max()),
        "is/ratio_min": float(ratio.min()),
        "is/ratio_p99": _quantile(ratio, 0.99),
        "is/clamped_mean": float(weight.mean()),
        "is/clip_frac": _share(clipped),
        "is/clip_frac_posadv": _share(clipped[positive]),
        "is/clip_frac_negadv": _share(clipped[negative]),
        "is/low_frac": _share(weight > ratio),
        "is/dropped_frac": _share(dropped),
        "is/dropped_frac_posadv": _share(dropped[positive]),
        "is/dropped_frac_negadv": _share(dropped[negative]),
        **{
            f"is/{name}": _share(mask[positive if name.endswith("posadv") else negative])
            for name, mask in would_drop(tokens.ratio, tokens.advantages).items()
        },
        "entropy": float(tokens.entropy.double().mean()),
    }


def mismatch_metrics(learner: Tensor, engine: Tensor, fresh: Tensor) -> dict[str, float]:
    """Distance of the learner's log-probabilities from the engine's for the same policy and tokens, [N] each.

    `fresh` marks the tokens that the engine sampled from the learner's version; others differ because the policy moved.
    Without any there are no metrics.

    logprob_mean and logprob_max are of |difference|, token_mult_prob_error is the mean of its exponential. k1 and k3
    estimate KL(engine || learner) (k3 = r - 1 - log r with r = learner / engine), prob_pearson is a correlation.
    """
    if not fresh.any():
        return {}
    learner, engine = learner[fresh].double(), engine[fresh].double()
    gap = learner - engine
    return {
        "mismatch/kl_k1": float(-gap.mean()),
        "mismatch/kl_k3": float((gap.exp() - 1 - gap).mean()),
        "mismatch/logprob_mean": float(gap.abs().mean()),
        "mismatch/logprob_max": float(gap.abs().max()),
        "mismatch/prob_pearson": _pearson(learner.exp(), engine.exp()),
        "mismatch/token_mult_prob_error": float(gap.abs().exp().mean()),
    }


def _critic_metrics(samples: Sequence[Sample], updates: Sequence[Sequence[CriticResult]]) -> dict[str, float]:
    """The critic's losses, and how well its values before this batch's updates predicted the returns."""
    if not updates:
        return {}
    values, returns = (torch.cat([getattr(s, name)[s.loss_mask] for s in samples]) for name in ("values", "returns"))
    return value_metrics(values, returns) | {
        "critic/loss": sum(r.loss for r in updates[-1]),
        "critic/grad_norm": sum(u[0].grad_norm for u in updates) / len(updates),
        "critic/skipped": sum(not u[0].taken for u in updates),
    }


def value_metrics(values: Tensor, returns: Tensor) -> dict[str, float]:
    """How well a critic's values [N] predicted the returns [N].

    Explained variance 1 is perfect, 0 no better than a constant; it is 0 also where all returns are equal.
    """
    values, returns = values.double(), returns.double()
    variance = 0.0 if is_constant(returns) else float(returns.var(correction=0))
    unexplained = float((returns - values).var(correction=0))
    return {
        "critic/explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
        "critic/value_mean": float(values.mean()),
        "critic/return_mean": float(returns.mean()),
    }


# Alarms

# Truncation above this precedes instability (ScaleRL, arXiv 2510.13786).
_TRUNCATION_ALARM = 0.10

MISMATCH_LIMITS = {"float32": ("mismatch/logprob_max", 3e-4), "bfloat16": ("mismatch/logprob_mean", 0.1)}
"""Policy dtype -> a metric and the most that rounding explains, in nats at temperature 1.

Seen in float32: 1e-6 on a new policy, at most 9e-5 in a million tokens of a trained one; a wrong decay, norm or
position is 1e-3 and up. Seen in bfloat16: a mean of 3e-3 on hybrids and of 0.03 to 0.04 on a dense policy, with single
tokens far off.
"""


def alarms(
    recipe: Recipe, metrics: Mapping[str, float], rollouts: Rollouts, rewards: RewardRunner, *, step: int
) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of the faults that a step's metrics show."""
    truncated = metrics.get("truncation_frac", 0.0)
    if truncated > _TRUNCATION_ALARM:
        yield (
            "truncation",
            f"{truncated:.0%} of the completions of step {step} were cut at {max_tokens_of(recipe, step)} tokens; runs "
            "that truncate more than 10 % tend to become unstable",
        )
    if rollouts.groups and metrics["learner/updates"] == 0 and "critic/loss" not in metrics:
        yield "constant", f"every group of step {step} had equal rewards: there was nothing to learn from"
    if rollouts.dropped:
        yield (
            "dropped",
            f"{rollouts.dropped} groups of step {step} are left out of the training and its means, because a reward "
            f"failed (reward/dropped_groups counts them): {rewards.last_problem}",
        )
    if rollouts.problems:
        yield (
            "failed",
            f"attempts failed in {len(rollouts.problems)} groups of step {step} (with env.on_error: raise the run ends "
            f"instead): {rollouts.problems[-1]}",
        )
    elif rollouts.unscored:
        yield (
            "unscored",
            f"no reward function applied to {rollouts.unscored} completions of step {step}, each gave None: they are "
            "left out of the training (reward/unscored counts them)",
        )
    if skipped := metrics["learner/skipped"] + metrics.get("critic/skipped", 0):
        largest = max((abs(t.reward) for group in rollouts.groups for t in group.trajectories), default=0.0)
        yield (
            "skipped",
            f"{skipped:.0f} updates of step {step} were skipped, because their gradients are not finite: rewards reach "
            f"{largest:.3g} (scale them down if that is large), else learner.lr is too high",
        )
    dtype, control = recipe.policy.number_format, recipe.control
    name, limit = MISMATCH_LIMITS[dtype]
    mismatch = metrics.get(name, 0.0)
    # Tokens after keys and values of older weights differ by more than rounding.
    of_one_version = control.max_staleness == 0 or control.on_update != "keep"
    if of_one_version and mismatch > limit / min(recipe.rollout.temperature, 1.0):
        yield (
            "mismatch",
            f"{name} of step {step} is {mismatch:.1e}: engine and learner differ by more than {dtype} explains (about "
            f"{limit:.0e}), so that they do not compute the same policy; `cispo doctor` says more",
        )


# Arithmetic


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if len(mask) else 0.0


def _quantile(values: Tensor, share: float) -> float:
    # torch.quantile refuses more than 16 million values; the sorted position does not.
    return float(values.kthvalue(math.ceil(share * len(values))).values)


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale > 0 else 1.0
