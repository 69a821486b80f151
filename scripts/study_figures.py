"""Figures of `study_report.py`: curves a policy, dropped tokens, differences.

study_POLICY.png          accuracy over completions and tokens, checked completions over steps, a row a regime
study_tokens_POLICY.png   the tokens that a clip drops, their ratios, entropy
study_overview.png        accuracy over completions in the regimes of all policies, a column a policy
study_differences.png     every arm against the reference
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from study_plan import ARMS, Regime
from study_report import LEAST_SEEDS, LEVEL, METRIC, Result, Row, Runs, best, covered, drops, regime_name

from cispo.compare.figures import arm_style
from cispo.compare.statistics import bootstrap_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Seeds from which bands are bootstrap intervals; below, the lowest to the highest seed.
_BOOTSTRAP_FROM = 4
_TICKS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
Points = tuple[Sequence[float], Sequence[float]]


def draw(out: Path, study: Mapping[tuple[str, Regime], Runs], rows: Sequence[Row]) -> None:
    drawn = dict[str, Mapping[Regime, Runs]]()
    for policy in dict.fromkeys(name for name, _ in study):
        of_policy = {regime: covered(runs) for (name, regime), runs in study.items() if name == policy}
        tested = {regime: runs for regime, runs in of_policy.items() if len(best(runs[ARMS[0]])) >= LEAST_SEEDS}
        drawn[policy] = shown = tested or of_policy
        _save(_curves(shown), out / f"study_{policy}.png")
        _save(_tokens(of_policy, list(shown)), out / f"study_tokens_{policy}.png")
    if shared := set.intersection(*(set(regimes) for regimes in drawn.values())):
        _save(_overview(drawn, sorted(shared)), out / "study_overview.png")
    if any(row.p is not None for row in rows):
        _save(_differences(rows), out / "study_differences.png")


def _save(figure: Figure, file: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.savefig(file, dpi=130)


def of_history(name: str, over: str = "step") -> Callable[[Result], Points]:
    def points(result: Result) -> Points:
        rows = [row for row in result["history"] if name in row]
        return [row[over] for row in rows], [row[name] for row in rows]

    return points


def checked(result: Result) -> Points:
    return [step["step"] for step in result["steps"]], [step["marked"] for step in result["steps"]]


def _figure(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 3.1 * columns), 2.7 * rows + 0.5), layout="constrained")
    return figure, [
        [figure.add_subplot(rows, columns, r * columns + c + 1) for c in range(columns)] for r in range(rows)
    ]


def _legend(figure: Figure, arms: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], linewidth=2, **arm_style(ARMS.index(arm))) for arm in arms]
    figure.legend(lines, arms, loc="outside upper center", ncols=6, frameon=False, fontsize=9, handlelength=2.4)


def _lines(axis: Axes, arms: Runs, points: Callable[[Result], Points]) -> None:
    """Mean and band of each arm's runs at its best rate, up to the end of the shortest."""
    for arm in ARMS:
        curves = [curve for run in best(arms[arm]) if (curve := points(run.result))[0]]
        if not curves:
            continue
        end = min(x[-1] for x, _ in curves)
        grid = np.linspace(min(x[0] for x, _ in curves), end, 60)
        values = np.stack([np.interp(grid, x, y) for x, y in curves])
        style = arm_style(ARMS.index(arm))
        axis.plot(grid, values.mean(0), linewidth=1.7, **style)
        if len(curves) > 1:
            low, high = bootstrap_band(values) if len(curves) >= _BOOTSTRAP_FROM else (values.min(0), values.max(0))
            axis.fill_between(grid, low, high, color=style["color"], alpha=0.10, linewidth=0)
    axis.grid(color="#dddddd", linewidth=0.6)


def _accuracies(axis: Axes, arms: Runs, total: str) -> None:
    """Over sampled completions or tokens."""
    from matplotlib.ticker import EngFormatter

    _lines(axis, arms, of_history(METRIC, f"total/{total}"))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(f"sampled {total}", fontsize=8)
    axis.set_ylabel("held-out accuracy", fontsize=8)
    axis.set_ylim(0, 1.02)


def _overview(policies: Mapping[str, Mapping[Regime, Runs]], regimes: Sequence[Regime]) -> Figure:
    figure, axes = _figure(len(regimes), len(policies))
    for regime, places in zip(regimes, axes, strict=True):
        for axis, (policy, runs) in zip(places, policies.items(), strict=True):
            axis.set_title(f"{policy}, {regime.updates}:{regime.staleness}", fontsize=9, loc="left")
            _accuracies(axis, runs[regime], "completions")
    _legend(figure, ARMS)
    return figure


def _curves(regimes: Mapping[Regime, Runs]) -> Figure:
    """A row a regime, of those with seeds enough for a test where there are any."""
    figure, axes = _figure(len(regimes), 3)
    for (regime, arms), places in zip(regimes.items(), axes, strict=True):
        places[0].set_title(regime_name(regime), fontsize=10, loc="left")
        for axis, total in zip(places, ("completions", "tokens"), strict=False):
            _accuracies(axis, arms, total)
        _lines(places[2], arms, checked)
        places[2].set_xlabel("step", fontsize=8)
        places[2].set_ylabel("completions with a check", fontsize=8)
        places[2].set_ylim(0, 1.02)
    _legend(figure, [arm for arm in ARMS if any(best(arms[arm]) for arms in regimes.values())])
    return figure


