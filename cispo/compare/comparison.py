"""Several algorithms (arms) x seeds on one task: the measurements, and the conclusions drawn from them.

RunResult -> ArmResult -> Comparison        plain data, filled by command.py
summarise(Comparison) -> Summary            numbers per run and arm, differences from the first arm, sentences
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cispo.compare.statistics import (
    Difference,
    Estimate,
    average,
    difference,
    estimate,
    first_reach,
    median_with_never,
    number,
    seeds_text,
)
from cispo.errors import RunError, UserError

Measure = Literal["final", "best", "auc"]
MEASURES: dict[Measure, str] = {"final": "final {}", "best": "best {}", "auc": "average {} over the run"}
"""The numbers of a run by which arms are compared; the verdict is about the first."""

DroppedToken = Mapping[str, int | str]
"""A row of dropped_tokens.json: token, id, count, kept and {ppo,dapo}_dropped_{pos,neg}adv."""

# A fall counts beyond this many standard errors of an evaluation. Of runs of 20 evaluations around a constant, two
# would call 3 in 10 collapsed and four call 3 in 100; both see a lost gain of ten standard errors.
_FALL_STDERRS = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One arm with one seed."""

    seed: int
    history: Sequence[Mapping[str, float]]
    """Rows of metrics.jsonl. Step 0 is the evaluation before training; every row has total/{completions,tokens,...}."""
    seconds: float
    failure: str | None = None
    """The error that ended the run, in a sentence; its history ends there."""
    dropped_tokens: Sequence[DroppedToken] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    name: str
    runs: Sequence[RunResult]
    words: Sequence[tuple[str, str]] = ()
    """(item, words) rows that describe the algorithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    name: str
    metric: str
    """Higher is better."""
    arms: Sequence[ArmResult]
    """The first is the reference."""
    seeds: Sequence[int]
    """As planned."""
    command: str
    machine: str
    notes: Sequence[str] = ()


class Curve(NamedTuple):
    """A metric over one run, where it was logged."""

    steps: tuple[float, ...]
    completions: tuple[float, ...]
    tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The numbers of one run; None where the run has no value for them."""

    seed: int
    seconds: float
    curve: Curve
    final: float | None
    best: float | None
    auc: float | None
    tokens_to_reference: float | None
    seconds_to_reference: float | None
    failure: str | None
    collapse: str | None
    """How it fell, or None. A failed run counts as collapsed too."""

    @property
    def collapsed(self) -> bool:
        return self.failure is not None or self.collapse is not None

    def measures(self) -> dict[Measure, float | None]:
        return {"final": self.final, "best": self.best, "auc": self.auc}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSummary:
    """The runs of an arm, and the estimates over those that finished."""

    name: str
    runs: tuple[RunSummary, ...]
    estimates: Mapping[Measure, Estimate | None]
    tokens_to_reference: float | None
    """Median over all runs, infinite for a run that never arrives; None where the median is infinite."""
    seconds_to_reference: float | None
    reached: int

    @property
    def collapsed(self) -> int:
        return sum(run.collapsed for run in self.runs)

    @property
    def failed(self) -> int:
        return sum(run.failure is not None for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    comparison: Comparison
    level: float | None
    """The level of `tokens_to_reference`: the mean final value of the reference arm."""
    span: float | None
    """Completions up to which curves are averaged: as many as every finished run sampled."""
    arms: tuple[ArmSummary, ...]
    differences: tuple[Difference, ...]
    """arm - reference, for each arm after the first and each measure."""
    verdicts: tuple[str, ...]
    """A sentence for each arm after the first."""
    remarks: tuple[str, ...]
    """Sentences about failures and other caveats."""


def curve(run: RunResult, metric: str) -> Curve:
    """The rows that have `metric`."""
    totals = ("total/completions", "total/tokens", "total/seconds")
    rows = [tuple(row[name] for name in ("step", *totals, metric)) for row in run.history if metric in row]
    assert all(math.isfinite(v) for row in rows for v in row), f"seed {run.seed}: {metric} or a total is not finite"
    return Curve(*zip(*rows, strict=True)) if rows else Curve((), (), (), (), ())


def collapse(run: RunResult, metric: str) -> str | None:
    """How the run fell, or None: `COLLAPSE` is the definition."""
    line = curve(run, metric)
    if not line.values:
        return None
    errors = [row[f"{metric}_stderr"] for row in run.history if metric in row and f"{metric}_stderr" in row]
    best, final = max(line.values), line.values[-1]
    fall = best - final
    if fall <= max((best - line.values[0]) / 2, _FALL_STDERRS * max(errors, default=0.0)):
        return None
    at = line.steps[line.values.index(best)]
    return f"{number(best)} at step {at:.0f}, {number(final)} at step {line.steps[-1]:.0f}"


COLLAPSE = (
    "A run collapsed if it ended with an error, or if its last evaluation lies below its best one by more than half of "
    f"the best one's gain over the start and by more than {_FALL_STDERRS:.0f} standard errors of an evaluation (so "
    "that noise is not called a collapse; where no standard error is logged, it can be)."
)


def summarise(comparison: Comparison) -> Summary:
    """All numbers and sentences of a comparison.

    Means and differences are over runs that finished: a run that ended with an error has no final value.

    Raises:
        UserError: no run of an arm logged the metric.
    """
    metric, arms = comparison.metric, comparison.arms
    assert arms and len({arm.name for arm in arms}) == len(arms), "arms need names of their own"
    for arm in arms:
        assert len({run.seed for run in arm.runs}) == len(arm.runs), f"{arm.name}: a seed appears twice"
        require_metric(arm, metric)
    finished = [curve(run, metric) for arm in arms for run in arm.runs if run.failure is None]
    span = min((line.completions[-1] for line in finished if line.values), default=None)
    reference = [curve(run, metric) for run in arms[0].runs if run.failure is None]
    finals = [line.values[-1] for line in reference if line.values]
    level = math.fsum(finals) / len(finals) if finals else None
    summaries = tuple(_arm(arm, metric, span, level) for arm in arms)
    differences = tuple(_difference(arm, summaries[0], name, metric) for arm in summaries[1:] for name in MEASURES)
    headline = next(iter(MEASURES))
    return Summary(
        comparison=comparison, level=level, span=span, arms=summaries, differences=differences,
        verdicts=tuple(d.sentence for d in differences if d.measure == headline) or (_alone(summaries[0], metric),),
        remarks=tuple(_remarks(comparison, summaries)),
    )  # fmt: skip


def require_metric(arm: ArmResult, metric: str) -> None:
    """Where no run of the arm logged the metric: raises RunError if one failed, else UserError with close names."""
    if any(metric in row for run in arm.runs for row in run.history):
        return
    names = sorted({name for run in arm.runs for row in run.history for name in row})
    close = difflib.get_close_matches(metric, names, n=3)
    hint = f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    sentence = f"no run of arm {arm.name!r} logged the metric {metric!r}"
    failures = [run.failure for run in arm.runs if run.failure]
    if failures:
        raise RunError(f"{sentence}: a run ended with: {failures[0]}; the same command runs it again")
    raise UserError(f"{sentence}{hint}")


def _arm(arm: ArmResult, metric: str, span: float | None, level: float | None) -> ArmSummary:
    runs = tuple(_run(run, metric, span, level) for run in sorted(arm.runs, key=lambda run: run.seed))
    finished = [run.measures() for run in runs if run.failure is None]
    return ArmSummary(
        name=arm.name,
        runs=runs,
        estimates={name: estimate([v for run in finished if (v := run[name]) is not None]) for name in MEASURES},
        tokens_to_reference=median_with_never([run.tokens_to_reference for run in runs]),
        seconds_to_reference=median_with_never([run.seconds_to_reference for run in runs]),
        reached=sum(run.tokens_to_reference is not None for run in runs),
    )


def _run(run: RunResult, metric: str, span: float | None, level: float | None) -> RunSummary:
    line = curve(run, metric)
    return RunSummary(
        seed=run.seed,
        seconds=run.seconds,
        curve=line,
        final=line.values[-1] if line.values else None,
        best=max(line.values, default=None),
        auc=None if span is None else average(line.completions, line.values, span),
        tokens_to_reference=None if level is None else first_reach(line.tokens, line.values, level),
        seconds_to_reference=None if level is None else first_reach(line.seconds, line.values, level),
        failure=run.failure,
        collapse=collapse(run, metric),
    )


def _difference(arm: ArmSummary, reference: ArmSummary, measure: Measure, metric: str) -> Difference:
    def finished(side: ArmSummary) -> dict[int, float]:
        values = {run.seed: run.measures()[measure] for run in side.runs if run.failure is None}
        return {seed: value for seed, value in values.items() if value is not None}

    ours, theirs = finished(arm), finished(reference)
    out = sorted({run.seed for side in (arm, reference) for run in side.runs} - (ours.keys() & theirs.keys()))
    note = f"; left out, as not finished in both: seed {', '.join(map(str, out))}" if out and ours and theirs else ""
    label = MEASURES[measure].format(metric)
    return difference(arm.name, reference.name, measure, label=label, ours=ours, theirs=theirs, note=note)


def _alone(arm: ArmSummary, metric: str) -> str:
    final = arm.estimates["final"]
    if final is None:
        return f"{arm.name}: no run finished"
    mean = f"{number(final.mean)} {metric} (mean of {seeds_text(final.count)})"
    return f"{arm.name} ends at {mean}; there is no other arm to compare it with"


def _remarks(comparison: Comparison, arms: Sequence[ArmSummary]) -> Iterable[str]:
    for arm in arms:
        for kind, runs in (
            ("failed", [(run.seed, run.failure) for run in arm.runs if run.failure is not None]),
            ("collapsed", [(run.seed, run.collapse) for run in arm.runs if run.failure is None and run.collapse]),
        ):
            if runs:
                listed = "; ".join(f"seed {seed}: {(why or '').rstrip('. ')}" for seed, why in runs)
                left = ""
                if kind == "failed" and len(runs) < len(arm.runs):
                    left = " Its means are over the other seeds, which favours it."
                yield f"{arm.name} {kind} in {len(runs)} of {seeds_text(len(arm.runs))} ({listed}).{left}"
        missing = sorted(set(comparison.seeds) - {run.seed for run in arm.runs})
        if missing:
            yield f"{arm.name} has no run for seed {', '.join(map(str, missing))}, which was planned."
        silent = [run.seed for run in arm.runs if run.failure is None and not run.curve.values]
        if silent:
            yield f"{arm.name} did not log {comparison.metric} with seed {', '.join(map(str, silent))}."
    ends = {(len(run.curve.values), run.curve.completions[-1]) for arm in arms for run in arm.runs
            if run.failure is None and run.curve.values}  # fmt: skip
    if len(ends) > 1:
        parts = []
        for values, unit in (({total for _, total in ends}, "completions"), ({n for n, _ in ends}, "evaluations")):
            if len(values) > 1:
                parts.append(f"{min(values):.0f} to {max(values):.0f} {unit}")
        yield (
            f"The finished runs are not equally long: {' and '.join(parts)}. "
            "A longer run has more chances for a best value."
        )
