"""The pictures of a comparison: each drawn twice, for a wide and for a narrow screen."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from cispo.compare.comparison import MEASURES, ArmResult, ArmSummary, Comparison, Summary
from cispo.compare.scaling import Fit, scaling_curve
from cispo.compare.statistics import bootstrap_band

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import LineStyleType

_INK, _GRID = "#222222", "#dddddd"
# Okabe and Ito's colours, which colour-blind readers can tell apart; the reference arm is black. Dashes repeat it.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[LineStyleType, ...] = (
    "-",
    "--",
    "-.",
    (0, (1, 1)),
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1)),
)
# Seeds from which bands are bootstrap intervals; of 3 seeds that interval is their range.
_BOOTSTRAP_FROM = 4
_DIAGNOSTICS = (
    (("reward/mean",), "training reward"),
    (("entropy",), "entropy (nats a token)"),
    (("is/clip_frac",), "share of tokens clipped"),
    (("is/dropped_frac_posadv",), "A > 0 tokens without gradient"),
    (("mismatch/kl_k3", "mismatch/logprob_max"), "sampler / learner mismatch"),
    (("grad_norm",), "gradient norm"),
    (("length/mean",), "completion length (tokens)"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The same picture for a wide and for a narrow screen, as `data:` URLs."""

    wide: str
    narrow: str
    text: str


def comparison_pictures(
    summary: Summary, fits: Sequence[Fit], *, curves: Path, diagnostics: Path
) -> dict[str, Picture]:
    """The pictures of the page by name; `curves` and `diagnostics` are the files of two of them."""
    comparison, metric, height = summary.comparison, summary.comparison.metric, 1.3 + 0.45 * len(summary.arms)
    pictures = {
        "curves": picture(
            lambda figure, narrow: _draw_curves(figure, narrow, summary),
            f"{metric} over sampled tokens",
            wide=(10, 4.8), narrow=(4.2, 4.6), file=curves,
        ),
        "diagnostics": picture(
            lambda figure, narrow: _draw_diagnostics(figure, narrow, comparison),
            "training metrics over steps",
            wide=(10, 5), narrow=(4.2, 8), file=diagnostics,
        ),
    }  # fmt: skip
    if summary.differences:
        pictures["forest"] = picture(
            lambda figure, narrow: _draw_forest(figure, narrow, summary),
            f"differences of {metric} from {summary.arms[0].name}, with intervals",
            wide=(10, height), narrow=(4.2, 3 * height - 0.8),
        )  # fmt: skip
    if any(one.parameters for one in fits):
        pictures["fit"] = picture(
            lambda figure, narrow: _draw_fits(figure, narrow, summary, fits),
            "fitted curves", wide=(10, 4.2), narrow=(4.2, 4),
        )  # fmt: skip
    return pictures


def picture(
    draw: Callable[[Figure, bool], None], text: str, *, wide: tuple[float, float], narrow: tuple[float, float],
    file: Path | None = None,
) -> Picture:  # fmt: skip
    """Draws once for each screen, as one size cannot be read on both; the wide one is written to `file` too."""
    from matplotlib.figure import Figure  # without pyplot, which would keep it and may open a window

    made = []
    for size, is_narrow in ((wide, False), (narrow, True)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, is_narrow)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=170 if is_narrow else 150, format="png")
        made.append(buffer.getvalue())
    if file:
        file.write_bytes(made[0])
    wide_address, narrow_address = ("data:image/png;base64," + base64.b64encode(png).decode() for png in made)
    return Picture(wide=wide_address, narrow=narrow_address, text=text)


class LineStyle(TypedDict):
    color: str
    linestyle: LineStyleType


