"""Progress of a command on the console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# Seconds between plain lines, so that a log file stays readable.
_LINE_EVERY = 10.0


def progress_bars(console: Console) -> Progress:
    """Bars for one or several screens; none where the console is no terminal."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )


class Screen:
    """Phases (warm-up, training) with live numbers; lines of `print` stay on the console."""

    def __init__(self, console: Console | None = None, *, bars: Progress | None = None, label: str = "") -> None:
        """Runs side by side share `bars`, which their caller starts and stops, and have a `label` each."""
        self.console = console or Console(highlight=False)
        self._label = f"{label}: " if label else ""
        self._owner = bars is None
        self._progress = bars or progress_bars(self.console)
        self._task = self._progress.add_task("", visible=False, numbers="")
        self._name, self._total, self._before, self._started, self._printed = "", 0, 0, 0.0, 0.0

    def __enter__(self) -> Screen:
        if self._owner:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()
        if self._owner:
            self._progress.stop()

    def print(self, text: str) -> None:
        self.console.print(escape(self._label) + text, soft_wrap=True)

    def phase(self, name: str, total: int, *, done: int = 0) -> None:
        """Starts a phase of `total` steps; a resumed one has `done` of them behind it."""
        self._name, self._total, self._started, self._printed = name, total, time.monotonic(), 0.0
        self._before = done
        description = escape(self._label) + name
        self._progress.reset(self._task, description=description, total=total, completed=done, visible=True, numbers="")

    def done(self) -> None:
        """Ends the phase."""
        self._progress.update(self._task, visible=False)

    def step(self, step: int, numbers: Mapping[str, str]) -> None:
        """Shows that `step` steps are done, with their latest numbers."""
        text = "  ".join(f"{name} {value}" for name, value in numbers.items())
        self._progress.update(self._task, completed=step, numbers=text)
        now = time.monotonic()
        if self.console.is_terminal or (now - self._printed < _LINE_EVERY and step < self._total):
            return
        self._printed = now
        left = (now - self._started) / max(step - self._before, 1) * (self._total - step)
        self.print(f"{self._name} {step}/{self._total}  {text}  {left:.0f} s left")


def table_of(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table
