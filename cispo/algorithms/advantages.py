"""Advantages: the worth of each sampled token, from the rewards of a batch; frozen dataclasses that are called.

    groups [P][G] of TokenRewards --GroupNorm()(groups)--> [P][G] tensors [L]

Advantages are per token everywhere. Most algorithms give every token of a trajectory the same one; GAE and reward-to-go
do not. A group of equal rewards gets exact zeros from the group-relative ones, never NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenRewards:
    """The rewards of one trajectory, laid out over its L sampled tokens (all turns; tool output is left out).

    Example: TokenRewards(streams={"outcome": tensor([0, 0, 1]), "speed": tensor([-0.1, 0, -0.2])})
    """

    streams: Mapping[str, Tensor]
    """Name -> [L] float64, already weighted. An outcome lies on the last token, a turn's reward on the turn's last."""
    values: Tensor | None = None
    """[L] float64: the critic's value of the state in which each token was sampled."""
    turns: tuple[int, ...] = ()
    """Sampled tokens of each turn; empty for a single turn of L tokens."""

    @cached_property
    def per_token(self) -> Tensor:
        """[L]: the sum of all streams."""
        return torch.stack(list(self.streams.values())).sum(0)

    @property
    def total(self) -> float:
        """R_i: the whole trajectory's reward."""
        return float(self.per_token.sum())


Groups = Sequence[Sequence[TokenRewards]]
AdvantageFn = Callable[[Groups], list[list[Tensor]]]
"""An `Advantage`, or a function, which has no settings."""


class Advantage(ABC):
    """An advantage with settings: a subclass is a frozen dataclass, and a recipe may change its fields."""

    __slots__ = ()

    name: ClassVar[str] = "the advantage"
    """Its name in a recipe."""
    group_relative: ClassVar[bool] = False
    """Whether it compares the attempts at one prompt, and so says nothing about a group of one or of equal rewards."""

    @abstractmethod
    def __call__(self, groups: Groups) -> list[list[Tensor]]: ...

    def describe(self) -> str:
        """The settings in words, for `cispo show`."""
        return ""


_RELATIVE_ROUNDING = 2.0**-21
"""Four times float32's epsilon: a few operations in the coarsest format that a reward is computed in."""
_ABSOLUTE_ROUNDING = 1e-12
"""Rest of float64 terms that cancel."""


def is_constant(rewards: Sequence[float] | Tensor) -> bool:
    """Whether all rewards of a group are equal but for rounding, so that nothing can be learned from their comparison.

    0.1 + 0.2 is equal to 0.3, and float32's 0.1 to float64's. Everything that asks whether rewards are equal asks here.
    """
    values = torch.as_tensor(rewards, dtype=torch.float64)
    low, high = values.aminmax()
    return bool(high - low <= _RELATIVE_ROUNDING * torch.maximum(high, -low) + _ABSOLUTE_ROUNDING)


def reaches(reward: float, threshold: float) -> bool:
    """Whether a reward is at least the threshold, but for rounding."""
    return reward >= threshold or is_constant([reward, threshold])


