"""Policy losses: pure functions of per-token tensors that return per-token values, never means.

The reduction is not here: the learner computes (loss * loss_weights).sum(). Positions where `mask` is False contribute
exactly nothing, even if their values are NaN: they are replaced before any arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cispo.types import LossInputs

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


LossFn = Callable[..., LossOutput]


def _inputs(x: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, ratio, advantages), harmless at masked positions; ratio carries the gradient of logprobs."""
    logprobs = torch.where(x.mask, x.logprobs, 0.0)
    log_ratio = logprobs - torch.where(x.mask, x.old_logprobs, 0.0)
    ratio = torch.exp(log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    return logprobs, ratio, torch.where(x.mask, x.advantages, 0.0)


def cispo(
    x: LossInputs,
    *,
    ratio_max: float,
    ratio_min: float = 0.0,
    mask_low: float | None = None,
    mask_high: float | None = None,
) -> LossOutput:
    """CISPO: -sg(clip(ratio, ratio_min, ratio_max)) * M * A * logprob (arXiv 2506.13585, eq. 4-7).

    The clip is on the stop-gradient weight, so every unmasked token keeps a gradient. `ratio_max` and `ratio_min` are
    absolute: the paper's 1 + eps_high^IS and 1 - eps_low^IS. M (eq. 6-7) is 0 where A > 0 and ratio > mask_high or
    A < 0 and ratio < mask_low (the paper's 1 + eps_high and 1 - eps_low); None leaves that side open.
    """
    logprobs, ratio, advantages = _inputs(x)
    ratio = ratio.detach()
    weight = ratio.clamp(ratio_min, ratio_max)
    if mask_high is not None:
        weight = torch.where((advantages > 0) & (ratio > mask_high), 0.0, weight)
    if mask_low is not None:
        weight = torch.where((advantages < 0) & (ratio < mask_low), 0.0, weight)
    weight = torch.where(x.mask, weight, 0.0)
    return LossOutput(-weight * advantages * logprobs, ratio, weight)


def clipped_surrogate(x: LossInputs, *, clip_low: float, clip_high: float) -> LossOutput:
    """PPO's -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) (arXiv 1707.06347, eq. 7).

    Tokens beyond the bound in the direction of their advantage have no gradient: they are dropped.
    """
    _, ratio, advantages = _inputs(x)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    ratio = ratio.detach()
    dropped = ppo_drops(ratio, advantages, clip_low=clip_low, clip_high=clip_high) | ~x.mask
    return LossOutput(loss, ratio, torch.where(dropped, 0.0, ratio))


def ppo_drops(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """[T] bool: the tokens to which PPO's clip gives no gradient."""
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


def negative_log_likelihood(x: LossInputs) -> LossOutput:
    """-logprob: supervised fine-tuning as a policy loss with weight 1 and advantage 1."""
    logprobs = torch.where(x.mask, x.logprobs, 0.0)
    one = torch.ones_like(logprobs).detach()
    return LossOutput(-logprobs, one, torch.where(x.mask, one, 0.0))