def arm_style(index: int) -> LineStyle:
    """Colour and dashes of an arm's line; arm 0 is the reference."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _DASHES[index % len(_DASHES)]}


def legend(figure: Figure, names: Sequence[str], narrow: bool, extra: Mapping[str, Artist] | None = None) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], linewidth=2.2, **arm_style(index)) for index in range(len(names))]
    handles: list[Artist] = [*lines, *(extra or {}).values()]
    labels = [_label(name) for name in (*names, *(extra or ()))]
    across = 1 if narrow and max(map(len, labels)) > 18 else 2 if narrow else 4
    # Long names of arms take columns away.
    for columns in range(across, 0, -1):
        drawn = figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=10, handlelength=2.6
        )
        if columns == 1 or drawn.get_window_extent().width <= figure.bbox.width:
            return
        drawn.remove()


def _label(name: str, limit: int = 44) -> str:
    """A name that matplotlib shows as it is: dollars would start a formula."""
    short = name if len(name) <= limit else name[: limit - 1] + "…"
    return short.replace("$", r"\$")


def _tokens_axis(axis: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.set_xlabel("sampled tokens")
    axis.grid(color=_GRID, linewidth=0.6)
    axis.margins(x=0.02)


def _band(arm: ArmSummary, bootstrap: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Tokens, mean, low and high, up to the end of the arm's shortest finished run."""
    import numpy as np

    curves = [run.curve for run in arm.runs if run.failure is None and run.curve.values]
    end = min((line.tokens[-1] for line in curves), default=0.0)
    if not end:
        return None
    grid = np.unique([0.0, end, *(t for line in curves for t in line.tokens if t < end)])
    values = np.stack([np.interp(grid, line.tokens, line.values) for line in curves])
    low, high = values.min(axis=0), values.max(axis=0)
    if bootstrap and len(curves) > 1:
        low, high = bootstrap_band(values)
    return grid, values.mean(axis=0), low, high


def _draw_curves(figure: Figure, narrow: bool, summary: Summary) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    axis = figure.add_subplot()
    counts = [len(arm.runs) - arm.failed for arm in summary.arms]
    bootstrap = min((n for n in counts if n > 1), default=0) >= _BOOTSTRAP_FROM
    for index, arm in enumerate(summary.arms):
        colour = arm_style(index)["color"]
        for run in arm.runs:
            axis.plot(run.curve.tokens, run.curve.values, color=colour, linewidth=0.8, alpha=0.4)
            if run.failure is not None and run.curve.tokens:
                axis.plot(
                    run.curve.tokens[-1], run.curve.values[-1], "x", color=colour, markersize=9, markeredgewidth=2
                )
        if band := _band(arm, bootstrap):
            grid, mean, low, high = band
            axis.fill_between(grid, low, high, color=colour, alpha=0.13, linewidth=0)
            axis.plot(grid, mean, linewidth=2.2, **arm_style(index))
    extra: dict[str, Artist] = {}
    if max(counts) > 1:
        label = "95% bootstrap interval of the mean" if bootstrap else "lowest to highest seed"
        extra[f"band: {label}"] = Patch(color="#999999", alpha=0.35)
        extra["one seed"] = Line2D([], [], color="#777777", linewidth=0.8)
    if any(run.failure is not None for arm in summary.arms for run in arm.runs):
        extra["ended with an error"] = Line2D([], [], color="#777777", marker="x", linestyle="", markersize=8)
    if summary.level is not None:
        axis.axhline(summary.level, color=_INK, linewidth=0.8, linestyle=":")
        extra[f"mean final level of {summary.arms[0].name}"] = Line2D([], [], color=_INK, linewidth=0.8, linestyle=":")
    axis.set_ylabel(_label(summary.comparison.metric))
    _tokens_axis(axis)
    legend(figure, [arm.name for arm in summary.arms], narrow, extra)


def _draw_diagnostics(figure: Figure, narrow: bool, comparison: Comparison) -> None:
    logged = {name for arm in comparison.arms for run in arm.runs for row in run.history for name in row}
    panels = [(name, title) for names, title in _DIAGNOSTICS for name in [n for n in names if n in logged][:1]]
    across = 2 if narrow else 4
    rows = max(1, math.ceil(len(panels) / across))
    for place, (name, title) in enumerate(panels):
        axis = figure.add_subplot(rows, across, place + 1)
        for index, arm in enumerate(comparison.arms):
            _draw_training(axis, arm, name, index)
        axis.set_title(title, fontsize=8 if narrow else 9, loc="left", wrap=True)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color=_GRID, linewidth=0.6)
        values = [row[name] for arm in comparison.arms for run in arm.runs for row in run.history if name in row]
        if name.startswith("mismatch/") and min(values) > 0 and max(values) > 30 * min(values):
            axis.set_yscale("log")
        if place >= len(panels) - across:
            axis.set_xlabel("step", fontsize=8)
    legend(figure, [arm.name for arm in comparison.arms], narrow)


