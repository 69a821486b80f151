"""Intervals for a handful of seeds, and the verdict on a difference between two arms.

Two intervals, because each has a weakness. Student's t assumes normal differences and then covers 95 % at any
number of seeds; the percentile bootstrap assumes nothing and covers too little (`BOOTSTRAP_COVERAGE`). A difference is
called resolved only if both leave out 0.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
_RESAMPLES = 9999
# Fixed, so that the same data give the same page.
_BOOTSTRAP_SEED = 0
# Differences that agree to this share of their size differ by rounding only, and have no spread to take intervals from.
_ROUNDING = 1e-12

BOOTSTRAP_COVERAGE = MappingProxyType({2: 50, 3: 75, 4: 80, 5: 84, 6: 86, 7: 88, 8: 89, 9: 89, 10: 90, 20: 93})
"""How often, in percent, a 95 % percentile bootstrap interval of n normal values covers their mean (simulated)."""


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number that was measured once per seed.

    The interquartile mean leaves out the lowest and the highest quarter of the seeds (as in rliable, arXiv 2108.13264);
    below 4 seeds it leaves out none and is the mean.
    """

    count: int
    mean: float
    interquartile_mean: float
    mean_interval: Interval | None
    """None where there is nothing to resample: one seed, or seeds that are all equal."""
    interquartile_interval: Interval | None


class Verdict(StrEnum):
    """The conclusion about arm - reference."""

    BETTER = "better"
    WORSE = "worse"
    UNRESOLVED = "not resolved"
    EQUAL = "exactly equal"
    NO_INTERVAL = "no interval"
    """One seed, or differences without spread."""
    NOTHING = "nothing to compare"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """arm - reference, seed by seed."""

    arm: str
    reference: str
    measure: str
    """The number of a run that is compared: final, best or auc."""
    seeds: tuple[int, ...]
    """The seeds that finished in both arms."""
    values: tuple[float, ...]
    mean: float | None
    student: Interval | None
    bootstrap: Interval | None
    verdict: Verdict
    sentence: str


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and interquartile mean with bootstrap intervals; None of no values."""
    import numpy as np

    if not values:
        return None
    _assert_finite(values)
    spread = not _constant(values)
    return Estimate(
        count=len(values),
        mean=math.fsum(values) / len(values),
        interquartile_mean=float(interquartile_mean(np.asarray(values))),
        mean_interval=bootstrap_interval(values) if spread else None,
        interquartile_interval=bootstrap_interval(values, interquartile=True) if spread else None,
    )


def interquartile_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean without the lowest and the highest quarter (whole seeds, rounded down)."""
    from scipy.stats import trim_mean

    return trim_mean(values, 0.25, axis=axis)


def bootstrap_interval(values: Sequence[float], *, interquartile: bool = False) -> Interval:
    """Percentile bootstrap of the mean, or of the interquartile mean, of at least two values."""
    import numpy as np

    low, high = bootstrap_band(np.asarray(values, dtype=float)[:, None], interquartile=interquartile)
    return Interval(float(low[0]), float(high[0]))


def bootstrap_band(values: np.ndarray, *, interquartile: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap over the rows of [n, k] values: lower and upper ends, [k] each."""
    import numpy as np
    from scipy.stats import bootstrap

    assert values.ndim == 2 and len(values) >= 2, "a bootstrap needs at least two seeds"
    assert np.isfinite(values).all(), "a value is not finite"
    result = bootstrap(
        (values,),
        interquartile_mean if interquartile else np.mean,
        axis=0,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, 4_000_000 // values.size),  # bounds the memory, not the result
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(_BOOTSTRAP_SEED),
    )
    return result.confidence_interval.low, result.confidence_interval.high


def student_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of at least two values that are not all equal."""
    from scipy.stats import t

    n = len(values)
    assert n >= 2 and not _constant(values), "Student's t needs values that differ"
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean - half, mean + half)


def difference(
    arm: str,
    reference: str,
    measure: str,
    *,
    label: str,
    ours: dict[int, float],
    theirs: dict[int, float],
    note: str = "",
) -> Difference:
    """Compares two arms seed by seed, on the seeds that both have.

    `ours` and `theirs` hold a value per seed; `label` names the number in the sentence ("final eval/accuracy"); `note`
    ends the sentence. Higher is better.
    """
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    _assert_finite([d[s] for d in (ours, theirs) for s in seeds])
    values = tuple(ours[s] - theirs[s] for s in seeds)
    mean = math.fsum(values) / len(values) if values else None
    student = bootstrap = None
    if len(values) > 1 and not _constant(values, scale=max(abs(ours[s]) for s in seeds)):
        student, bootstrap = student_interval(values), bootstrap_interval(values)
    verdict = _verdict(values, student, bootstrap)
    return Difference(
        arm=arm, reference=reference, measure=measure, seeds=seeds, values=values, mean=mean, student=student,
        bootstrap=bootstrap, verdict=verdict,
        sentence=_sentence(arm, reference, label, values, student, bootstrap, verdict) + note,
    )  # fmt: skip


