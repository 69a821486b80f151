"""Turns a hang into a sentence: who waits for what, since when, and the end of a run in which nothing moves any more.

activity = Activity()
with activity.doing("engine-0: generate"): ...        every call to another process, every wait of the loop
await guarded(run(), activity, silence=1800)          reports after `silence` seconds, ends the run after twice that
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from cispo.errors import RunError

# Seconds beyond the end of a run that is given up, after which a driver that does not answer either is ended.
_GRACE = 60.0


class Activity:
    """What a run is waiting for at the moment, and when something last began or ended."""

    def __init__(self) -> None:
        self.moved_at = time.monotonic()
        self._open: dict[int, tuple[str, float]] = {}
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Something that may take long; it is reported while the block runs."""
        number = next(self._numbers)
        self.moved()
        self._open[number] = (what, self.moved_at)
        try:
            yield
        finally:
            del self._open[number]
            self.moved()

    def moved(self) -> None:
        """Says that the run gets on."""
        self.moved_at = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since something moved."""
        return time.monotonic() - self.moved_at

    def waiting_for(self) -> str:
        """Everything that is open, the oldest first, as the end of a sentence."""
        now = time.monotonic()
        open_ = [f"{what} (for {now - since:.0f} s)" for what, since in sorted(self._open.values(), key=lambda o: o[1])]
        return ", ".join(open_) or "nothing that is known: the driver itself is busy or stuck"


async def guarded(
    run: Coroutine[Any, Any, None], activity: Activity, *, silence: float, say: Callable[[str], None]
) -> None:
    """Awaits `run`; says who waits for whom after `silence` seconds without a move, and ends it after twice as many.

    0 switches it off. Raises RunError where it ended the run. A driver that is stuck itself, so that nothing can be
    said from inside, is ended with the tracebacks of its threads.
    """
    task = asyncio.ensure_future(run)
    watch = asyncio.ensure_future(_watch(activity, silence, say)) if silence > 0 else None
    try:
        await asyncio.wait({task, watch} if watch else {task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            assert watch is not None
            task.cancel()
            await asyncio.wait({task}, timeout=_GRACE)
            watch.result()
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    finally:
        if watch is not None:
            watch.cancel()
            faulthandler.cancel_dump_traceback_later()
    task.result()


async def _watch(activity: Activity, silence: float, say: Callable[[str], None]) -> None:
    """Returns never; raises RunError once nothing has moved for twice `silence`."""
    said_at = 0.0
    while True:
        # Re-armed at every look: it goes off where this loop does not get to run.
        faulthandler.dump_traceback_later(2 * silence + _GRACE, exit=True, file=sys.stderr)
        await asyncio.sleep(min(silence / 10, 5.0))
        if activity.silence > 2 * silence:
            raise RunError(f"nothing has moved for {activity.silence:.0f} s; waiting for {activity.waiting_for()}")
        if activity.silence > silence and said_at != activity.moved_at:
            said_at = activity.moved_at
            say(f"nothing has moved for {activity.silence:.0f} s; waiting for {activity.waiting_for()}")
