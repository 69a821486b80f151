"""Tables of `study_report.py`: the runs, the measures of each arm and regime, ScaleRL's curve, the tokens without
gradient."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from study_plan import ARMS, Regime
from study_report import (
    LEAST_SEEDS,
    LEVEL,
    MEASURES,
    METRIC,
    RARE,
    Row,
    Run,
    Runs,
    best,
    covered,
    drops,
    regime_name,
    values_of,
)

from cispo.compare.comparison import ArmResult
from cispo.compare.scaling import fit_arm
from cispo.compare.statistics import median_with_never, student_interval


def tables(study: Mapping[tuple[str, Regime], Runs], rows: Sequence[Row]) -> Iterator[str]:
    total = sum(1 for arms in study.values() for _ in runs_of(arms))
    yield f"{total} runs; {sum(row.p is not None for row in rows)} comparisons, false discovery rate {LEVEL}."
    yield from run_table(study)
    for policy in dict.fromkeys(policy for policy, _ in study):
        regimes = {regime: runs for (name, regime), runs in study.items() if name == policy}
        for measure, label in MEASURES.items():
            own = {(row.regime, row.found.arm): row for row in rows if (row.policy, row.measure) == (policy, measure)}
            cells = {
                (regime, arm): _cell(covered(runs)[arm], measure, own.get((regime, arm)))
                for regime, runs in regimes.items()
                for arm in ARMS
            }
            yield from _table(f"{policy}: {label}", list(regimes), cells)
        for title, cell in (
            ("steps until half of the completions are checked, median at each rate", _risen),
            ("mean final accuracy at each rate", _at_each_rate),
        ):
            cells = {(regime, arm): cell(runs[arm]) for regime, runs in regimes.items() for arm in ARMS}
            yield from _table(f"{policy}: {title}", list(regimes), cells)
        yield from fit_table(policy, regimes)
    yield from drop_table(study)


def runs_of(arms: Runs) -> Iterator[Run]:
    return (run for rates in arms.values() for seeds in rates.values() for run in seeds.values())


def run_table(study: Mapping[tuple[str, Regime], Runs]) -> Iterator[str]:
    """Machines, learning rates and seeds of every regime; n is that of each rate, over the arms that were run."""
    yield "\n### Runs\n"
    yield "| policy | regime | runs | learning rates (seeds an arm) | steps | machine | median seconds a run |"
    yield "|---|---|---|---|---|---|---|"
    for (policy, regime), arms in study.items():
        runs = list(runs_of(arms))
        rates = []
        for lr in sorted({lr for own in arms.values() for lr in own}):
            counts = [len(own[lr]) for own in arms.values() if own[lr]]
            least, most = min(counts), max(counts)
            rates.append(f"{lr:g} ({least if least == most else f'{least} to {most}'})")
        steps = "/".join(str(n) for n in sorted({round(run.result["history"][-1]["step"]) for run in runs}))
        machines = ", ".join(sorted({_machine(run.result.get("machine", "")) for run in runs}))
        seconds = statistics.median(run.result["seconds"] for run in runs)
        yield (
            f"| {policy} | {regime_name(regime)} | {len(runs)} | {', '.join(rates)} | {steps} | {machines} | "
            f"{seconds:.0f} |"
        )


def _machine(words: str) -> str:
    """ "16 cores, NVIDIA H200" of a result's machine."""
    _, *parts = [part for part in words.split(", ") if part != "no GPU" and not part.startswith("torch")]
    return ", ".join(parts)


def fit_table(policy: str, regimes: Mapping[Regime, Runs]) -> Iterator[str]:
    """The ceiling of ScaleRL's curve and its 95 % interval where the runs identify it."""
    doubts: dict[str, int] = {}
    cells = {}
    for regime, runs in regimes.items():
        for arm in ARMS:
            cells[regime, arm], doubt = _fit(arm, best(covered(runs)[arm]))
            if doubt:
                doubts[doubt] = doubts.get(doubt, 0) + 1
    yield from _table(f"{policy}: ceiling of ScaleRL's curve", list(regimes), cells)
    for doubt, count in sorted(doubts.items(), key=lambda pair: -pair[1]):
        yield f"\n{count} not identified: {doubt}."


