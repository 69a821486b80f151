"""A comparison's conclusions: intervals with the coverage they claim, sentences that claim no more than the seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest

from cispo.compare.comparison import ArmResult, Comparison, RunResult, collapse, summarise
from cispo.compare.results import assert_equal, results
from cispo.compare.statistics import (
    BOOTSTRAP_COVERAGE,
    Verdict,
    average,
    bootstrap_band,
    bootstrap_interval,
    difference,
    estimate,
    first_reach,
    median_with_never,
    number,
    student_interval,
)
from cispo.errors import UserError

METRIC = "eval/accuracy"


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run(
    seed: int, values: Sequence[float], *, failure: str | None = None, stderr: float | None = None, every: int = 100
) -> RunResult:
    history = []
    for step, value in enumerate(values):
        row = {"step": step, "total/completions": step * every, "total/tokens": step * every * 10}
        row |= {"total/updates": step, "total/seconds": step * 2.0, METRIC: value}
        history.append(row | ({f"{METRIC}_stderr": stderr} if stderr is not None else {}))
    return RunResult(seed=seed, history=history, failure=failure, seconds=9.0)


def arm(name: str, finals: Sequence[float], **options: object) -> ArmResult:
    return ArmResult(name=name, runs=[run(s, (0.2, (0.2 + f) / 2, f), **options) for s, f in enumerate(finals)])  # type: ignore[arg-type]


def compare(*arms: ArmResult, metric: str = METRIC, seeds: int = 5) -> Comparison:
    return Comparison(
        name="test", metric=metric, arms=arms, seeds=range(seeds), command="cispo compare x", machine="2 cores"
    )


def pair(ours: Sequence[float], theirs: Sequence[float]):
    return difference("a", "b", "final", label="m", ours=dict(enumerate(ours)), theirs=dict(enumerate(theirs)))


# ------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_have_the_coverage_they_claim(n: int):
    """2,500 comparisons of n normal differences around 1."""
    values = np.random.default_rng(n).normal(1, 2, (n, 2500))
    low, high = bootstrap_band(values)
    bootstrap = (low <= 1) & (high >= 1)
    student = np.array([not student_interval(column.tolist()).excludes(1) for column in values.T])
    assert student.mean() == pytest.approx(0.95, abs=0.015)
    assert 100 * bootstrap.mean() == pytest.approx(BOOTSTRAP_COVERAGE[n], abs=2.5)
    assert bootstrap.mean() < 0.92, (
        "a percentile bootstrap of few seeds covers too little, which is why it is not alone"
    )


def test_chance_is_called_a_difference_in_one_comparison_of_twenty_at_most():
    rng = np.random.default_rng(0)
    verdicts = [pair(rng.normal(size=3).tolist(), rng.normal(size=3).tolist()).verdict for _ in range(400)]
    wrong = sum(v in (Verdict.BETTER, Verdict.WORSE) for v in verdicts) / len(verdicts)
    assert 0.01 < wrong < 0.08


def test_pairing_takes_out_the_share_of_the_seeds():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 0.1, 5)
    theirs = 0.5 + shared + rng.normal(0, 0.005, 5)
    ours = 0.54 + shared + rng.normal(0, 0.005, 5)
    paired = pair(ours.tolist(), theirs.tolist())
    assert paired.verdict is Verdict.BETTER and paired.student and paired.student.low > 0.02
    assert pair(np.roll(ours, 1).tolist(), theirs.tolist()).verdict is Verdict.UNRESOLVED


def test_student_interval_by_hand():
    low, high = student_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)


def test_bootstrap_repeats_and_of_three_seeds_is_their_range():
    values = [0.1, 0.5, 0.2]
    assert bootstrap_interval(values) == bootstrap_interval(values) == pytest.approx((0.1, 0.5))


def test_estimates():
    one = estimate([0.1, 0.5, 0.5, 0.5, 0.9])
    assert one and one.mean == pytest.approx(0.5) and one.interquartile_mean == 0.5 and one.count == 5
    outlier = estimate([0.5, 0.5, 0.5, 0.0])
    assert outlier and outlier.mean == 0.375 and outlier.interquartile_mean == 0.5
    equal = estimate([0.3, 0.3, 0.3])
    assert equal and equal.mean == pytest.approx(0.3) and equal.mean_interval is None
    assert estimate([]) is None
    with pytest.raises(AssertionError, match="finite"):
        estimate([0.1, math.nan])


def test_sentences_of_one_pair():
    better = pair([0.9, 0.91, 0.92], [0.5, 0.52, 0.51])
    assert better.verdict is Verdict.BETTER
    assert (
        better.sentence.startswith("a - b = +0.400 in m, 95% interval 0.3")
        and "bootstrap 0.390..0.410" in better.sentence
    )
    assert better.sentence.endswith(": a is better")
    assert pair([0.5, 0.52, 0.51], [0.9, 0.91, 0.92]).sentence.endswith(": a is worse")
    # The bootstrap alone leaves out 0 here, which is not enough.
    open_ = pair([0.51, 0.53, 0.59], [0.5, 0.5, 0.5])
    assert open_.bootstrap and open_.bootstrap.low > 0 and open_.student and open_.student.low < 0
    assert open_.sentence.endswith(": not resolved with 3 seeds")


def test_differences_without_spread():
    equal = pair([0.5, 0.7], [0.5, 0.7])
    assert equal.verdict is Verdict.EQUAL and equal.sentence == "a - b = 0 in m: exactly equal in each of 2 seeds"
    constant = pair([0.5 + 0.1, 0.7 + 0.1, 0.2 + 0.1], [0.5, 0.7, 0.2])  # equal up to rounding
    assert constant.verdict is Verdict.NO_INTERVAL and "without spread" in constant.sentence
    alone = pair([0.6], [0.5])
    assert alone.verdict is Verdict.NO_INTERVAL and "1 seed: there is no interval" in alone.sentence
    none = difference("a", "b", "final", label="m", ours={0: 1.0}, theirs={1: 1.0})
    assert none.verdict is Verdict.NOTHING and none.mean is None


def test_numbers():
    assert number(-0.0001, 2, sign=True).startswith("-1.00e-04") and number(0.0) == "0.000"
    assert number(0.04, sign=True) == "+0.040" and number(-1.5) == "-1.500" and number(2.5e9) == "2.50e+09"


def test_reach_average_and_median():
    x, y = (0.0, 10.0, 20.0), (0.0, 1.0, 0.0)
    assert first_reach(x, y, 0.5) == 5 and first_reach(x, y, 0) == 0 and first_reach(x, y, 1.1) is None
    assert average(x, y, 20) == 0.5 and average(x, y, 10) == 0.5 and average(x, y, 15) == pytest.approx(8.75 / 15)
    assert average(x, y, 25) is None and average(x, y, 0) == 0 and average((5.0, 10.0), (1.0, 3.0), 10) == 1.5
    assert median_with_never([3.0, None, 1.0]) == 3 and median_with_never([1.0, None]) is None


# ------------------------------------------------------------------------------------------------------- comparison


def test_a_clear_and_a_broken_arm():
    rng = np.random.default_rng(3)
    reference, good, broken = (rng.normal(mean, 0.01, 5).tolist() for mean in (0.7, 0.8, 0.1))
    summary = summarise(compare(arm("grpo", reference), arm("cispo", good), arm("broken", broken, stderr=0.02)))
    assert summary.verdicts[0].endswith("cispo is better") and summary.verdicts[1].endswith("broken is worse")
    assert {d.verdict for d in summary.differences if d.arm == "cispo"} == {Verdict.BETTER}
    assert summary.level == pytest.approx(np.mean(reference))
    cispo, fallen = summary.arms[1], summary.arms[2]
    assert cispo.reached == 5 and cispo.tokens_to_reference and 1000 < cispo.tokens_to_reference < 2000
    assert cispo.seconds_to_reference == pytest.approx(cispo.tokens_to_reference / 500)
    assert fallen.reached == 0 and fallen.tokens_to_reference is None and fallen.collapsed == 5


def test_failed_runs_are_left_out_and_named():
    values = [0.70, 0.71, 0.73, 0.72]
    runs = [*arm("cispo", [v + 0.1 for v in values]).runs[:3], run(3, (0.2, 0.3), failure="out of memory.")]
    summary = summarise(compare(arm("grpo", values), ArmResult(name="cispo", runs=runs), seeds=5))
    final = summary.differences[0]
    assert final.seeds == (0, 1, 2) and final.sentence.endswith("left out, as not finished in both: seed 3")
    assert summary.span == 200, "a failed run does not shorten the span of the others' averages"
    assert summary.arms[1].runs[3].auc is None and summary.arms[1].estimates["final"].count == 3  # type: ignore[union-attr]
    text = " ".join(summary.remarks)
    assert "cispo failed in 1 of 4 seeds (seed 3: out of memory)" in text and "has no run for seed 4" in text


def test_an_arm_in_which_every_run_failed():
    lost = ArmResult(name="ppo", runs=[run(0, (0.2,), failure="crashed"), run(1, (0.2,), failure="crashed")])
    for arms in ((arm("grpo", [0.6, 0.7]), lost), (lost, arm("grpo", [0.6, 0.7]))):
        summary = summarise(compare(*arms, seeds=2))
        assert "nothing to compare" in summary.verdicts[0]
        assert results(summary)["differences"][0]["mean"] is None


def test_equal_arms_and_one_seed_and_one_arm():
    same = [0.5, 0.7, 0.6]
    summary = summarise(compare(arm("grpo", same), arm("cispo", same), seeds=3))
    assert all(d.verdict is Verdict.EQUAL for d in summary.differences)
    assert "exactly equal in each of 3 seeds" in summary.verdicts[0] and not summary.remarks
    assert "1 seed" in summarise(compare(arm("grpo", [0.5]), arm("cispo", [0.6]), seeds=1)).verdicts[0]
    assert "ends at 0.600" in summarise(compare(arm("grpo", same), seeds=3)).verdicts[0]


def test_unequal_lengths_are_said():
    long = ArmResult(name="cispo", runs=[run(0, (0.2, 0.3, 0.5, 0.6))])
    assert (
        "not equally long: 200 to 300 completions" in summarise(compare(arm("grpo", [0.5]), long, seeds=1)).remarks[0]
    )


def test_a_metric_that_nobody_logged():
    with pytest.raises(UserError, match=r"arm 'grpo' logged the metric 'eval/acuracy'; did you mean 'eval/accuracy'"):
        summarise(compare(arm("grpo", [0.5]), metric="eval/acuracy"))
    with pytest.raises(AssertionError, match="not finite"):
        summarise(compare(arm("grpo", [math.nan])))


@pytest.mark.parametrize(
    ("values", "collapsed"),
    [
        ((0.2, 0.8, 0.1), True),
        ((0.2, 0.8, 0.45), True),
        ((0.2, 0.8, 0.55), False),  # keeps more than half of its gain
        ((0.2, 0.25, 0.2), False),  # within noise
        ((0.5, 0.4, 0.1), True),  # never gained, and lost its start
        ((0.2, 0.5, 0.8), False),
    ],
)
def test_collapse(values: tuple[float, ...], collapsed: bool):
    assert (collapse(run(0, values, stderr=0.025), METRIC) is not None) == collapsed


def test_noise_is_not_called_a_collapse():
    rng = np.random.default_rng(0)
    flat = [run(0, rng.normal(0.5, 0.025, 20).tolist(), stderr=0.025) for _ in range(500)]
    assert sum(collapse(one, METRIC) is not None for one in flat) / len(flat) < 0.06


def test_assert_equal_finds_what_changed():
    import json

    arms = arm("grpo", [0.5, 0.7]), arm("cispo", [0.6, 0.9])
    stored = json.loads(json.dumps(results(summarise(compare(*arms, seeds=2)))))
    found = results(summarise(compare(*arms, seeds=2)))
    found["arms"]["grpo"]["seeds"]["0"]["seconds_to_reference"] = 1e9
    assert assert_equal(found, stored) == []
    other = arms[0], ArmResult(name="cispo", runs=[arms[1].runs[0], run(1, (0.2, 0.55, 0.9 - 1e-12))])
    lines = assert_equal(results(summarise(compare(*other, seeds=2))), stored)
    assert lines and all(line.startswith("cispo, seed 1: ") for line in lines)
    assert any("at step 2, stored is 0.9 at step 2" in line for line in lines)
    renamed = arms[0], ArmResult(name="ppo", runs=arms[1].runs[:1])
    lines = assert_equal(results(summarise(compare(*renamed, seeds=2))), stored)
    assert "arm 'cispo' is only stored" in lines and "arm 'ppo' is not stored" in lines