def first_reach(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """The x at which the line through the points first reaches `level`; None if it never does."""
    for i, value in enumerate(y):
        if value >= level:
            return x[0] if i == 0 else x[i - 1] + (x[i] - x[i - 1]) * (level - y[i - 1]) / (value - y[i - 1])
    return None


def average(x: Sequence[float], y: Sequence[float], span: float) -> float | None:
    """Area under the line through the points from 0 to `span`, divided by it; None if they end before `span`."""
    if not x or x[-1] < span:
        return None
    cut = bisect_left(x, span)
    if cut == 0:  # a curve that begins late is taken to be flat before
        return y[0]
    slope = (y[cut] - y[cut - 1]) / (x[cut] - x[cut - 1])
    end = y[cut - 1] + slope * (span - x[cut - 1])
    points = [(0.0, y[0]), *zip(x[:cut], y[:cut], strict=True), (span, end)]
    pieces = ((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(points))
    return math.fsum(pieces) / span


def median_with_never(values: Sequence[float | None]) -> float | None:
    """Median where None is infinitely late; None if that is the median."""
    ordered = sorted(math.inf if v is None else v for v in values)
    half = len(ordered) // 2
    median = (ordered[half] + ordered[~half]) / 2
    return median if math.isfinite(median) else None


def number(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """A number for people: fixed digits, never -0.000, powers of ten for very small and very large ones."""
    if value and not 10.0**-digits / 2 <= abs(value) < 1e6:
        return f"{value:{'+' if sign else ''}.2e}"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.lstrip("+-") if not float(text) else text


def digits_for(*intervals: Interval) -> int:
    """Decimals that show the narrowest of the intervals with two figures, 3 at least."""
    width = min((i.high - i.low for i in intervals), default=1.0)
    return min(9, max(3, 1 - math.floor(math.log10(width)))) if width > 0 else 3


def seeds_text(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _verdict(values: Sequence[float], student: Interval | None, bootstrap: Interval | None) -> Verdict:
    if not values:
        return Verdict.NOTHING
    if not any(values):
        return Verdict.EQUAL
    if student is None or bootstrap is None:
        return Verdict.NO_INTERVAL
    if student.excludes(0) and bootstrap.excludes(0):
        return Verdict.BETTER if student.low > 0 else Verdict.WORSE
    return Verdict.UNRESOLVED


def _sentence(
    arm: str, reference: str, label: str, values: Sequence[float], student: Interval | None, bootstrap: Interval | None,
    verdict: Verdict,
) -> str:  # fmt: skip
    pair, count = f"{arm} - {reference}", seeds_text(len(values))
    if verdict is Verdict.NOTHING:
        return f"{pair} in {label}: no seed finished in both arms, so there is nothing to compare"
    if verdict is Verdict.EQUAL:
        every = f"in each of {count}" if len(values) > 1 else "in the only seed"
        return f"{pair} = 0 in {label}: exactly equal {every}"
    mean = math.fsum(values) / len(values)
    if student is None or bootstrap is None:
        found = f"{pair} = {number(mean, sign=True)} in {label}"
        if len(values) == 1:
            return f"{found} with 1 seed: there is no interval, so chance is not ruled out"
        return f"{found}, the same in each of {count}: no interval comes from differences without spread, not resolved"
    digits = digits_for(student, bootstrap)

    def span(interval: Interval) -> str:
        return f"{number(interval.low, digits)}..{number(interval.high, digits)}"

    end = f"not resolved with {count}" if verdict is Verdict.UNRESOLVED else f"{arm} is {verdict}"
    return (
        f"{pair} = {number(mean, digits, sign=True)} in {label}, 95% interval {span(student)} "
        f"(Student's t; bootstrap {span(bootstrap)}): {end}"
    )


def _constant(values: Sequence[float], scale: float = 0.0) -> bool:
    return max(values) - min(values) <= _ROUNDING * max(scale, *(abs(v) for v in values))


def _assert_finite(values: Sequence[float]) -> None:
    assert all(math.isfinite(v) for v in values), f"a value is not finite: {list(values)}"
