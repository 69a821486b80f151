"""Advantages: what each sampled token was worth, from the rewards of a batch.

    groups [P][G] of TokenRewards --advantage(groups, **settings)--> [P][G] tensors [L]

Advantages are per token everywhere. Most algorithms give every token of a trajectory the same one; GAE and reward-to-go
do not. A group whose rewards are all equal gets exact zeros from the group-relative ones, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenRewards:
    """The rewards of one trajectory, laid out over its L sampled tokens (all turns; what tools wrote is left out).

    Example: TokenRewards(streams={"outcome": tensor([0, 0, 1]), "speed": tensor([-0.1, 0, -0.2])})
    """

    streams: Mapping[str, Tensor]
    """Name -> [L] float64, already weighted. An outcome lies on the last token, a turn's reward on the turn's last."""
    values: Tensor | None = None
    """[L] float64: the critic's value of the state in which each token was sampled."""

    @cached_property
    def per_token(self) -> Tensor:
        """[L]: the sum of all streams."""
        return torch.stack(list(self.streams.values())).sum(0)

    @property
    def total(self) -> float:
        """R_i: the whole trajectory's reward."""
        return float(self.per_token.sum())


Groups = Sequence[Sequence[TokenRewards]]
AdvantageFn = Callable[..., list[list[Tensor]]]


def is_constant(rewards: Sequence[float] | Tensor) -> bool:
    """Whether all rewards of a group are equal, so that nothing can be learned from their comparison."""
    return bool((torch.as_tensor(rewards) == rewards[0]).all())


def group_mean(groups: Groups) -> list[list[Tensor]]:
    """A_i = R_i - mean_j R_j (Dr. GRPO, arXiv 2503.20783)."""
    return [_spread(group, _centred(_totals(group))) for group in groups]


def group_norm(groups: Groups, *, ddof: float = 0, epsilon: float = 0.0) -> list[list[Tensor]]:
    """A_i = (R_i - mean_j R_j) / (std_j R_j + epsilon) (GRPO, arXiv 2402.03300; CISPO's eq. 2).

    By default the population's std and no epsilon, which a group that is not constant does not need; `ddof` 1 takes the
    sample's std (n - 1).
    """
    return [_spread(group, _normalised(_totals(group), ddof, epsilon)) for group in groups]


def group_norm_sample(groups: Groups) -> list[list[Tensor]]:
    """The same with the sample's std (n - 1), as verl, slime and TRL compute it."""
    return group_norm(groups, ddof=1)


def leave_one_out(groups: Groups) -> list[list[Tensor]]:
    """A_i = R_i - mean_{j != i} R_j (RLOO, arXiv 2402.14740)."""
    return [
        _spread(group, _centred(totals) * (len(totals) / max(len(totals) - 1, 1)))
        for group, totals in zip(groups, map(_totals, groups), strict=True)
    ]


def batch_baseline(groups: Groups) -> list[list[Tensor]]:
    """A_i = R_i - mean R over all trajectories of the batch (REINFORCE with a baseline)."""
    totals = [_totals(group) for group in groups]
    baseline = _mean(torch.cat(totals)) if totals else 0.0
    return [_spread(group, total - baseline) for group, total in zip(groups, totals, strict=True)]


def batch_whiten(groups: Groups) -> list[list[Tensor]]:
    """A_t = (reward-to-go_t - mean) / std over all tokens of the batch (REINFORCE++, arXiv 2501.03262)."""
    return whiten([[_to_go(t.per_token) for t in group] for group in groups])


def reward_to_go(groups: Groups) -> list[list[Tensor]]:
    """A_t = sum_{p >= t} of all reward streams - the group's mean total (MiniMax's agents, arXiv 2605.26494)."""
    return [[_to_go(t.per_token) - _mean(_totals(group)) for t in group] for group in groups]


def gae(groups: Groups, *, gamma: float = 1.0, lam: float = 1.0, whitened: bool = True) -> list[list[Tensor]]:
    """Generalised advantage estimation on the critic's values (arXiv 1506.02438), whitened over the batch's tokens."""
    advantages = [[generalised_advantages(t, gamma=gamma, lam=lam) for t in group] for group in groups]
    return whiten(advantages) if whitened else advantages


def generalised_advantages(rewards: TokenRewards, *, gamma: float, lam: float) -> Tensor:
    """[L]: A_t = sum_k (gamma lam)^k delta_{t+k} with delta_t = r_t + gamma V_{t+1} - V_t.

    V is 0 after the last token. Only sampled tokens are states: what an environment wrote is skipped, not discounted.
    """
    assert rewards.values is not None, "GAE needs the critic's values"
    values = rewards.values
    following = torch.cat([values[1:], values.new_zeros(1)])
    deltas = rewards.per_token + gamma * following - values
    return _discounted(deltas, gamma * lam)


def whiten(advantages: list[list[Tensor]]) -> list[list[Tensor]]:
    """Mean 0 and population std 1 over all tokens of the batch; exact zeros where all are equal."""
    tokens = [a for group in advantages for a in group]
    if not tokens:
        return advantages
    flat = torch.cat(tokens)
    mean = _mean(flat)
    std = 1.0 if is_constant(flat) else float(flat.std(correction=0))
    return [[(a - mean) / std for a in group] for group in advantages]


ADVANTAGES: dict[str, AdvantageFn] = {
    "group_norm": group_norm,
    "group_norm_sample": group_norm_sample,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "batch_baseline": batch_baseline,
    "batch_whiten": batch_whiten,
    "reward_to_go": reward_to_go,
    "gae": gae,
}

GROUP_RELATIVE: frozenset[AdvantageFn] = frozenset({group_norm, group_norm_sample, group_mean, leave_one_out})
"""Advantages that compare the attempts at one prompt, and so say nothing about a group of one or of equal rewards."""


def _totals(group: Sequence[TokenRewards]) -> Tensor:
    return torch.tensor([t.total for t in group], dtype=torch.float64)


def _spread(group: Sequence[TokenRewards], advantages: Tensor) -> list[Tensor]:
    """One number a trajectory to each of its tokens."""
    return [torch.full_like(t.per_token, float(a)) for t, a in zip(group, advantages, strict=True)]


def _mean(values: Tensor) -> float:
    """The mean; of equal values it is that value, which rounding in a sum would miss by a bit."""
    return float(values[0] if is_constant(values) else values.mean())


def _centred(totals: Tensor) -> Tensor:
    return totals - _mean(totals)


def _normalised(totals: Tensor, ddof: float, epsilon: float) -> Tensor:
    if is_constant(totals):
        return torch.zeros_like(totals)
    return _centred(totals) / (totals.std(correction=int(ddof)) + epsilon)


def _to_go(rewards: Tensor) -> Tensor:
    return _discounted(rewards, 1.0)


def _discounted(x: Tensor, factor: float) -> Tensor:
    """[L]: y_t = x_t + factor * y_{t+1}."""
    sums, running = torch.empty_like(x), 0.0
    for t in range(len(x) - 1, -1, -1):
        running = float(x[t]) + factor * running
        sums[t] = running
    return sums
