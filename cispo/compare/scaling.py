"""The saturating curve of ScaleRL (arXiv 2510.13786), fitted to an arm: an extrapolation to more compute.

    R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)

R0 is the value before training, A the ceiling, C_mid the compute at half of the gain, B the steepness. C is counted in
sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cispo.compare.comparison import ArmResult, collapse, curve
from cispo.compare.statistics import LEVEL, Interval, number

if TYPE_CHECKING:
    import numpy as np

_MIN_POINTS = 5
_RESAMPLES = 300
_STEEPNESS = (0.05, 20.0)
# C_mid may lie this factor before the first and beyond the last point.
_REACH = 100.0


class Parameters(NamedTuple):
    """The parameters of R(C) except R0."""

    ceiling: float
    steepness: float
    midpoint: float


class Points(NamedTuple):
    """The evaluations of one seed: the value before training, and the later ones over compute."""

    start: float
    compute: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The curve of one arm."""

    arm: str
    start: float
    parameters: Parameters | None
    """None where nothing was fitted; `doubt` says why."""
    intervals: tuple[Interval, Interval, Interval] | None
    """95 % bootstrap intervals of the parameters."""
    resampled: str
    """Units that the bootstrap draws: seeds or points."""
    residual: float | None
    """Root mean square distance of the points from the curve."""
    doubt: str | None
    """Why the data do not identify the curve of this arm, in one sentence; None where they do."""


def scaling_curve(compute: np.ndarray, start: float, parameters: Parameters) -> np.ndarray:
    """R(C) at each C >= 0."""
    import numpy as np

    ceiling, steepness, midpoint = parameters
    with np.errstate(divide="ignore"):
        # (C_mid/C)^B through the logarithm: no overflow but at C = 0, where infinity gives R0.
        odds = np.exp(np.minimum(steepness * (math.log(midpoint) - np.log(compute)), 700.0))
    return start + (ceiling - start) / (1 + odds)


def fit_arm(arm: ArmResult, metric: str, *, max_level: float = 1.0) -> Fit:
    """Fits the runs of an arm that finished, all seeds' evaluations together.

    `max_level` bounds A: 1 for an accuracy. R0 is the mean of the seeds' values before training.
    """
    seeds = [points for run in arm.runs if run.failure is None and (points := _points(curve(run, metric)))]
    resampled = "seeds" if len(seeds) > 1 else "points"
    start = math.fsum(p.start for p in seeds) / len(seeds) if seeds else math.nan

    def refused(doubt: str) -> Fit:
        return Fit(arm=arm.name, start=start, parameters=None, intervals=None, resampled=resampled, residual=None,
                   doubt=f"no curve was fitted: {doubt}")  # fmt: skip

    places = {c for points in seeds for c in points.compute}
    if not seeds:
        return refused("no run finished that was evaluated before training")
    if min(len(points.compute) for points in seeds) < _MIN_POINTS:
        return refused(f"it takes {_MIN_POINTS} evaluations after the start")
    gain = max(math.fsum(p.values[-k] for p in seeds) / len(seeds) for k in (1, 2)) - start
    if gain <= 0:
        return refused("the metric did not rise")
    assert start < max_level, f"{metric} starts at {start}, above max_level {max_level}"
    bounds = _bounds(min(places), max(places), start, max_level)
    best = _least_squares(seeds, bounds, _grid(start, gain, places, max_level))
    intervals = _intervals(seeds, bounds, best)
    doubts = _doubts(best, intervals, gain=gain, last=max(places), bounds=bounds, start=start)
    if any(collapse(run, metric) for run in arm.runs if run.failure is None):
        doubts.insert(0, "a run collapsed, which this curve cannot show")
    return Fit(
        arm=arm.name, start=start, parameters=best, intervals=intervals, resampled=resampled,
        residual=_residual(seeds, start, best),
        doubt=f"the data do not identify the curve: {', and '.join(doubts)}" if doubts else None,
    )  # fmt: skip


def _points(line: Sequence[Sequence[float]]) -> Points | None:
    _, _, tokens, _, values = line
    if not tokens or tokens[0] != 0:
        return None
    return Points(values[0], tuple(tokens[1:]), tuple(values[1:]))


def _bounds(first: float, last: float, start: float, max_level: float) -> tuple[tuple[float, float], ...]:
    """Bounds of A, log B and log C_mid: the two positive parameters are searched over their logarithms."""
    steepness = (math.log(_STEEPNESS[0]), math.log(_STEEPNESS[1]))
    return (min(0.0, start) + 1e-9, max_level), steepness, (math.log(first / _REACH), math.log(last * _REACH))


