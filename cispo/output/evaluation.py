"""All checkpoints of a run measured on its held-out sets: a table, a picture and JSON.

[Measured (step, set, estimates)] --> table on the screen, RUN/evaluation.json, RUN/evaluation.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from cispo.files import disk_errors, write_text
from cispo.output.drawing import new_figure

_COLOURS = ("#2563b0", "#d9660f", "#2f8f4e", "#8e44ad", "#b03a48", "#5b6770")
_MARKS = ("o", "s", "^", "D", "v", "P")

Estimates = Mapping[str, tuple[float, float, float]]
"""Name (avg@4) -> mean over prompts and the ends of its 95 % interval, nan where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One checkpoint on one held-out set."""

    step: int
    name: str
    """Of the set, "" of the only one."""
    prompts: int
    estimates: Estimates


def evaluation_table(rows: Sequence[Measured], name: str) -> Table:
    """A set's estimates, a row a checkpoint, with their intervals below; a star marks the best by the first one."""
    rows = [row for row in rows if row.name == name]
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for row in rows for name in row.estimates))
    for heading in ("step", "prompts", *names):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [_cell(row.estimates.get(name)) for name in names]
        mark = "*" if row.step == _best(rows) else ""
        table.add_row(f"{mark}{row.step}", str(row.prompts), *cells)
    return table


def _best(rows: Sequence[Measured]) -> int | None:
    """The step with the highest first estimate, the last of several."""
    found = [(next(iter(row.estimates.values()))[0], row.step) for row in rows if row.estimates]
    return max(found)[1] if found else None


def _cell(estimate: tuple[float, float, float] | None) -> str:
    if estimate is None:
        return ""
    mean, low, high = estimate
    return f"{mean:.3f}" + (f"\n{low:.2f}..{high:.2f}" if math.isfinite(low) else "")


def write_numbers(folder: Path, rows: Sequence[Measured]) -> Path:
    """Writes evaluation.json into a run folder. Raises RunError where the disk refuses."""
    plain = [
        {
            "step": row.step,
            "set": row.name,
            "prompts": row.prompts,
            **{name: [v if math.isfinite(v) else None for v in values] for name, values in row.estimates.items()},
        }
        for row in rows
    ]
    file = folder / "evaluation.json"
    with disk_errors(folder):
        write_text(file, json.dumps(plain, indent=1) + "\n")
    return file


def draw(folder: Path, rows: Sequence[Measured], *, title: str) -> Path:
    """Writes evaluation.png into a run folder.

    Raises RunError where the disk refuses, MissingPackage without matplotlib.
    """
    file = folder / "evaluation.png"
    sets = list(dict.fromkeys(row.name for row in rows))
    figure = new_figure(file.name, size=(max(6.5, 4.8 * len(sets)), 4.2))
    axes = figure.subplots(1, len(sets), squeeze=False)
    for axis, name in zip(axes[0], sets, strict=True):
        own = [row for row in rows if row.name == name]
        for number, estimate in enumerate(dict.fromkeys(e for row in own for e in row.estimates)):
            points = [(row.step, *row.estimates[estimate]) for row in own if estimate in row.estimates]
            steps, means = [p[0] for p in points], [p[1] for p in points]
            colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
            axis.plot(steps, means, label=estimate, color=colour, marker=mark, linewidth=1.8, markersize=5)
            if all(math.isfinite(p[2]) for p in points):
                axis.fill_between(steps, [p[2] for p in points], [p[3] for p in points], color=colour, alpha=0.12, lw=0)
        axis.set_title(name or "held-out", fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(f"{title}: checkpoints, 95 % intervals over prompts", fontsize=10, x=0.01, ha="left")
    with disk_errors(folder):
        figure.savefig(file, dpi=130)
    return file
