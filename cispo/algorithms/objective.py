"""The learner's objective: a policy loss, a rollout correction on it, and a KL penalty beside it.

objective(LossInputs) -> LossOutput        per token; the learner multiplies by loss_weights and sums
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cispo.algorithms.corrections import Correction, correction_factors
from cispo.algorithms.losses import Kl, LossFn, LossOutput, is_per_token, kl_estimate
from cispo.errors import UserError
from cispo.types import LossInputs

Anchor = Literal["rollout", "old"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A pure function of per-token tensors that crosses processes.

    Example: Objective(loss=Cispo(ratio_max=5.0))
    """

    loss: LossFn
    ratio_anchor: Anchor = "rollout"
    """The ratio's denominator: the engine's logprobs at sampling time, or the learner's before this batch."""
    kl: Kl = "k3"
    kl_coef: float = 0.0
    """Factor of KL(policy || reference) in the loss; 0 is none."""
    correction: Correction | None = None

    @property
    def per_token(self) -> bool:
        """Whether each token's loss follows from that token alone, as loss and correction declare."""
        return is_per_token(self.loss) and (self.correction is None or self.correction.per_token)

    def __call__(self, x: LossInputs) -> LossOutput:
        """Per-token loss; the correction scales the policy loss and not the KL penalty."""
        result = self.loss(x)
        if not isinstance(result, LossOutput) or result.loss.shape != x.logprobs.shape:
            name = getattr(self.loss, "__name__", type(self.loss).__name__)
            raise UserError(f"{name} must return a LossOutput with one loss a token, not a mean (docs/algorithms.md)")
        loss, weight, extra = result.loss, result.weight, dict(result.extra)
        if self.correction is not None:
            assert x.old_logprobs is not None, "a correction needs old_logprobs"
            factors = correction_factors(self.correction, x.old_logprobs, x.rollout_logprobs, x.mask, x.cu_seqlens)
            loss, weight = loss * factors, weight * factors
            extra["correction/factor"] = factors
            extra["correction/masked_frac"] = (factors == 0).to(factors.dtype)
        if self.kl_coef > 0:
            assert x.ref_logprobs is not None, "a KL penalty needs ref_logprobs"
            kl = kl_estimate(x.logprobs, x.ref_logprobs, x.mask, self.kl)
            loss = loss + self.kl_coef * kl
            extra["kl/reference"] = kl.detach()
        return LossOutput(torch.where(x.mask, loss, 0.0), result.ratio, weight, extra)
