"""Statistics of `bench_study.py --plot-only`; its tables are in `study_tables`, its figures in `study_figures`.

    results --Study--> policy, regime -> arm -> learning rate -> seed -> Run
    final --chosen--> a rate a seed, which the other seeds choose by their final accuracy
    arm - cispo, seed by seed --Student's t, false discovery rate over all of them--> better, worse, not resolved

The rate of a seed is the one with the best mean of the other seeds, so that no run chooses its own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_plan import ARMS, Regime, Task

from cispo.compare.comparison import RunResult, collapse
from cispo.compare.statistics import Difference, average, difference, first_reach

METRIC = "eval/accuracy"
LEVEL = 0.05
"""False discovery rate up to which a difference is called resolved."""
MEASURES = {
    "final": "final accuracy",
    "average": "average accuracy over the run",
    "checked": "share of completions with a check, average over the run",
}
"""Fields of Run by which arms are compared."""
RARE = 0.2
"""Share of marked completions below which the mark counts as rare."""

LEAST_SEEDS = 3
"""Of two seeds Student's t says next to nothing."""

# Any: the JSON of a result file.
Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    final: float
    average: float
    checked: float
    collapsed: bool
    risen: float | None
    """Training steps until half of the completions are marked."""
    result: Result
    as_run: RunResult


Runs = Mapping[str, Mapping[float, Mapping[int, Run]]]
"""Arm -> rate -> seed -> run."""


@dataclass(frozen=True, slots=True)
class Row:
    """arm - cispo."""

    policy: str
    regime: Regime
    measure: str
    found: Difference
    p: float | None
    q: float = math.nan
    """The smallest false discovery rate at which the difference is resolved."""

    @property
    def word(self) -> str:
        if self.p is None or self.found.mean is None:
            return "too few seeds"
        return "not resolved" if self.q > LEVEL else "better" if self.found.mean > 0 else "worse"


def study_of(found: Sequence[tuple[Task, Result]]) -> dict[tuple[str, Regime], Runs]:
    """The runs by policy and regime; every arm has every rate of its regime, with no seeds where it was not run."""
    tables: dict[tuple[str, Regime], dict[str, dict[float, dict[int, Run]]]] = {}
    for task, result in found:
        arms = tables.setdefault((task.policy, task.regime), {arm: {} for arm in ARMS})
        arms[task.arm].setdefault(task.lr, {})[task.seed] = _run(task, result)
    for arms in tables.values():
        for lr in sorted({lr for rates in arms.values() for lr in rates}):
            for rates in arms.values():
                rates.setdefault(lr, {})
    return {key: tables[key] for key in sorted(tables)}


def _run(task: Task, result: Result) -> Run:
    rows = [row for row in result["history"] if METRIC in row]
    done = [float(row["total/completions"]) for row in rows]
    values = [float(row[METRIC]) for row in rows]
    failure = "diverged" if result["status"] == "diverged" else None
    as_run = RunResult(seed=task.seed, history=result["history"], seconds=result["seconds"], failure=failure)
    steps = [float(step["step"]) for step in result["steps"]]
    return Run(
        final=values[-1],
        average=average(done, values, done[-1]) or values[-1],
        checked=statistics.fmean([step["marked"] for step in result["steps"]] or [0.0]),
        collapsed=failure is not None or collapse(as_run, METRIC) is not None,
        risen=first_reach(steps, [step["marked"] for step in result["steps"]], 0.5),
        result=result,
        as_run=as_run,
    )


def chosen(table: Mapping[float, Mapping[int, float]]) -> dict[int, float]:
    """Seed -> learning rate, from rate -> seed -> value, over the seeds that every rate has.

    A seed's rate is the one with the best mean of the other seeds; of a single seed its own best one.
    """
    seeds = sorted(set.intersection(*(set(values) for values in table.values()))) if table else []
    found = {}
    for seed in seeds:
        others = [other for other in seeds if other != seed] or [seed]
        found[seed] = max(table, key=lambda lr: math.fsum(table[lr][other] for other in others))
    return found


