"""Policy losses: frozen dataclasses that are called on per-token tensors and return per-token values, never means.

    Cispo(ratio_max=5.0)(LossInputs) -> LossOutput        [T] to [T]

The reduction is not here: the learner computes (loss * loss_weights).sum(). Positions where `mask` is False contribute
exactly nothing, even if their values are NaN: they are replaced before any arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from cispo.errors import UserError
from cispo.types import LossInputs

Kl = Literal["k1", "k2", "k3"]
"""An estimator of KL(policy || reference) from sampled tokens (Schulman, "Approximating KL divergence")."""

# Only protects exp from overflow; e^20 is far beyond any ratio that is not clipped.
_MAX_LOG_RATIO = 20.0


class LossOutput(NamedTuple):
    """Per-token loss and, for the metrics, the two factors that make up its gradient."""

    loss: Tensor
    """[T]: 0 where masked."""
    ratio: Tensor
    """[T], no gradient: the importance ratio; 1 where masked."""
    weight: Tensor
    """[T], no gradient: the factor of advantage * grad logprob in the ascent direction; 0 is a dropped token."""
    extra: Mapping[str, Tensor] = {}
    """Name -> [T], no gradient: further metrics, logged as means over the trained tokens."""


LossFn = Callable[[LossInputs], LossOutput]
"""A `Loss`, or a function, which has no settings."""


class Loss(ABC):
    """A loss with settings: a subclass is a frozen dataclass, and a recipe may change its fields.

    Example: replace(Cispo(ratio_max=5.0), ratio_max=8.0)(inputs)
    """

    __slots__ = ()

    per_token: ClassVar[bool] = False
    """Whether entry t of every output follows from entry t of the inputs. The learner then calls the loss inside the
    LM head's pass, on some rows at a time; any other loss sees whole sequences."""

    @abstractmethod
    def __call__(self, x: LossInputs) -> LossOutput: ...

    def check(self) -> None:
        """Raises UserError for meaningless bounds."""
        return

    def describe(self) -> list[tuple[str, str]]:
        """(item, words) rows of the bounds, for `cispo show`."""
        return []


def is_per_token(loss: LossFn) -> bool:
    """Whether the loss has a true attribute `per_token`, as a class or as a function on which it was set."""
    return bool(getattr(loss, "per_token", False))


