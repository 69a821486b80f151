"""Advantages: what a trajectory's reward is worth beside the others of its group.

Each function takes the rewards of a batch, one [G] tensor a group, and returns the same shape. A group whose rewards
are all equal gets exact zeros, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

AdvantageFn = Callable[[Sequence[Tensor]], list[Tensor]]


def is_constant(rewards: Tensor) -> bool:
    """Whether all rewards of a group are equal, so that nothing can be learned from their comparison."""
    return bool((rewards == rewards[0]).all())


def group_mean(rewards: Sequence[Tensor]) -> list[Tensor]:
    """A_i = R_i - mean_j R_j (Dr. GRPO, arXiv 2503.20783)."""
    return [group - group.mean() if not is_constant(group) else group * 0 for group in rewards]


def group_norm(rewards: Sequence[Tensor]) -> list[Tensor]:
    """A_i = (R_i - mean_j R_j) / std_j R_j with the population's std (GRPO, arXiv 2402.03300; CISPO's eq. 2)."""
    return _normalised(rewards, correction=0)


def group_norm_sample(rewards: Sequence[Tensor]) -> list[Tensor]:
    """The same with the sample's std (n - 1), as verl, slime and TRL compute it."""
    return _normalised(rewards, correction=1)


def _normalised(rewards: Sequence[Tensor], correction: int) -> list[Tensor]:
    # No epsilon: a group that is not constant has a positive std, and a constant one is handled apart.
    centred = group_mean(rewards)
    return [
        centre / group.std(correction=correction) if not is_constant(group) else centre
        for centre, group in zip(centred, rewards, strict=True)
    ]


ADVANTAGES: dict[str, AdvantageFn] = {
    "group_norm": group_norm,
    "group_norm_sample": group_norm_sample,
    "group_mean": group_mean,
}