def covered(arms: Runs) -> Runs:
    """The runs without the rates that the time cut short; all arms keep the same rates.

    Those are rates with fewer than three seeds of an arm, where another rate has three of each.
    """
    fewest = {lr: min(len(rates[lr]) for rates in arms.values() if any(rates.values())) for lr in arms[ARMS[0]]}
    enough = {lr for lr, seeds in fewest.items() if seeds >= LEAST_SEEDS} or set(fewest)
    return {arm: {lr: seeds for lr, seeds in rates.items() if lr in enough} for arm, rates in arms.items()}


def values_of(runs: Mapping[float, Mapping[int, Run]], measure: str) -> dict[int, float]:
    """Seed -> the measure at the seed's rate."""
    rates = chosen({lr: {seed: run.final for seed, run in seeds.items()} for lr, seeds in runs.items()})
    return {seed: getattr(runs[rate][seed], measure) for seed, rate in rates.items()}


def best(runs: Mapping[float, Mapping[int, Run]]) -> list[Run]:
    """The runs at the rate with the best mean final accuracy."""
    means = {lr: statistics.fmean(run.final for run in seeds.values()) for lr, seeds in runs.items() if seeds}
    if not means:
        return []
    return list(runs[max(means, key=lambda lr: means[lr])].values())


def rows_of(study: Mapping[tuple[str, Regime], Runs]) -> list[Row]:
    """Every arm against the reference, with p and q; the false discovery rate is over all rows (Benjamini-Hochberg)."""
    rows = []
    for (policy, regime), every in study.items():
        arms = covered(every)
        for measure, label in MEASURES.items():
            reference = values_of(arms[ARMS[0]], measure)
            for arm in ARMS[1:]:
                ours = values_of(arms[arm], measure)
                if ours.keys() & reference.keys():
                    found = difference(arm, ARMS[0], measure, label=label, ours=ours, theirs=reference)
                    rows.append(Row(policy, regime, measure, found, p_value(found.values)))
    return adjusted(rows)


def p_value(values: Sequence[float]) -> float | None:
    """Two-sided, of Student's t test that the mean is 0; None of too few values or values without spread."""
    from scipy.stats import t

    if len(values) < LEAST_SEEDS or max(values) == min(values):
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(2 * t.sf(abs(statistics.fmean(values)) / error, len(values) - 1))


def adjusted(rows: Sequence[Row]) -> list[Row]:
    """The rows with q where they have p."""
    from scipy.stats import false_discovery_control

    tested = [row.p for row in rows if row.p is not None]
    q = iter(false_discovery_control(tested, method="bh") if tested else [])
    return [
        row if row.p is None else Row(row.policy, row.regime, row.measure, row.found, row.p, float(next(q)))
        for row in rows
    ]


def regime_name(regime: Regime) -> str:
    return f"{regime.updates} update{'s' * (regime.updates > 1)}, staleness {regime.staleness}"


def drops(runs: Mapping[float, Mapping[int, Run]], kind: str, sign: str, name: str) -> tuple[int, int]:
    """(dropped, all) trained tokens of a kind with that sign of the advantage, in the steps in which marks are rare.

    Runs that collapsed do not count: marks are rare there because the policy is lost.
    """
    gone = every = 0
    for run in (run for seeds in runs.values() for run in seeds.values() if not run.collapsed):
        for step in run.result["steps"]:
            counts = step["kinds"].get(kind)
            if counts and step["marked"] < RARE:
                gone += counts[f"{name}_{sign}"]
                every += counts[sign]
    return gone, every


def write_report(out: Path, found: Sequence[tuple[Task, Result]]) -> None:
    from study_figures import draw
    from study_tables import tables

    study = study_of(found)
    rows = rows_of(study)
    text = "\n".join(tables(study, rows)) + "\n"
    (out / "study.md").write_text(text)
    print(text)
    draw(out, study, rows)
