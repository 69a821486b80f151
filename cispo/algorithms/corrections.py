"""Rollout corrections: per-token factors for the mismatch between the engine's probabilities and the learner's.

rho = old / rollout, the learner's probability over the engine's for the same weights. The factors multiply the policy
loss; the denominators of the reduction stay those of all tokens, so that the remaining tokens are not scaled up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cispo.algorithms.losses import sequence_means
from cispo.errors import UserError

CorrectionKind = Literal["tis", "icepop", "sequence_mask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A correction with its bounds on rho.

    Example: Correction(kind="tis", low=0.0, high=2.0)
    """

    kind: CorrectionKind
    low: float
    high: float

    @property
    def per_token(self) -> bool:
        """Whether the factor of a token follows from that token alone."""
        return self.kind != "sequence_mask"

    def check(self) -> None:
        """Raises UserError for bounds that leave nothing between them."""
        if not 0 <= self.low < self.high:
            raise UserError(f"algorithm.correction_low {self.low} must be from 0 to below correction_high {self.high}")

    def describe(self) -> str:
        return {
            "tis": f"policy loss times min(rho, {self.high:g}) (truncated importance sampling)",
            "icepop": f"policy loss times rho where {self.low:g} <= rho <= {self.high:g}, else 0 (IcePop)",
            "sequence_mask": (
                f"completions whose geometric mean of rho leaves [{self.low:g}, {self.high:g}] have no policy loss"
            ),
        }[self.kind]


DEFAULT_BOUNDS: dict[CorrectionKind, tuple[float, float]] = {
    "tis": (0.0, 2.0),  # verl, slime, open-instruct
    "icepop": (0.5, 5.0),  # arXiv 2510.18855, NeMo-RL, OpenRLHF
    "sequence_mask": (0.99, 1.01),  # SkyRL
}


def correction_factors(
    correction: Correction, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """[T], no gradient: the factor of each token's policy loss; 1 where masked."""
    log_rho = torch.where(mask, old_logprobs, 0.0) - torch.where(mask, rollout_logprobs, 0.0)
    log_rho = log_rho.detach().clamp(-20.0, 20.0)
    rho = log_rho.exp()
    if correction.kind == "tis":
        factors = rho.clamp(max=correction.high)
    elif correction.kind == "icepop":
        factors = torch.where((rho >= correction.low) & (rho <= correction.high), rho, 0.0)
    else:
        mean = sequence_means(log_rho, mask, cu_seqlens).exp()
        factors = ((mean >= correction.low) & (mean <= correction.high)).to(rho.dtype)
    return torch.where(mask, factors, 1.0)