def _inputs(x: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, ratio, advantages), harmless at masked positions; ratio carries the gradient of logprobs."""
    logprobs, log_ratio = _log_ratio(x)
    return logprobs, torch.exp(log_ratio), torch.where(x.mask, x.advantages, 0.0)


def _log_ratio(x: LossInputs) -> tuple[Tensor, Tensor]:
    logprobs = torch.where(x.mask, x.logprobs, 0.0)
    log_ratio = logprobs - torch.where(x.mask, x.anchor_logprobs, 0.0)
    return logprobs, log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cispo(Loss):
    """CISPO: -sg(clip(ratio, ratio_min, ratio_max)) * M * A * logprob (arXiv 2506.13585, eq. 4-7).

    The clip is on the stop-gradient weight, so every unmasked token keeps a gradient. `ratio_max` and `ratio_min` are
    absolute: the paper's 1 + eps_high^IS and 1 - eps_low^IS. M (eq. 6-7) is 0 where A > 0 and ratio > mask_high or
    A < 0 and ratio < mask_low (the paper's 1 + eps_high and 1 - eps_low); None leaves that side open.
    """

    ratio_max: float
    ratio_min: float = 0.0
    mask_low: float | None = None
    mask_high: float | None = None
    per_token: ClassVar[bool] = True

    def __call__(self, x: LossInputs) -> LossOutput:
        logprobs, ratio, advantages = _inputs(x)
        ratio = ratio.detach()
        weight = ratio.clamp(self.ratio_min, self.ratio_max)
        if self.mask_high is not None:
            weight = torch.where((advantages > 0) & (ratio > self.mask_high), 0.0, weight)
        if self.mask_low is not None:
            weight = torch.where((advantages < 0) & (ratio < self.mask_low), 0.0, weight)
        weight = torch.where(x.mask, weight, 0.0)
        return LossOutput(-weight * advantages * logprobs, ratio, weight)

    def check(self) -> None:
        if not 0 <= self.ratio_min <= min(1.0, self.ratio_max):
            raise UserError(f"algorithm.ratio_min {self.ratio_min} must be from 0 (no floor) to 1")

    def describe(self) -> list[tuple[str, str]]:
        sides = [f"A > 0 and ratio > {self.mask_high:g}"] if self.mask_high is not None else []
        sides += [f"A < 0 and ratio < {self.mask_low:g}"] if self.mask_low is not None else []
        return [
            ("importance weight", f"clipped to [{self.ratio_min:g}, {self.ratio_max:g}] (absolute), stop-gradient"),
            ("token mask", "drops " + " or ".join(sides) if sides else "off"),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedSurrogate(Loss):
    """PPO's -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) (arXiv 1707.06347, eq. 7).

    Tokens beyond the bound in the direction of their advantage have no gradient: they are dropped. With `dual_clip` c
    (arXiv 1912.09729, eq. 5) the surrogate of a negative advantage is at least c * A: a ratio above c is dropped too.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    per_token: ClassVar[bool] = True

    def __call__(self, x: LossInputs) -> LossOutput:
        _, ratio, advantages = _inputs(x)
        return _surrogate(x, ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)

    def check(self) -> None:
        _check_clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise UserError(f"algorithm.dual_clip {self.dual_clip} must be above the clip 1 + clip_high")

    def describe(self) -> list[tuple[str, str]]:
        rows = _describe_clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            rows.append(("dual clip", f"tokens with A < 0 and a ratio above {self.dual_clip:g} are dropped"))
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Gspo(Loss):
    """GSPO: PPO's surrogate on the sequence's ratio s = exp(mean_t log ratio_t) (arXiv 2507.18071, eq. 5-7 and 13).

    In the token form sg(s) * exp(logprob - sg(logprob)), which equals the sequence form where a sequence's advantages
    are equal. The ratio that is reported is s.
    """

    clip_low: float
    clip_high: float

    def __call__(self, x: LossInputs) -> LossOutput:
        logprobs, log_ratio = _log_ratio(x)
        mean = sequence_means(log_ratio.detach(), x.mask, x.cu_seqlens)
        s = torch.where(x.mask, mean.exp() * torch.exp(logprobs - logprobs.detach()), 1.0)
        return _surrogate(x, s, torch.where(x.mask, x.advantages, 0.0), self.clip_low, self.clip_high)

    def check(self) -> None:
        _check_clip(self.clip_low, self.clip_high)

    def describe(self) -> list[tuple[str, str]]:
        return _describe_clip(self.clip_low, self.clip_high)


@dataclass(frozen=True, slots=True)
class PolicyGradient(Loss):
    """REINFORCE: -A * logprob, without an importance weight (Williams 1992)."""

    per_token: ClassVar[bool] = True

    def __call__(self, x: LossInputs) -> LossOutput:
        logprobs, ratio, advantages = _inputs(x)
        return LossOutput(-advantages * logprobs, ratio.detach(), x.mask.to(logprobs.dtype))


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood(Loss):
    """-logprob: supervised fine-tuning as a policy loss with weight 1 and advantage 1."""

    per_token: ClassVar[bool] = True

    def __call__(self, x: LossInputs) -> LossOutput:
        logprobs = torch.where(x.mask, x.logprobs, 0.0)
        one = torch.ones_like(logprobs).detach()
        return LossOutput(-logprobs, one, torch.where(x.mask, one, 0.0))


def _surrogate(
    x: LossInputs,
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> LossOutput:
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    dropped = ppo_drops(ratio.detach(), advantages, clip_low=clip_low, clip_high=clip_high) | ~x.mask
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
        dropped = dropped | ((advantages < 0) & (ratio.detach() > dual_clip))
    ratio = ratio.detach()
    return LossOutput(-surrogate, ratio, torch.where(dropped, 0.0, ratio))


def ppo_drops(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """[T] bool: the tokens to which PPO's clip gives no gradient."""
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


def _check_clip(clip_low: float, clip_high: float) -> None:
    for key, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if value < 0:
            raise UserError(f"algorithm.{key} {value} must not be negative")


def _describe_clip(clip_low: float, clip_high: float) -> list[tuple[str, str]]:
    band = f"[{1 - clip_low:g}, {1 + clip_high:g}]"
    return [("ratio", f"clipped to {band}: tokens beyond, on the side of A, are dropped")]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Kl) -> Tensor:
    """[T]: a sampled token's estimate of KL(policy || reference), 0 where masked.

    k1 = logprob - ref; k2 = (logprob - ref)^2 / 2; k3 = exp(ref - logprob) - 1 - (ref - logprob), which is never
    negative. As a loss, k1 pulls nowhere on average (its gradient has expectation 0): it belongs in the reward.
    """
    difference = torch.where(mask, ref_logprobs, 0.0) - torch.where(mask, logprobs, 0.0)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    difference = difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return torch.exp(difference) - 1 - difference


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float) -> Tensor:
    """[T]: PPO's 0.5 * max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2), 0 where masked.

    From the reference implementation of arXiv 1707.06347: a value that moved further than `clip` from the batch's old
    one towards its return has no gradient.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def sequence_means(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T]: the mean of x [T] over the unmasked tokens of each token's own sequence."""
    assert len(cu_seqlens), "there are no sequences here: the loss that asks for them is declared per_token"
    lengths = cu_seqlens.diff().long()
    # Told the size of its output, it does not read the lengths from a GPU.
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    sums = x.new_zeros(len(lengths)).index_add(0, sequence, torch.where(mask, x, 0.0))
    counts = x.new_zeros(len(lengths)).index_add(0, sequence, mask.to(x.dtype))
    return (sums / counts.clamp(min=1))[sequence]
