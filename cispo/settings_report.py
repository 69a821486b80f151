"""The page over several comparisons: the same arms in several settings, such as 1, 4 and 16 updates a batch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.comparison import ArmResult, Comparison, Summary, summarise
from cispo.comparison_report import arm_style, embed, environment, number
from cispo.statistics import Interval, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DROPPED = "is/dropped_frac_posadv"
"""Share of trained tokens with a positive advantage that an algorithm gave no gradient."""


def write_overview(
    comparisons: Mapping[str, Comparison], pages: Mapping[str, Path], found: Mapping[str, Any], folder: Path
) -> Path:
    """Writes report.html, settings.png and results.json of all settings into `folder`; returns the page."""
    summaries = {setting: summarise(comparison) for setting, comparison in comparisons.items()}
    names = list(dict.fromkeys(arm.name for s in summaries.values() for arm in s.arms))
    figure = draw(summaries, names)
    figure.savefig(folder / "settings.png", dpi=130)
    table = [{"arm": name, "cells": [_cell(summary, name) for summary in summaries.values()]} for name in names]
    any_comparison = next(iter(comparisons.values()))
    page = environment().get_template("settings.html.j2").render(
        name=folder.name,
        comparison=any_comparison,
        settings={setting: pages[setting].relative_to(folder).as_posix() for setting in summaries},
        summaries=summaries,
        table=table,
        picture=embed((folder / "settings.png").read_bytes()),
    )  # fmt: skip
    (folder / "report.html").write_text(page, encoding="utf-8")
    stored = json.dumps({"settings": dict(found)}, indent=1, allow_nan=False) + "\n"
    (folder / "results.json").write_text(stored, encoding="utf-8")
    return folder / "report.html"


def dropped_share(arm: ArmResult) -> float | None:
    """Mean over runs and steps of the share of positive-advantage tokens without gradient."""
    values = [row[DROPPED] for run in arm.runs for row in run.history if DROPPED in row]
    return math.fsum(values) / len(values) if values else None


def _cell(summary: Summary, name: str) -> dict[str, str]:
    arm = next((a for a in summary.arms if a.name == name), None)
    result = next((a for a in summary.comparison.arms if a.name == name), None)
    if arm is None or result is None:
        return {"final": "-", "auc": "-", "dropped": "-", "collapsed": "-"}
    final, auc, dropped = arm.estimates["final"], arm.estimates["auc"], dropped_share(result)
    interval = final.mean_interval if final else None
    return {
        "final": "-" if final is None else number(final.mean) + (_span(interval) if interval else ""),
        "auc": "-" if auc is None else number(auc.mean),
        "dropped": "-" if dropped is None else f"{dropped:.2%}",
        "collapsed": f"{arm.collapsed} of {len(arm.runs)}",
    }


def _span(interval: Interval) -> str:
    return f" ({number(interval.low)}..{number(interval.high)})"


def draw(summaries: Mapping[str, Summary], names: list[str]) -> Figure:
    """Final metric, its average over the run, and the share of dropped tokens, over the settings."""
    from matplotlib.figure import Figure

    metric = next(iter(summaries.values())).comparison.metric
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    final, auc, dropped = figure.subplots(1, 3)
    for index, name in enumerate(names):
        style = arm_style(index)
        _measure(final, summaries, name, "final", index, len(names), style)
        _measure(auc, summaries, name, "auc", index, len(names), style)
        shares = [
            next((dropped_share(a) for a in s.comparison.arms if a.name == name), None) for s in summaries.values()
        ]
        points = [(x, y) for x, y in enumerate(shares) if y is not None]
        dropped.plot(*zip(*points, strict=True), marker="o", label=name, **style)
    titles = (f"final {metric}", f"average {metric} over the run", "share of A > 0 tokens without gradient")
    for axis, title in zip((final, auc, dropped), titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xticks(range(len(summaries)), list(summaries))
        axis.set_xlim(-0.4, len(summaries) - 0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    dropped.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    handles, labels = dropped.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 6), frameon=False)
    return figure


def _measure(
    axis: Axes, summaries: Mapping[str, Summary], name: str, measure: str, index: int, count: int, style: dict[str, Any]
) -> None:
    """The mean over seeds with its interval, and each seed as a dot; arms stand side by side."""
    xs, means = [], []
    for place, summary in enumerate(summaries.values()):
        arm = next((a for a in summary.arms if a.name == name), None)
        values = [v for run in arm.runs if (v := run.measures()[measure]) is not None] if arm else []
        found = estimate(values)
        if found is None:
            continue
        x = place + 0.36 * ((index + 0.5) / count - 0.5)
        axis.plot([x] * len(values), values, ".", color=style["color"], alpha=0.5, markersize=5)
        xs.append(x)
        means.append(found.mean)
    axis.plot(xs, means, marker="o", **style)
