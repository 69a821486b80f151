"""The learning curve (PNG) and the table of first and last values at the end of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from cispo.output.drawing import new_figure

_INK, _BLUE, _ORANGE = "#222222", "#2563b0", "#d9660f"
_SETS = (_BLUE, "#2f8f4e", "#8e44ad", "#b03a48", "#5b6770")


def learning_curve(history: Sequence[Mapping[str, float]], file: Path, *, title: str) -> None:
    """Draws held-out accuracy and training reward over steps, with entropy, length and mismatch below.

    Raises MissingPackage without matplotlib.
    """

    figure = new_figure(file.name, size=(9, 6.2))
    grid = figure.add_gridspec(2, 3, height_ratios=(2.2, 1))
    top = figure.add_subplot(grid[0, :])
    steps, reward = _series(history, "reward/mean")
    top.plot(steps, reward, color=_ORANGE, alpha=0.35, linewidth=1)
    top.plot(steps, _smooth(reward), color=_ORANGE, linewidth=1.8, label="training reward (smoothed over 9 steps)")
    for number, name in enumerate(_of_sets(history)):
        low, high = _series(history, f"{name}_low")[1], _series(history, f"{name}_high")[1]
        steps, share = _series(history, name)
        top.plot(
            steps, share, color=_SETS[number % len(_SETS)], marker="o", linewidth=2, label=f"{name} (95% interval)"
        )
        if len(low) == len(steps):
            top.fill_between(steps, low, high, color=_SETS[number % len(_SETS)], alpha=0.15, linewidth=0)
    steps, accuracy = _series(history, "eval/accuracy")
    if steps:
        _, stderr = _series(history, "eval/accuracy_stderr")
        top.errorbar(
            steps, accuracy, [1.96 * s for s in stderr], color=_BLUE, marker="o", capsize=3, linewidth=2,
            label="held-out accuracy, sampled (95% interval)",
        )  # fmt: skip
    top.set_title(title, loc="left", color=_INK)
    top.set_xlabel("step")
    top.legend(frameon=False, loc="lower right")
    small = (
        ("entropy", "entropy (nats a token)"),
        ("length/mean", "completion length (tokens)"),
        ("mismatch/logprob_max", "largest |learner - engine| logprob"),
    )
    for position, (name, label) in enumerate(small):
        axis = figure.add_subplot(grid[1, position])
        axis.plot(*_series(history, name), color=_INK, linewidth=1.2)
        axis.set_title(label, fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.savefig(file, dpi=130)


def _of_sets(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Shares of right completions of held-out sets that have names: eval/math/avg@4."""
    return list(dict.fromkeys(n for row in history for n in row if re.fullmatch(r"eval/[^/]+/avg@\d+", n)))


def _series(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], row[name]) for row in history if name in row]
    return [step for step, _ in rows], [value for _, value in rows]


def _smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """Centred mean over at most `width` values."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def summary(history: Sequence[Mapping[str, float]], *, seconds: float) -> Table:
    """First and last values of the main metrics, and the seconds of each part of a step."""
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    for heading in ("", "first", "last"):
        table.add_column(heading, justify="left" if not heading else "right")
    wanted = (
        ("eval/accuracy", "held-out accuracy", "{:.3f}"),
        ("reward/mean", "training reward", "{:.3f}"),
        ("entropy", "entropy", "{:.3f}"),
        ("length/mean", "completion length", "{:.1f}"),
        ("mismatch/logprob_max", "largest sampler/learner mismatch", "{:.1e}"),
    )
    sets = [(name, f"held-out {name.removeprefix('eval/')}", "{:.3f}") for name in _of_sets(history)]
    for name, label, form in [*sets, *wanted]:
        _, values = _series(history, name)
        if values:
            table.add_row(label, form.format(values[0]), form.format(values[-1]))
    for name, label in (("time/rollout", "sampling"), ("time/learn", "learning"), ("time/sync", "weight sync")):
        _, values = _series(history, name)
        if values:
            table.add_row(f"seconds {label}", "", f"{sum(values):.1f}")
    table.add_row("seconds in all", "", f"{seconds:.1f}")
    return table
