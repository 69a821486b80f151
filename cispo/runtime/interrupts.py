"""Orders that a run gets by signals: to stop, in two steps, and to save.

    SIGINT, SIGTERM, SIGHUP --> requested --> the loop looks after each step, saves, returns
                      again --> the run's task is cancelled
                    SIGUSR1 --> saves_asked --> the loop saves after the step, and goes on

Batch systems send SIGTERM, or a signal of the user's choice, before they take a machine away; SIGHUP is the end of a
terminal or connection, and stays ignored under nohup.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

EXIT_CODE = 130
"""Exit code of a command that a signal has ended, whichever it was."""

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds for an orderly end after the second signal. Then the process exits; Ray's processes follow it.
_LEAVE_SECONDS = 10.0
# Signals this close to the first are the same order: `timeout` signals its child and then the child's process group, a
# closed terminal sends SIGHUP and so does its shell.
_SAME_ORDER_SECONDS = 0.5


def heed_signals() -> None:
    """At the start of a command: every order to stop is a KeyboardInterrupt, an order to save is ignored."""
    for number in _heeded():
        signal.signal(number, signal.default_int_handler)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def leave_at_once() -> None:
    """At the end of an interrupted command: a further signal ends the process."""
    for number in _heeded():
        signal.signal(number, lambda *_: os._exit(EXIT_CODE))


def _heeded() -> list[signal.Signals]:
    return [number for number in _STOP if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """A block of a library that sets signal handlers of its own, such as ray.init: ours are back after it."""
    before = {number: signal.getsignal(number) for number in (*_STOP, signal.SIGUSR1)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                # None is a handler that Python did not set.
                if handler is not None:
                    signal.signal(number, handler)


_OF_THREADS: list[Callable[[], object]] = []
"""The order to stop of the run in another thread than the main one, as in a notebook."""


def interrupt_running() -> bool:
    """Asks the run in another thread to stop, as Ctrl-C does; False where there is none."""
    for ask in list(_OF_THREADS):
        ask()
    return bool(_OF_THREADS)


class Interrupts:
    """Whether the user or a scheduler has asked the run to stop, or to save.

    Outside of `in_steps`, as in a start or a warm-up, there is nothing to save: the first request ends the run at once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self.saves_asked = 0
        """Number of orders to save. Each run of a comparison compares it with the number that it has seen."""
        self._asked_at = 0.0
        self._say = say
        self._in_steps = 0

    @contextlib.contextmanager
    def in_steps(self) -> Iterator[None]:
        """A block in which a run looks at `requested` and `saves_asked` after each of its steps."""
        self._in_steps += 1
        try:
            yield
        finally:
            self._in_steps -= 1

    def run(self, main: Awaitable[None]) -> None:
        """asyncio.run with these signal handlers. Raises KeyboardInterrupt after any request, also if the run saved."""

        async def handled() -> None:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            if threading.current_thread() is threading.main_thread():
                for number in _heeded():
                    loop.add_signal_handler(number, self._handle, number, task)
                loop.add_signal_handler(signal.SIGUSR1, self._ask_to_save)
                await main
                return
            # Python gives signals to the main thread alone, which passes them on.
            _OF_THREADS.append(lambda: loop.call_soon_threadsafe(self._handle, signal.SIGINT, task))
            try:
                await main
            finally:
                _OF_THREADS.clear()

        try:
            # The loop's end sets default handlers.
            with kept_handlers():
                asyncio.run(handled())
        except asyncio.CancelledError:
            if not self.requested:
                raise
        if self.requested:
            raise KeyboardInterrupt

    def _handle(self, number: signal.Signals, task: asyncio.Task[None]) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._asked_at = True, now
            if self._in_steps:
                again = "Ctrl-C" if number == signal.SIGINT else number.name
                self._say(f"interrupted: finishing the step and saving (once more {again} to leave at once)")
                return
        elif now - self._asked_at < _SAME_ORDER_SECONDS:
            return
        task.cancel()
        timer = threading.Timer(_LEAVE_SECONDS, os._exit, (EXIT_CODE,))
        timer.daemon = True
        timer.start()

    def _ask_to_save(self) -> None:
        self.saves_asked += 1
        self._say("SIGUSR1: saving a checkpoint after this step")
