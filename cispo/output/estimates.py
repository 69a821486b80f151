"""Estimates from n samples of a prompt: a right one among k (pass@k), the most frequent answer of k (maj@k), intervals.

All k come from the same samples: each is the mean over every set of k of the n, without bias for a single prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Share(NamedTuple):
    """A mean over prompts with its 95 % interval; both ends are nan where one prompt gives none."""

    mean: float
    low: float
    high: float


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Chance that the most frequent answer among k of the n samples is right; a tie is decided by lot.

    An answer is right with the share of its samples that are. None is no answer: it has no vote, and where none of the
    k has an answer, the vote is wrong.

    For an answer with c samples, sum over its number of votes m and the number of ties t of
    C(c, m) N(k - m, m, t) / (1 + t) / C(n, k), where N(j, m, t) counts the sets of j other samples in which t other
    answers have m votes and all others fewer: the coefficient of x^j y^t in a product of one polynomial an answer.
    """
    n = len(answers)
    assert 1 <= k <= n == len(right)
    counts = Counter(answer for answer in answers if answer is not None)
    blank = n - sum(counts.values())
    good = Counter(answer for answer, is_right in zip(answers, right, strict=True) if is_right and answer is not None)
    chance = 0.0
    for answer, count in counts.items():
        if not good[answer]:
            continue
        others = [other for name, other in counts.items() if name != answer]
        wins = sum(math.comb(count, m) * _wins(others, blank, votes=m, rest=k - m) for m in range(1, min(count, k) + 1))
        chance += good[answer] / count * wins
    return chance / math.comb(n, k)


def _wins(others: Sequence[int], blank: int, *, votes: int, rest: int) -> float:
    """Sum over t of N(rest, votes, t) / (1 + t); `blank` samples have no answer."""
    ties = rest // votes
    sets = np.zeros((rest + 1, ties + 1))
    sets[: min(blank, rest) + 1, 0] = [math.comb(blank, j) for j in range(min(blank, rest) + 1)]
    for count in others:
        grown = np.zeros_like(sets)
        for j in range(min(count, votes, rest) + 1):
            tie = int(j == votes)
            grown[j:, tie:] += math.comb(count, j) * sets[: rest + 1 - j, : ties + 1 - tie]
        sets = grown
    return float((sets[rest] / (1 + np.arange(ties + 1))).sum())


def share_of(values: Sequence[float]) -> Share:
    """Mean over prompts of values in [0, 1], with Student's t interval cut at 0 and 1.

    Where all values are 0 or all are 1 there is no spread: then Wilson's interval of so many right or wrong prompts.
    """
    from scipy.stats import binomtest, t

    n, mean = len(values), math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else math.nan
    if mean in (0.0, 1.0):
        interval = binomtest(int(mean) * n, n).proportion_ci(LEVEL, method="wilson")
        return Share(mean, float(interval.low), float(interval.high))
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n) if n > 1 else math.nan
    return Share(mean, max(mean - half, 0.0) if n > 1 else math.nan, min(mean + half, 1.0) if n > 1 else math.nan)
