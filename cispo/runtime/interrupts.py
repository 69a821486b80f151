"""Ctrl-C in two steps: the first ends a run after its current step, with a checkpoint; the second ends it at once.

    SIGINT, SIGTERM --> requested --> the loop looks after each step, saves, returns
            again   --> the run's task is cancelled

SIGTERM is the warning of schedulers before they take a machine away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator

# Seconds for an orderly end after the second signal. Then the process exits; Ray's processes follow it.
_LEAVE_SECONDS = 10.0


class Interrupts:
    """Whether the user or a scheduler has asked the run to stop.

    Outside of `in_steps`, as in a start or a warm-up, there is nothing to save: the first request ends the run at once.
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

    def run(self, main: Awaitable[None]) -> None:
        """asyncio.run with these signal handlers. Raises KeyboardInterrupt after any request, also if the run saved."""

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

    def _handle(self, task: asyncio.Task[None]) -> None:
        if self._in_steps and not self.requested:
            self.requested = True
            self._say("interrupted: finishing the step and saving (once more Ctrl-C to leave at once)")
            return
        self.requested = True
        task.cancel()
        timer = threading.Timer(_LEAVE_SECONDS, os._exit, (130,))
        timer.daemon = True
        timer.start()
