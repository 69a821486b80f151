"""Policy losses: pure functions of per-token tensors that return per-token values, never means.

The reduction is not here: the learner computes (loss * loss_weights).sum(). Positions where `mask` is False contribute
exactly nothing, even if their values are NaN: they are replaced before any arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

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
    """Name -> [T], no gradient: what else should be logged, as means over the trained tokens."""


LossFn = Callable[..., LossOutput]
AnyLoss = TypeVar("AnyLoss", bound=LossFn)


def per_token(loss: AnyLoss) -> AnyLoss:
    """Declares that a loss takes each token by itself: entry t of all it returns follows from entry t of its inputs.

    The learner then runs it inside the LM head's pass, some rows at a time. A loss that is not declared always sees
    whole sequences.
    """
    vars(loss)["per_token"] = True  # goes with the function wherever it is pickled to
    return loss


def is_per_token(loss: LossFn) -> bool:
    return bool(vars(loss).get("per_token", False))


def _inputs(x: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, ratio, advantages), harmless at masked positions; ratio carries the gradient of logprobs."""
    logprobs, log_ratio = _log_ratio(x)
    return logprobs, torch.exp(log_ratio), torch.where(x.mask, x.advantages, 0.0)


def _log_ratio(x: LossInputs) -> tuple[Tensor, Tensor]:
    logprobs = torch.where(x.mask, x.logprobs, 0.0)
    log_ratio = logprobs - torch.where(x.mask, x.anchor_logprobs, 0.0)
    return logprobs, log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


@per_token
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


@per_token
def clipped_surrogate(
    x: LossInputs, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> LossOutput:
    """PPO's -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) (arXiv 1707.06347, eq. 7).

    Tokens beyond the bound in the direction of their advantage have no gradient: they are dropped. With `dual_clip` c
    (arXiv 1912.09729, eq. 5) the surrogate of a negative advantage is at least c * A: a ratio above c is dropped too.
    """
    _, ratio, advantages = _inputs(x)
    return _surrogate(x, ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def gspo(x: LossInputs, *, clip_low: float, clip_high: float) -> LossOutput:
    """GSPO: PPO's surrogate on the sequence's ratio s = exp(mean_t log ratio_t) (arXiv 2507.18071, eq. 5-7 and 13).

    In the token form sg(s) * exp(logprob - sg(logprob)), which equals the sequence form where a sequence's advantages
    are equal. The ratio that is reported is s.
    """
    logprobs, log_ratio = _log_ratio(x)
    mean = sequence_means(log_ratio.detach(), x.mask, x.cu_seqlens)
    s = torch.where(x.mask, mean.exp() * torch.exp(logprobs - logprobs.detach()), 1.0)
    return _surrogate(x, s, torch.where(x.mask, x.advantages, 0.0), clip_low=clip_low, clip_high=clip_high)


def _surrogate(
    x: LossInputs,
    ratio: Tensor,
    advantages: Tensor,
    *,
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


@per_token
def policy_gradient(x: LossInputs) -> LossOutput:
    """REINFORCE: -A * logprob, without an importance weight (Williams 1992)."""
    logprobs, ratio, advantages = _inputs(x)
    return LossOutput(-advantages * logprobs, ratio.detach(), x.mask.to(logprobs.dtype))


@per_token
def negative_log_likelihood(x: LossInputs) -> LossOutput:
    """-logprob: supervised fine-tuning as a policy loss with weight 1 and advantage 1."""
    logprobs = torch.where(x.mask, x.logprobs, 0.0)
    one = torch.ones_like(logprobs).detach()
    return LossOutput(-logprobs, one, torch.where(x.mask, one, 0.0))


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
