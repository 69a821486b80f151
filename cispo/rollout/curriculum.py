"""The arithmetic of a curriculum: weights of prompts, the threshold that drops them, stages of completion length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cispo.recipe.schema import Curriculum, Recipe


def difficulty_weights(right: NDArray[np.int64], attempts: NDArray[np.int64]) -> NDArray[np.float64]:
    """[N]: p (1 - p) with p = (right + 1) / (attempts + 2), the posterior mean under a uniform prior.

    p (1 - p) is the variance of a right-or-wrong reward, the signal in a group of the prompt. The prior keeps every
    weight above 0 and gives a prompt without attempts the largest, 1/4.
    """
    p = (right + 1) / (attempts + 2)
    return p * (1 - p)


def effective_number(weights: NDArray[np.float64]) -> float:
    """(sum w)^2 / sum w^2 (Kish's effective sample size): the number of equal weights as spread out; 0 for none."""
    return float(weights.sum() ** 2 / np.square(weights).sum()) if len(weights) else 0.0


def enough(right: int, attempts: int, drop_above: float) -> bool:
    """Whether a group's pass rate is at or above the threshold.

    The quotient is rounded as the recipe's decimal number is, so 7 of 10 is at 0.7; 0.7 * 10 need not be 7.
    """
    return right / attempts >= drop_above


def max_tokens_at(step: int, *, stages: Sequence[tuple[int, int]], max_tokens: int) -> int:
    """Most tokens of a completion sampled for a training step: the last stage begun by then.

    `stages` are (first step, tokens) pairs in ascending order, the first at step 0; without stages it is `max_tokens`.
    """
    begun = [tokens for start, tokens in stages if start <= step]
    return begun[-1] if begun else max_tokens


def max_tokens_of(recipe: Recipe, step: int) -> int:
    """`max_tokens_at` a training step (the first is 1) with the recipe's stages."""
    return max_tokens_at(step, stages=recipe.curriculum.length_stages, max_tokens=recipe.rollout.max_tokens)


def describe_curriculum(keys: Curriculum, *, group_size: int, max_tokens: int) -> list[tuple[str, str]]:
    """(item, words) rows: the effect on a run of each key that is set."""
    rows = []
    if keys.weighting == "difficulty":
        rows.append(
            (
                "prompts",
                "drawn with weight p (1 - p), p = (right + 1) / (attempts + 2) in the prompt's last group; "
                "no prompt twice in a pass of rollout.prompts_per_step draws",
            )
        )
    if keys.drop_above is not None:
        needed = next(k for k in range(group_size + 1) if enough(k, group_size, keys.drop_above))
        rows.append(
            (
                "dropped",
                f"once {needed} of {group_size} attempts of its last group are right, a prompt is never sampled "
                "again; the run ends when none is left",
            )
        )
    if keys.length_stages:
        stages = ", ".join(f"{tokens} tokens from step {start}" for start, tokens in keys.length_stages)
        rows.append(("longest completion", f"{stages}; in evaluations {max_tokens}"))
    return rows