def _tokens(regimes: Mapping[Regime, Runs], shown: Sequence[Regime]) -> Figure:
    """What the clip drops, in every regime and over the run of the shown one in which it drops most of the marks."""
    figure, axes = _figure(2, 2)
    (bars, ratios), (dropped, entropy) = axes
    _bars(bars, regimes)

    def share(regime: Regime) -> float:
        gone, every = drops(regimes[regime][ARMS[0]], "mark", "pos", "ppo_dropped")
        return gone / max(every, 1)

    regime = max(shown, key=share)
    arms, place = regimes[regime], f"{regime.updates}:{regime.staleness}"
    _ratios(ratios, [run.result for run in best(arms[ARMS[0]])])
    ratios.set_title(f"ratios, {ARMS[0]}, {place}", fontsize=9, loc="left")
    _lines(dropped, arms, of_history("is/dropped_frac_posadv"))
    dropped.set_yscale("symlog", linthresh=0.01)
    dropped.set_title(f"A > 0 tokens without gradient, {place}", fontsize=9, loc="left")
    _lines(entropy, arms, of_history("entropy"))
    entropy.set_title(f"entropy (nats a token), {place}", fontsize=9, loc="left")
    for axis in (ratios, dropped, entropy):
        axis.set_xlabel("step", fontsize=8)
    _legend(figure, [arm for arm in ARMS if best(arms[arm])])
    return figure


def _bars(axis: Axes, regimes: Mapping[Regime, Runs]) -> None:
    width, names = 0.2, [f"{r.updates}:{r.staleness}" for r in regimes]
    styles = {("mark", "pos"): ("#D55E00", "!, A > 0"), ("other", "pos"): ("#f4c7a5", "others, A > 0"),
              ("mark", "neg"): ("#0072B2", "!, A < 0"), ("other", "neg"): ("#a6cbe3", "others, A < 0")}  # fmt: skip
    for number, ((kind, sign), (colour, label)) in enumerate(styles.items()):
        counts = [drops(arms[ARMS[0]], kind, sign, "ppo_dropped") for arms in regimes.values()]
        shares = [gone / every if every else 0.0 for gone, every in counts]
        axis.bar(np.arange(len(names)) + (number - 1.5) * width, shares, width, color=colour, label=label)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("updates : staleness", fontsize=8)
    axis.set_title("dropped by PPO's band while checks are rare", fontsize=9, loc="left")
    axis.set_ylim(0, 1.35)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper center")


def _ratios(axis: Axes, results: Sequence[Result]) -> None:
    """Median of the runs' quantiles of the ratio over steps, of the mark and of the other tokens."""
    for kind, colour in (("mark", "#D55E00"), ("other", "#555555")):
        by_step: dict[int, list[list[float]]] = {}
        for result in results:
            for step in result["steps"]:
                if "ratio" in step["kinds"].get(kind, {}):
                    by_step.setdefault(step["step"], []).append(step["kinds"][kind]["ratio"])
        steps = sorted(by_step)
        if steps:
            low, _, middle, _, high = np.array([np.median(by_step[step], axis=0) for step in steps]).T
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(
                steps,
                middle,
                color=colour,
                linewidth=1.6,
                label=f"{'!' if kind == 'mark' else 'others'}: median, 1 to 99 %",
            )
    for bound in (0.8, 1.2):
        axis.axhline(bound, color="#222222", linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    axis.set_ylim(0.2, 300)
    axis.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axis.minorticks_off()
    axis.legend(fontsize=7, frameon=False)


def _differences(rows: Sequence[Row]) -> Figure:
    """Intervals of the difference in final accuracy, a panel a policy; filled where it is resolved."""
    shown = [row for row in rows if row.measure == "final" and row.p is not None]
    policies = list(dict.fromkeys(row.policy for row in shown))
    farthest = 1.05 * max(abs(end) for row in shown for end in row.found.student or ())
    tallest = max(sum(row.policy == policy for row in shown) for policy in policies)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 4.2 * len(policies)), 1.2 + 0.24 * tallest), layout="constrained")
    for number, policy in enumerate(policies):
        axis = figure.add_subplot(1, len(policies), number + 1)
        own = [row for row in shown if row.policy == policy]
        for place, row in enumerate(own):
            assert row.found.student is not None and row.found.mean is not None
            colour = arm_style(ARMS.index(row.found.arm))["color"]
            axis.plot(list(row.found.student), [place, place], color=colour, linewidth=1.4)
            filled = not math.isnan(row.q) and row.q <= LEVEL
            axis.plot(
                row.found.mean, place, "o", color=colour, markersize=6, markerfacecolor=colour if filled else "white"
            )
            if place and row.regime != own[place - 1].regime:
                axis.axhline(place - 0.5, color="#dddddd", linewidth=0.6)
        axis.set_xlim(-farthest, farthest)
        axis.set_yticks(
            range(len(own)),
            [f"{row.found.arm}  {row.regime.updates}:{row.regime.staleness}" for row in own],
            fontsize=8,
        )
        axis.set_ylim(tallest - 0.5, -0.5)  # one height a row in all panels
        axis.axvline(0, color="#222222", linewidth=0.8)
        axis.set_title(policy, fontsize=9, loc="left")
        axis.set_xlabel(f"final accuracy - {ARMS[0]}'s, 95 %; filled: resolved", fontsize=8)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    return figure