def _draw_training(axis: Axes, arm: ArmResult, name: str, index: int) -> None:
    """The seeds as thin lines, and the centred mean over 5 steps of all finished ones."""
    import numpy as np

    finished: list[dict[float, float]] = []
    for run in arm.runs:
        points = {row["step"]: row[name] for row in run.history if name in row}
        axis.plot(list(points), list(points.values()), color=arm_style(index)["color"], linewidth=0.6, alpha=0.3)
        if run.failure is None and points:
            finished.append(points)
    steps = sorted(set.intersection(*map(set, finished))) if finished else []
    if steps:
        mean = np.mean([[points[step] for step in steps] for points in finished], axis=0)
        axis.plot(
            steps, [mean[max(0, i - 2) : i + 3].mean() for i in range(len(mean))], linewidth=1.6, **arm_style(index)
        )


def _draw_forest(figure: Figure, narrow: bool, summary: Summary) -> None:
    from matplotlib.lines import Line2D

    arms = summary.arms[1:]
    for place, (measure, text) in enumerate(MEASURES.items()):
        axis = figure.add_subplot(*((3, 1) if narrow else (1, 3)), place + 1)
        axis.axvline(0, color=_INK, linewidth=1)
        for row, arm in enumerate(arms):
            one = next(d for d in summary.differences if d.arm == arm.name and d.measure == measure)
            colour = arm_style(row + 1)["color"]
            axis.plot(one.values, [row - 0.3] * len(one.values), "o", color=colour, markersize=4, alpha=0.6)
            if one.student and one.bootstrap:
                axis.plot(one.student, (row, row), color=colour, linewidth=1.6)
                axis.plot(one.bootstrap, (row, row), color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt")
            if one.mean is not None:
                axis.plot(one.mean, row, "D", color=colour, markersize=6)
        axis.set_ylim(len(arms) - 0.4, -0.7)
        names = [_label(arm.name, 12 if narrow else 22) for arm in arms]
        axis.set_yticks(range(len(arms)), names if narrow or not place else [""] * len(arms))
        axis.set_title(_label(text.format(summary.comparison.metric)), fontsize=9, loc="left")
        axis.grid(axis="x", color=_GRID, linewidth=0.6)
        axis.tick_params(labelsize=9)
        axis.locator_params(axis="x", nbins=5)
        if place == 2 or not narrow:
            axis.set_xlabel(_label(f"difference from {summary.arms[0].name}", 32), fontsize=9)
    shown: dict[str, Artist] = {
        "mean": Line2D([], [], color="#555555", marker="D", linestyle="", markersize=6),
        "seeds": Line2D([], [], color="#555555", marker="o", linestyle="", markersize=4, alpha=0.6),
        "Student's t, 95%": Line2D([], [], color="#555555", linewidth=1.6),
        "bootstrap, 95%": Line2D([], [], color="#555555", linewidth=5, alpha=0.45),
    }
    legend(figure, [], narrow, shown)


def _draw_fits(figure: Figure, narrow: bool, summary: Summary, fits: Sequence[Fit]) -> None:
    import numpy as np

    axis = figure.add_subplot()
    for index, (arm, fit) in enumerate(zip(summary.arms, fits, strict=True)):
        style = arm_style(index)
        for run in arm.runs:
            if run.failure is None:
                axis.plot(run.curve.tokens, run.curve.values, ".", color=style["color"], markersize=4, alpha=0.4)
        end = max((run.curve.tokens[-1] for run in arm.runs if run.curve.tokens), default=0.0)
        if fit.parameters:
            grid = np.linspace(0, end, 200)
            axis.plot(grid, scaling_curve(grid, fit.start, fit.parameters), linewidth=2, **style)
            if fit.doubt is None:
                axis.axhline(fit.parameters.ceiling, color=style["color"], linewidth=0.9, linestyle=":")
    axis.set_ylabel(_label(summary.comparison.metric))
    _tokens_axis(axis)
    legend(figure, [arm.name for arm in summary.arms], narrow)
