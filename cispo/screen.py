"""What a person sees while a command runs: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between plain lines, so that a log file stays readable.
_LINE_EVERY = 10.0


class Screen:
    """Phases (warm-up, training) with live numbers; `print` for what should stay."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", visible=False, numbers="")
        self._name, self._total, self._started, self._printed = "", 0, 0.0, 0.0

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()
        self._progress.stop()

    def print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def phase(self, name: str, total: int) -> None:
        """Starts a phase of `total` steps."""
        self._name, self._total, self._started, self._printed = name, total, time.monotonic(), 0.0
        self._progress.reset(self._task, description=name, total=total, visible=True, numbers="")

    def done(self) -> None:
        """Ends the phase."""
        self._progress.update(self._task, visible=False)

    def step(self, step: int, numbers: Mapping[str, str]) -> None:
        """Shows that `step` steps are done, with the numbers of the moment."""
        text = "  ".join(f"{name} {value}" for name, value in numbers.items())
        self._progress.update(self._task, completed=step, numbers=text)
        now = time.monotonic()
        if self.console.is_terminal or (now - self._printed < _LINE_EVERY and step < self._total):
            return
        self._printed = now
        left = (now - self._started) / max(step, 1) * (self._total - step)
        self.print(f"{self._name} {step}/{self._total}  {text}  {left:.0f} s left")