def _fit(arm: str, runs: Sequence[Run]) -> tuple[str, str | None]:
    """A cell, and the kind of doubt."""
    if not runs:
        return "not run", None
    fit = fit_arm(ArmResult(name=arm, runs=[run.as_run for run in runs]), METRIC)
    if fit.doubt is None and fit.parameters is not None and fit.intervals is not None:
        low, high = fit.intervals[0]
        return f"{fit.parameters.ceiling:.2f} [{low:.2f}..{high:.2f}], n={len(runs)}", None
    kinds = {
        "evaluations": "fewer than five evaluations",
        "collapsed": "a run collapsed",
        "did not rise": "accuracy did not rise",
        "not bent": "the curve has not bent yet",
        "the ceiling could be": "the ceiling's interval is wider than half of the gain",
    }
    return "not identified", next((k for word, k in kinds.items() if word in str(fit.doubt)), "an end of the search")


def _table(title: str, regimes: Sequence[Regime], cells: Mapping[tuple[Regime, str], str]) -> Iterator[str]:
    yield f"\n### {title}\n"
    yield f"| | {' | '.join(map(regime_name, regimes))} |"
    yield "|---|" + "---|" * len(regimes)
    for arm in ARMS:
        yield f"| {arm} | {' | '.join(cells[regime, arm] for regime in regimes)} |"


def _cell(runs: Mapping[float, Mapping[int, Run]], measure: str, row: Row | None) -> str:
    """ "0.712 (-0.020..+0.034, q 0.61)": mean, and the interval of the difference from the reference."""
    values = list(values_of(runs, measure).values())
    if not values:
        return "not run"
    mean = f"{math.fsum(values) / len(values):.3f} n={len(values)}"
    if row is None:
        if len(values) < LEAST_SEEDS or len(set(values)) < 2:
            return mean
        low, high = student_interval(values)
        return f"{mean} [{low:.3f}..{high:.3f}]"
    if row.p is None or row.found.student is None:
        return f"{mean} ({row.found.mean:+.3f})"
    span = f"{row.found.student.low:+.3f}..{row.found.student.high:+.3f}, q {row.q:.3f}"
    return f"**{mean} ({span})**" if row.word in ("better", "worse") else f"{mean} ({span})"


def _risen(runs: Mapping[float, Mapping[int, Run]]) -> str:
    cells = []
    for lr, seeds in sorted(runs.items()):
        if not seeds:
            continue
        middle = median_with_never([run.risen for run in seeds.values()])
        cells.append(f"{lr:g}: {'never' if middle is None else f'{middle:.1f}'}")
    return ", ".join(cells) or "not run"


def _at_each_rate(runs: Mapping[float, Mapping[int, Run]]) -> str:
    """ "0.0002: 0.323, 0.0004: 0.023 (5 of 5 collapsed)"."""
    cells = []
    for lr, seeds in sorted(runs.items()):
        if not seeds:
            continue
        lost = sum(run.collapsed for run in seeds.values())
        mean = statistics.fmean(run.final for run in seeds.values())
        cells.append(f"{lr:g}: {mean:.3f}" + (f" ({lost} of {len(seeds)} collapsed)" if lost else ""))
    return ", ".join(cells) or "not run"


def drop_table(study: Mapping[tuple[str, Regime], Runs]) -> Iterator[str]:
    """Marks | the other tokens; of the reference, which drops none, what PPO's band would have dropped."""
    yield f"\n### Percent of tokens without gradient while fewer than {RARE:.0%} of the completions are checked\n"
    yield "Marks / other tokens (number of marks), without the runs that collapsed.\n"
    yield f"| policy | regime | tokens | PPO's band in {ARMS[0]}'s runs | {' | '.join(ARMS[1:])} |"
    yield "|---|---|---|" + "---|" * len(ARMS)
    for (policy, regime), arms in study.items():
        for sign, words in (("pos", "A > 0"), ("neg", "A < 0")):
            cells = [_shares(arms[ARMS[0]], sign, "ppo_dropped")]
            cells += [_shares(arms[arm], sign, "dropped") for arm in ARMS[1:]]
            yield f"| {policy} | {regime_name(regime)} | {words} | {' | '.join(cells)} |"


def _shares(runs: Mapping[float, Mapping[int, Run]], sign: str, name: str) -> str:
    """ "91.9 / 5.0 (507)"."""
    (gone, marks), (others_gone, others) = (drops(runs, kind, sign, name) for kind in ("mark", "other"))
    if not others:
        return "none"
    return f"{f'{100 * gone / marks:.1f}' if marks else 'none'} / {100 * others_gone / others:.1f} ({marks:,})"
