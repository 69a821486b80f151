"""Ctrl-C in two steps: the first asks a run to stop where nothing is lost, the second ends it at once.

SIGTERM, which schedulers send before they take a machine away, counts as the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

# Seconds that leaving at once may take before the process is simply ended; Ray's own follow it.
_LEAVE_SECONDS = 10.0


class Interrupts:
    """Whether somebody wants the run to stop.

    While nothing is under way that is worth finishing (a start, a warm-up), the first request ends the run at once too.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self._say = say
        self._in_steps = 0

    @contextlib.contextmanager
    def in_steps(self) -> Iterator[None]:
        """A block in which a run looks at `requested` after each of its steps."""
        self._in_steps += 1
        try:
            yield
        finally:
            self._in_steps -= 1

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """asyncio.run under these rules. Raises KeyboardInterrupt where the run was asked to stop, also if it saved."""

        async def handled() -> None:
            task = asyncio.current_task()
            assert task is not None
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self._handle, task)
            await main

        try:
            asyncio.run(handled())
        except asyncio.CancelledError:
            if not self.requested:
                raise
        if self.requested:
            raise KeyboardInterrupt

    def _handle(self, task: asyncio.Task[Any]) -> None:
        if self._in_steps and not self.requested:
            self.requested = True
            self._say("interrupted: finishing the step and saving (once more Ctrl-C to leave at once)")
            return
        self.requested = True
        task.cancel()
        timer = threading.Timer(_LEAVE_SECONDS, os._exit, (130,))
        timer.daemon = True
        timer.start()