def _grid(start: float, gain: float, places: set[float], max_level: float) -> list[tuple[float, float, float]]:
    """Starting points of the search: a single one ends in a local minimum now and then."""
    ordered = sorted(places)
    ceilings = (min(start + 1.05 * gain, max_level), min(start + 2 * gain, max_level))
    middles = (ordered[len(ordered) // 10], ordered[len(ordered) // 2], 2 * ordered[-1])
    return [(a, math.log(b), math.log(c)) for a in ceilings for b in (0.7, 2.0) for c in middles]


def _least_squares(
    seeds: Sequence[Points], bounds: Sequence[tuple[float, float]], beginnings: Sequence[tuple[float, float, float]]
) -> Parameters:
    import numpy as np
    from scipy.optimize import least_squares

    start = math.fsum(p.start for p in seeds) / len(seeds)
    logs = np.log(np.concatenate([p.compute for p in seeds]))
    values = np.concatenate([p.values for p in seeds])

    def share(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exponent = np.clip(np.exp(x[1]) * (logs - x[2]), -700, 700)
        return 1 / (1 + np.exp(-exponent)), exponent

    def residuals(x: np.ndarray) -> np.ndarray:
        return start + (x[0] - start) * share(x)[0] - values

    def jacobian(x: np.ndarray) -> np.ndarray:
        s, exponent = share(x)
        inner = (x[0] - start) * s * (1 - s)
        return np.stack([s, inner * exponent, -inner * np.exp(x[1])], axis=1)

    low, high = np.array(bounds).T
    found = [
        least_squares(
            residuals,
            np.clip(x, low, high),
            jac=jacobian,  # type: ignore[arg-type]  # scipy has no types, and its default is a text
            bounds=(low, high),
            method="dogbox",  # steps along active bounds, where the reflective method creeps
            x_scale=(0.1, 0.5, 0.5),
            ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=300,
        )
        for x in beginnings
    ]  # fmt: skip
    ceiling, steepness, midpoint = min(found, key=lambda result: result.cost).x
    return Parameters(float(ceiling), math.exp(steepness), math.exp(midpoint))


def _intervals(
    seeds: Sequence[Points], bounds: Sequence[tuple[float, float]], best: Parameters
) -> tuple[Interval, Interval, Interval]:
    """Percentile bootstrap over seeds, or over the points of a single seed."""
    import numpy as np

    rng = np.random.default_rng(0)
    size = len(seeds) if len(seeds) > 1 else len(seeds[0].compute)
    beginning = [(best.ceiling, math.log(best.steepness), math.log(best.midpoint))]
    fits: dict[tuple[int, ...], Parameters] = {}
    draws = []
    for _ in range(_RESAMPLES):
        # The order does not matter: 3 seeds have 10 different samples, not 300.
        draw = tuple(sorted(rng.integers(0, size, size).tolist()))
        if draw not in fits:
            fits[draw] = _least_squares(_resample(seeds, draw), bounds, beginning)
        draws.append(fits[draw])
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.array(draws), (tail, 100 - tail), axis=0)
    first, second, third = (Interval(float(a), float(b)) for a, b in zip(low, high, strict=True))
    return first, second, third


def _resample(seeds: Sequence[Points], draw: Sequence[int]) -> list[Points]:
    if len(seeds) > 1:
        return [seeds[i] for i in draw]
    only = seeds[0]
    return [Points(only.start, tuple(only.compute[i] for i in draw), tuple(only.values[i] for i in draw))]


def _doubts(
    best: Parameters, intervals: Sequence[Interval], *, gain: float, last: float, bounds: Sequence[tuple[float, float]],
    start: float,
) -> list[str]:  # fmt: skip
    doubts = []
    if best.midpoint > last:
        half = f"half of the gain lies at {best.midpoint:.3g} tokens, the data end at {last:.3g}"
        doubts.append(f"it has not bent yet ({half})")
    ceiling = intervals[0]
    if ceiling.high - ceiling.low > gain / 2:
        ends = f"{number(ceiling.low)} to {number(ceiling.high)}"
        doubts.append(f"the ceiling could be {ends}, wider than half of the gain of {number(gain)}")
    searched: tuple[tuple[str, float, str], ...] = (
        ("the ceiling", best.ceiling, number(best.ceiling)),
        ("B", math.log(best.steepness), number(best.steepness)),
        ("C_mid", math.log(best.midpoint), f"{best.midpoint:.3g} tokens"),
    )
    for (name, value, text), (low, high) in zip(searched, bounds, strict=True):
        # A curve that came close to the highest level may well have it as its ceiling.
        expected = name == "the ceiling" and start + 1.1 * gain >= high
        if min(value - low, high - value) < 1e-6 * (high - low) and not expected:
            doubts.append(f"{name} ends at the bound of its search, {text}")
    return doubts


def _residual(seeds: Sequence[Points], start: float, best: Parameters) -> float:
    import numpy as np

    gaps = [scaling_curve(np.array(p.compute), start, best) - np.array(p.values) for p in seeds]
    return float(np.sqrt(np.mean(np.concatenate(gaps) ** 2)))
