"""The page over several comparisons: the same arms in several settings, such as 1, 4 and 16 updates per batch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cispo.compare.comparison import ArmResult, ArmSummary, Comparison, Measure, Summary, summarise
from cispo.compare.figures import arm_style, legend, picture
from cispo.compare.report import environment, span
from cispo.compare.results import OverviewResults, Results
from cispo.compare.statistics import number, seeds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DROPPED = "is/dropped_frac_posadv"
"""Share of trained tokens with a positive advantage that an algorithm gave no gradient."""


def write_overview(
    comparisons: Mapping[str, Comparison], pages: Mapping[str, Path], found: Mapping[str, Results], folder: Path
) -> Path:
    """Writes report.html, settings.png and results.json over all settings into `folder`; returns the page."""
    summaries = {setting: summarise(comparison) for setting, comparison in comparisons.items()}
    names = list(dict.fromkeys(arm.name for s in summaries.values() for arm in s.arms))
    drawn = picture(
        lambda figure, narrow: _draw(figure, narrow, summaries, names),
        "final metric, its average over the run, and the share of dropped tokens in each setting",
        wide=(11, 4.2), narrow=(4.2, 9.5), file=folder / "settings.png",
    )  # fmt: skip
    page = environment().get_template("settings.html.j2").render(
        name=folder.name,
        comparison=next(iter(comparisons.values())),
        settings={setting: pages[setting].relative_to(folder).as_posix() for setting in summaries},
        summaries=summaries,
        table=[{"arm": name, "cells": [_cell(s, name) for s in summaries.values()]} for name in names],
        pictures=drawn,
        seeds_text=seeds_text,
    )  # fmt: skip
    (folder / "report.html").write_text(page, encoding="utf-8")
    stored = json.dumps(OverviewResults(settings=dict(found)), indent=1, allow_nan=False) + "\n"
    (folder / "results.json").write_text(stored, encoding="utf-8")
    return folder / "report.html"


def dropped_share(arm: ArmResult) -> float | None:
    """Mean over runs and steps of the share of positive-advantage tokens without gradient."""
    values = [row[DROPPED] for run in arm.runs for row in run.history if DROPPED in row]
    return math.fsum(values) / len(values) if values else None


def _find(summary: Summary, name: str) -> tuple[ArmSummary, ArmResult] | None:
    pairs = zip(summary.arms, summary.comparison.arms, strict=True)
    return next(((arm, result) for arm, result in pairs if arm.name == name), None)


def _cell(summary: Summary, name: str) -> dict[str, str]:
    pair = _find(summary, name)
    if pair is None:
        return {"final": "-", "auc": "-", "dropped": "-", "collapsed": "-"}
    arm, result = pair
    final, auc, dropped = arm.estimates["final"], arm.estimates["auc"], dropped_share(result)
    interval = f" ({span(final.mean_interval)})" if final and final.mean_interval else ""
    return {
        "final": "-" if final is None else number(final.mean) + interval,
        "auc": "-" if auc is None else number(auc.mean),
        "dropped": "-" if dropped is None else f"{dropped:.2%}",
        "collapsed": f"{arm.collapsed} of {len(arm.runs)}",
    }


def _draw(figure: Figure, narrow: bool, summaries: Mapping[str, Summary], names: Sequence[str]) -> None:
    metric = next(iter(summaries.values())).comparison.metric
    axes = figure.subplots(3, 1) if narrow else figure.subplots(1, 3)
    titles = (f"final {metric}", "average over the run", "A > 0 tokens without gradient")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xticks(range(len(summaries)), list(summaries))
        axis.set_xlim(-0.4, len(summaries) - 0.6)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    for index, name in enumerate(names):
        shift = 0.36 * ((index + 0.5) / len(names) - 0.5)
        found = [(place + shift, _find(summary, name)) for place, summary in enumerate(summaries.values())]
        arms = [(x, *pair) for x, pair in found if pair is not None]
        measures: tuple[Measure, ...] = ("final", "auc")
        for axis, measure in zip(axes, measures, strict=False):
            seeds = [(x, [v for run in arm.runs if (v := run.measures()[measure]) is not None]) for x, arm, _ in arms]
            _line(axis, [(x, values) for x, values in seeds if values], index)
        shares = [(x, share) for x, _, result in arms if (share := dropped_share(result)) is not None]
        _line(axes[-1], [(x, [share]) for x, share in shares], index)
    axes[-1].yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    legend(figure, names, narrow)


def _line(axis: Axes, points: Sequence[tuple[float, Sequence[float]]], index: int) -> None:
    """The means over seeds, joined, and each seed as a dot; arms stand side by side."""
    style = arm_style(index)
    for x, values in points:
        axis.plot([x] * len(values), values, ".", color=style["color"], alpha=0.5, markersize=5)
    axis.plot([x for x, _ in points], [math.fsum(v) / len(v) for _, v in points], marker="o", markersize=4, **style)
