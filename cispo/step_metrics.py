"""What one training step reports: from its rollouts, samples and updates to named numbers (`metrics` says what they
mean)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cispo.algorithms.dropped_tokens import would_drop
from cispo.learner.critic import CriticResult
from cispo.learner.learner import UpdateResult
from cispo.metrics import group_metrics, importance_metrics, mismatch_metrics, rollout_metrics, value_metrics
from cispo.rollout.rewards import RewardRunner
from cispo.rollout.rollout import Rollouts
from cispo.types import Sample

# What the learner reports of every token; further columns are the objective's own.
_TOKEN_COLUMNS = frozenset(
    ("targets", "logprobs", "old_logprobs", "rollout_logprobs", "versions", "advantages", "ratio", "weight", "entropy")
)


@dataclass(slots=True, kw_only=True)
class Updates:
    """What the optimizer steps of one batch did: [updates][ranks]."""

    policy: list[list[UpdateResult]] = field(default_factory=list)
    critic: list[list[CriticResult]] = field(default_factory=list)
    lr: float = 0.0
    """Learning rate of the last one."""

    @property
    def taken(self) -> list[list[UpdateResult]]:
        """A skipped update says nothing but that it was skipped: its values need not be finite."""
        return [r for r in self.policy if r[0].taken]

    def tokens(self) -> dict[str, Tensor]:
        """Per-token values of all updates that were taken, {} where none was."""
        return _merged(self.taken) if self.taken else {}


def sampling_metrics(rollouts: Rollouts, rewards: RewardRunner, *, version: int) -> dict[str, float]:
    """Of a batch of rollouts that the policy `version` is trained on."""
    return (
        rollout_metrics(rollouts.groups, version=version)
        | group_metrics(rollouts.groups)
        | {
            "reward/dropped_groups": rollouts.dropped,
            "reward/errors": rewards.errors,
            "reward/timeouts": rewards.timeouts,
            "rollout/rounds": rollouts.rounds,
        }
    )


def update_metrics(
    samples: Sequence[Sample], updates: Updates, tokens: Mapping[str, Tensor], *, version: int, balanced: bool
) -> dict[str, float]:
    """Of the updates of the policy `version` on a batch; `tokens` is what `updates.tokens()` gave.

    `balanced` says whether the experts' load counts.
    """
    metrics = {
        "learner/updates": len(updates.policy),
        "learner/skipped": len(updates.policy) - len(updates.taken),
        **_critic_metrics(samples, updates.critic),
    }
    taken = updates.taken
    if not taken:
        return metrics
    others = would_drop(tokens["ratio"], tokens["advantages"])
    # Before the first update the learner is the policy that sampled, so what differs there is the mismatch.
    mismatch = tokens if "old_logprobs" in tokens else _merged(taken[:1])
    learner = mismatch.get("old_logprobs", mismatch["logprobs"])
    fresh = mismatch["versions"] == version
    metrics |= importance_metrics(tokens, others) | mismatch_metrics(learner, mismatch["rollout_logprobs"], fresh)
    metrics |= {name: float(tokens[name].double().mean()) for name in tokens if name not in _TOKEN_COLUMNS}
    if balanced:
        metrics["learner/router_aux_loss"] = sum(r.batch.aux_loss for r in taken[-1])
    return metrics | {
        "adv/std": float(tokens["advantages"].double().std(correction=0)),
        "grad_norm": sum(r[0].grad_norm for r in taken) / len(taken),
        "tokens_in_loss": len(tokens["advantages"]),
        "learner/lr": updates.lr,
        "learner/loss": sum(r.batch.loss for r in taken[-1]),
    }


def _merged(results: Sequence[Sequence[UpdateResult]]) -> dict[str, Tensor]:
    """Per-token values of all ranks and updates in one tensor a name."""
    parts = [result.batch.tokens for ranks in results for result in ranks if result.batch.tokens]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