@dataclass(frozen=True, slots=True)
class GroupMean(Advantage):
    """A_i = R_i - mean_j R_j (Dr. GRPO, arXiv 2503.20783)."""

    name: ClassVar[str] = "group_mean"
    group_relative: ClassVar[bool] = True

    def __call__(self, groups: Groups) -> list[list[Tensor]]:
        return [_spread(group, _centred(_totals(group))) for group in groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNorm(Advantage):
    """A_i = (R_i - mean_j R_j) / (std_j R_j + epsilon) (GRPO, arXiv 2402.03300; CISPO's eq. 2).

    By default the population's std and no epsilon, which a group that is not constant does not need; `ddof` 1 takes the
    sample's std (n - 1).
    """

    ddof: int = 0
    epsilon: float = 0.0
    name: ClassVar[str] = "group_norm"
    group_relative: ClassVar[bool] = True

    def __call__(self, groups: Groups) -> list[list[Tensor]]:
        return [_spread(group, _normalised(_totals(group), self.ddof, self.epsilon)) for group in groups]

    def describe(self) -> str:
        return "" if self == type(self)() else f"ddof {self.ddof}, epsilon {self.epsilon:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNormSample(GroupNorm):
    """The same with the sample's std (n - 1), as verl, slime and TRL compute it."""

    ddof: int = 1
    name: ClassVar[str] = "group_norm_sample"


@dataclass(frozen=True, slots=True)
class LeaveOneOut(Advantage):
    """A_i = R_i - mean_{j != i} R_j (RLOO, arXiv 2402.14740)."""

    name: ClassVar[str] = "leave_one_out"
    group_relative: ClassVar[bool] = True

    def __call__(self, groups: Groups) -> list[list[Tensor]]:
        return [
            _spread(group, _centred(totals) * (len(totals) / max(len(totals) - 1, 1)))
            for group, totals in zip(groups, map(_totals, groups), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class BatchBaseline(Advantage):
    """A_i = R_i - mean R over all trajectories of the batch (REINFORCE with a baseline)."""

    name: ClassVar[str] = "batch_baseline"

    def __call__(self, groups: Groups) -> list[list[Tensor]]:
        totals = [_totals(group) for group in groups]
        centred = _centred(torch.cat(totals)).split([len(total) for total in totals]) if totals else []
        return [_spread(group, advantages) for group, advantages in zip(groups, centred, strict=True)]


@dataclass(frozen=True, slots=True)
class BatchWhiten(Advantage):
    """A_t = (reward-to-go_t - mean) / std over all tokens of the batch (REINFORCE++, arXiv 2501.03262)."""

    name: ClassVar[str] = "batch_whiten"

    def __call__(self, groups: Groups) -> list[list[Tensor]]:
        return whiten([[_to_go(t.per_token) for t in group] for group in groups])


@dataclass(frozen=True, slots=True)
class RewardToGo(Advantage):
    """A_t = sum_{p >= t} of all reward streams - the group's mean total (MiniMax's agents, arXiv 2605.26494)."""

    name: ClassVar[str] = "reward_to_go"

    def __call__(self, groups: Groups) -> list[list[Tensor]]:
        return [[_to_go(t.per_token) - _mean(_totals(group)) for t in group] for group in groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnToGo(Advantage):
    """A_k = G_k - mean_j G_jk for all tokens of turn k, G_k = the rewards from turn k on.

    The mean is over the attempts of the group that have a turn k; where one alone has it, over the last turn that two
    have, so that the longest attempt is not compared with itself. Unlike `reward_to_go`, a reward that all attempts
    have got already pushes no later token.
    """

    divide_by_std: bool = False
    """Whether to divide by the standard deviation of the group's totals."""
    name: ClassVar[str] = "turn_to_go"
    group_relative: ClassVar[bool] = True

    def __call__(self, groups: Groups) -> list[list[Tensor]]:
        return [self._of_group(group) for group in groups]

    def _of_group(self, group: Sequence[TokenRewards]) -> list[Tensor]:
        lengths = [list(t.turns) or [len(t.per_token)] for t in group]
        ahead = [_turns_to_go(t.per_token, own) for t, own in zip(group, lengths, strict=True)]
        centred, baseline = [torch.zeros_like(own) for own in ahead], 0.0
        for turn in range(max(map(len, ahead), default=0)):
            having = [number for number, own in enumerate(ahead) if len(own) > turn]
            values = torch.stack([ahead[number][turn] for number in having])
            if len(having) > 1 or turn == 0:
                baseline, differences = _mean(values), _centred(values)
            else:
                differences = values - baseline
            for number, difference in zip(having, differences, strict=True):
                centred[number][turn] = difference
        totals = _totals(group)
        scale = 1.0 if is_constant(totals) or not self.divide_by_std else float(totals.std(correction=0))
        return [
            (own / scale).repeat_interleave(torch.tensor(sizes)) for own, sizes in zip(centred, lengths, strict=True)
        ]


def _turns_to_go(per_token: Tensor, lengths: Sequence[int]) -> Tensor:
    """[K]: the sum of the rewards from each turn's first token on."""
    return torch.stack([part.sum() for part in per_token.split(list(lengths))]).flip(0).cumsum(0).flip(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gae(Advantage):
    """Generalised advantage estimation on the critic's values (arXiv 1506.02438), whitened over the batch's tokens."""

    gamma: float = 1.0
    """Discount of later rewards, per token."""
    lam: float = 1.0
    """1 trusts the rewards alone, 0 the critic's next value."""
    whitened: bool = True
    name: ClassVar[str] = "gae"

    def __call__(self, groups: Groups) -> list[list[Tensor]]:
        advantages = [[generalised_advantages(t, gamma=self.gamma, lam=self.lam) for t in group] for group in groups]
        return whiten(advantages) if self.whitened else advantages

    def describe(self) -> str:
        return f"gamma {self.gamma:g}, lam {self.lam:g}"


def generalised_advantages(rewards: TokenRewards, *, gamma: float, lam: float) -> Tensor:
    """[L]: A_t = sum_k (gamma lam)^k delta_{t+k} with delta_t = r_t + gamma V_{t+1} - V_t.

    V is 0 after the last token. Only sampled tokens are states: an environment's tokens are skipped, not discounted.
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
    if is_constant(flat):
        return [[torch.zeros_like(a) for a in group] for group in advantages]
    mean, std = float(flat.mean()), float(flat.std(correction=0))
    return [[(a - mean) / std for a in group] for group in advantages]


ADVANTAGES: dict[str, Advantage] = {
    advantage.name: advantage
    for advantage in (
        GroupNorm(),
        GroupNormSample(),
        GroupMean(),
        LeaveOneOut(),
        BatchBaseline(),
        BatchWhiten(),
        RewardToGo(),
        TurnToGo(),
        Gae(),
    )
}


def _totals(group: Sequence[TokenRewards]) -> Tensor:
    return torch.tensor([t.total for t in group], dtype=torch.float64)


def _spread(group: Sequence[TokenRewards], advantages: Tensor) -> list[Tensor]:
    """One number a trajectory to each of its tokens."""
    return [torch.full_like(t.per_token, float(a)) for t, a in zip(group, advantages, strict=True)]


def _mean(values: Tensor) -> float:
    """The mean; of equal values exactly the first, which rounding in a sum would miss by a bit."""
    return float(values[0] if is_constant(values) else values.mean())


def _centred(totals: Tensor) -> Tensor:
    """The distances from the mean; exact zeros where all are equal."""
    return torch.zeros_like(totals) if is_constant(totals) else totals - _mean(totals)


def _normalised(totals: Tensor, ddof: int, epsilon: float) -> Tensor:
    centred = _centred(totals)
    return centred if is_constant(totals) else centred / (totals.std(correction=ddof) + epsilon)


def _to_go(rewards: Tensor) -> Tensor:
    return _discounted(rewards, 1.0)


def _discounted(x: Tensor, factor: float) -> Tensor:
    """[L]: y_t = x_t + factor * y_{t+1}."""
    sums, running = torch.empty_like(x), 0.0
    for t in range(len(x) - 1, -1, -1):
        running = float(x[t]) + factor * running
        sums[t] = running
    return sums
