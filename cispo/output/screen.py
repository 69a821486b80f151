"""The console of every command, and progress on it: a bar on a terminal, plain lines elsewhere.

Text is shown as it is: names, paths and completions may hold brackets that rich would read as markup, and codes that a
terminal would obey. Style is an argument.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Seconds between plain lines, so that a log file stays readable.
_LINE_EVERY = 10.0

# Control characters but tab and newline, and the codes of terminals that they begin.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0)) if code not in (9, 10)}


def new_console() -> Console:
    """A console that takes no text for markup or the name of an emoji."""
    return Console(highlight=False, markup=False, emoji=False)


def visible(text: str) -> str:
    """Text of a policy or a user, with its control characters as \\x1b."""
    return text.translate(_CONTROLS)


def warn(console: Console, sentence: str, *, label: str = "") -> None:
    """Prints a warning."""
    console.print(Text.assemble(label, ("warning:", "yellow"), f" {visible(sentence)}"), soft_wrap=True)


def progress_bars(console: Console) -> Progress:
    """Bars for one or several screens; none where the console is no terminal."""
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )


class Screen:
    """Phases (warm-up, training) with live numbers; lines of `print` stay on the console."""

    def __init__(self, console: Console | None = None, *, bars: Progress | None = None, label: str = "") -> None:
        """Runs side by side share `bars`, which their caller starts and stops, and have a `label` each."""
        self.console = console or new_console()
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

    def print(self, text: str, *, title: str = "") -> None:
        """Prints a line, with a `title` in bold before the text."""
        line = Text.assemble(self._label, (visible(title), "bold"), visible(text))
        self.console.print(line, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        warn(self.console, sentence, label=self._label)

    def phase(self, name: str, total: int, *, done: int = 0) -> None:
        """Starts a phase of `total` steps; a resumed one has `done` of them behind it."""
        self._name, self._total, self._started, self._printed = name, total, time.monotonic(), 0.0
        self._before = done
        description = self._label + name
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


def verdict(good: bool) -> Text:
    """The mark of a check that passed or failed."""
    return Text("ok  ", "green") if good else Text("FAIL", "red")


def table_of(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table
