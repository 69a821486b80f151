"""ScaleRL's curve: found again from its own points, and refused where the points do not tell."""

from __future__ import annotations

import numpy as np
import pytest

from cispo.compare.comparison import ArmResult, RunResult
from cispo.compare.scaling import Parameters, fit_arm, scaling_curve

TRUE = Parameters(ceiling=0.61, steepness=1.92, midpoint=2542.0)
COMPUTE = np.array([0, 300, 800, 1500, 2542, 4000, 6000, 9000, 14000, 20000, 40000], dtype=float)


def arm(*curves: np.ndarray, compute: np.ndarray = COMPUTE) -> ArmResult:
    def run(seed: int, values: np.ndarray) -> RunResult:
        totals = ("total/completions", "total/tokens", "total/seconds", "total/updates")
        history = [
            {"step": step, "m": float(value), **dict.fromkeys(totals, float(c))}
            for step, (c, value) in enumerate(zip(compute, values, strict=True))
        ]
        return RunResult(seed=seed, history=history, seconds=1.0)

    return ArmResult(name="cispo", runs=[run(seed, values) for seed, values in enumerate(curves)])


def noisy(seeds: int, *, compute: np.ndarray = COMPUTE, noise: float = 0.01, true: Parameters = TRUE) -> ArmResult:
    rng = np.random.default_rng(2)
    clean = scaling_curve(compute, 0.2, true)
    return arm(*(clean + rng.normal(0, noise, len(compute)) for _ in range(seeds)), compute=compute)


def test_the_curve_itself():
    values = scaling_curve(np.array([0, 1000, 2542, 5000, 16000, 100000]), 0.2, TRUE)
    assert values == pytest.approx([0.2, 0.258596, 0.405, 0.522113, 0.598351, 0.609645], abs=1e-6)


def test_noiseless_points_give_the_parameters_back():
    fit = fit_arm(arm(scaling_curve(COMPUTE, 0.2, TRUE)), "m")
    assert fit.parameters == pytest.approx(TRUE, rel=1e-9) and fit.doubt is None
    assert fit.residual == pytest.approx(0, abs=1e-12) and fit.resampled == "points" and fit.start == 0.2


@pytest.mark.parametrize("seeds", [1, 8])
def test_noise_stays_within_the_intervals(seeds: int):
    fit = fit_arm(noisy(seeds), "m")
    assert fit.intervals and fit.parameters and fit.doubt is None
    assert fit.resampled == ("points" if seeds == 1 else "seeds")
    for true, interval in zip(TRUE, fit.intervals, strict=True):
        assert interval.low < true < interval.high
        assert interval.high - interval.low < 0.5 * true
    assert fit.residual == pytest.approx(0.01, rel=0.4)


def test_the_same_data_give_the_same_intervals():
    assert fit_arm(noisy(3), "m") == fit_arm(noisy(3), "m")


def test_a_curve_that_has_not_bent():
    fit = fit_arm(noisy(3, compute=np.linspace(0, 1800, 12)), "m")
    assert (
        fit.doubt and fit.doubt.startswith("the data do not identify the curve: ") and "has not bent yet" in fit.doubt
    )


def test_a_straight_line_ends_at_a_bound():
    compute = np.linspace(0, 2000, 11)
    fit = fit_arm(arm(0.2 + compute / 1e4, compute=compute), "m", max_level=0.9)
    assert fit.doubt and "bound" in fit.doubt


def test_a_ceiling_that_was_reached_is_no_doubt():
    fit = fit_arm(noisy(4, noise=0.002, true=Parameters(1.0, 1.9, 2000.0)), "m")
    assert fit.parameters and fit.parameters.ceiling > 0.99 and fit.doubt is None


def test_what_cannot_be_fitted():
    few = COMPUTE[:5]
    assert "5 evaluations" in (fit_arm(arm(scaling_curve(few, 0.2, TRUE), compute=few), "m").doubt or "")
    assert "did not rise" in (fit_arm(arm(np.full(11, 0.2)), "m").doubt or "")
    assert "did not rise" in (fit_arm(arm(np.linspace(0.5, 0.1, 11)), "m").doubt or "")
    late = arm(scaling_curve(COMPUTE[1:], 0.2, TRUE), compute=COMPUTE[1:])
    assert "before training" in (fit_arm(late, "m").doubt or "")


def test_a_collapsed_run_is_a_doubt():
    clean = scaling_curve(COMPUTE, 0.2, TRUE)
    fallen = clean.copy()
    fallen[-3:] = 0.05
    fit = fit_arm(arm(clean, clean + 0.01, fallen), "m")
    assert fit.doubt and "a run collapsed" in fit.doubt
