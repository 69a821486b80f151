"""results.json of a comparison, and its comparison with a stored one.

Summary --results--> Results --JSON--> results.json --assert_equal--> differences from a later run
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from cispo.compare.comparison import MEASURES, ArmSummary, Measure, RunSummary, Summary
from cispo.compare.statistics import Difference, Interval


class RunEntry(TypedDict):
    """One run in results.json."""

    final: float | None
    best: float | None
    auc: float | None
    curve: list[list[float]]
    """[step, value] pairs."""
    tokens_to_reference: float | None
    seconds_to_reference: float | None
    failure: str | None
    collapsed: bool


class ArmEntry(TypedDict):
    """One arm in results.json."""

    seeds: dict[str, RunEntry]
    mean: dict[Measure, float | None]
    interquartile_mean: dict[Measure, float | None]
    collapsed: int


class DifferenceEntry(TypedDict):
    """One difference in results.json: arm - reference in a measure."""

    arm: str
    reference: str
    measure: str
    seeds: list[int]
    values: list[float]
    mean: float | None
    student: list[float] | None
    bootstrap: list[float] | None
    verdict: str


class Results(TypedDict):
    """results.json of a comparison."""

    name: str
    metric: str
    command: str
    verdicts: list[str]
    remarks: list[str]
    arms: dict[str, ArmEntry]
    differences: list[DifferenceEntry]


class OverviewResults(TypedDict):
    """results.json over several settings: setting -> its comparison."""

    settings: dict[str, Results]


def results(summary: Summary) -> Results:
    """The content of results.json."""
    return Results(
        name=summary.comparison.name,
        metric=summary.comparison.metric,
        command=summary.comparison.command,
        verdicts=list(summary.verdicts),
        remarks=list(summary.remarks),
        arms={arm.name: _arm_entry(arm) for arm in summary.arms},
        differences=[_difference_entry(d) for d in summary.differences],
    )


def _arm_entry(arm: ArmSummary) -> ArmEntry:
    return ArmEntry(
        seeds={str(run.seed): _run_entry(run) for run in arm.runs},
        mean={name: value.mean if value else None for name, value in arm.estimates.items()},
        interquartile_mean={name: value.interquartile_mean if value else None for name, value in arm.estimates.items()},
        collapsed=arm.collapsed,
    )


def _run_entry(run: RunSummary) -> RunEntry:
    return RunEntry(
        final=run.final,
        best=run.best,
        auc=run.auc,
        curve=[list(point) for point in zip(run.curve.steps, run.curve.values, strict=True)],
        tokens_to_reference=run.tokens_to_reference,
        seconds_to_reference=run.seconds_to_reference,
        failure=run.failure,
        collapsed=run.collapsed,
    )


def _difference_entry(d: Difference) -> DifferenceEntry:
    def ends(interval: Interval | None) -> list[float] | None:
        return None if interval is None else list(interval)

    return DifferenceEntry(
        arm=d.arm, reference=d.reference, measure=d.measure, seeds=list(d.seeds), values=list(d.values), mean=d.mean,
        student=ends(d.student), bootstrap=ends(d.bootstrap), verdict=str(d.verdict),
    )  # fmt: skip


def assert_equal(found: Results, stored: Results) -> list[str]:
    """Differences of two `results`, a sentence each: metric values of every arm and seed, exactly.

    Wall-clock values, statistics and texts are not compared: the former vary, the latter follow from the values.
    """
    if found["metric"] != stored["metric"]:
        return [f"the metric is {found['metric']!r}, stored is {stored['metric']!r}"]
    lines = []
    for name in dict.fromkeys([*stored["arms"], *found["arms"]]):
        if name not in found["arms"] or name not in stored["arms"]:
            lines.append(f"arm {name!r} is {'only stored' if name in stored['arms'] else 'not stored'}")
            continue
        ours, theirs = found["arms"][name]["seeds"], stored["arms"][name]["seeds"]
        for seed in dict.fromkeys([*theirs, *ours]):
            if seed not in ours or seed not in theirs:
                lines.append(f"{name}, seed {seed} is {'only stored' if seed in theirs else 'not stored'}")
            else:
                lines += [f"{name}, seed {seed}: {line}" for line in _changes(ours[seed], theirs[seed])]
    return lines


def _changes(ours: RunEntry, theirs: RunEntry) -> Iterable[str]:
    if (ours["failure"] is None) != (theirs["failure"] is None):
        yield "it " + ("finished" if ours["failure"] is None else "failed") + ", unlike the stored run"
    for name in (*MEASURES, "tokens_to_reference"):
        if ours[name] != theirs[name]:
            yield f"{name} is {ours[name]!r}, stored is {theirs[name]!r}"
    if len(ours["curve"]) != len(theirs["curve"]):
        yield f"{len(ours['curve'])} evaluations, stored are {len(theirs['curve'])}"
    for (step, value), (stored_step, stored_value) in zip(ours["curve"], theirs["curve"], strict=False):
        if (step, value) != (stored_step, stored_value):
            yield f"{value!r} at step {step:.0f}, stored is {stored_value!r} at step {stored_step:.0f}"
            return
