"""The watchdog: reports the open calls of a run that has stalled, and ends the run if it stays so, or cannot go on.

activity = Activity()
with activity.doing("engine-0 to generate"): ...      every call to another process, every wait of the loop
activity.checks.append(folder.check)                  raises RunError where the run has lost what it needs
await guarded(run(), activity, silence=1800)          reports after `silence` seconds, ends the run after twice that
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator

from cispo.errors import RunError

# Seconds that the run's task, and then a driver with a blocked event loop, get beyond the watchdog's limit.
_GRACE = 60.0
# Seconds that a source of details gets.
_DETAIL_TIMEOUT = 5.0
# Seconds between two rounds of `Activity.checks`.
_CHECK_EVERY = 2.0
# File descriptor: a notebook's sys.stderr has none.
_STDERR = 2


class Activity:
    """The open calls and waits of a run, and the time at which one last began or ended."""

    def __init__(self) -> None:
        self.moved_at = time.monotonic()
        self.checks: list[Callable[[], None]] = []
        """Conditions of the run, looked at every few seconds; each raises RunError where it does not hold."""
        self.details: list[Callable[[], Awaitable[str]]] = []
        """Sources of a clause about processes that are busy, "" without one, for the report of a stalled run."""
        self._open: dict[int, tuple[str, float]] = {}
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def doing(self, task: str) -> Iterator[None]:
        """A block that may take long; a report names it by `task` while it is open."""
        number = next(self._numbers)
        self.moved()
        self._open[number] = (task, self.moved_at)
        try:
            yield
        finally:
            del self._open[number]
            self.moved()

    def check(self) -> None:
        """Raises RunError where a condition of the run does not hold."""
        for check in self.checks:
            check()

    def moved(self) -> None:
        """Notes progress of the run."""
        self.moved_at = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self.moved_at

    def waiting_for(self) -> str:
        """The open blocks, oldest first, as the end of a sentence."""
        now = time.monotonic()
        oldest_first = sorted(self._open.values(), key=lambda block: block[1])
        tasks = [f"{task} (for {now - since:.0f} s)" for task, since in oldest_first]
        return ", ".join(tasks) or "nothing that is known: the driver itself is busy or stuck"

    async def report(self) -> str:
        """A sentence about a run that has stalled: its open blocks, and the details that arrive in time."""
        known = []
        for detail in self.details:
            with contextlib.suppress(Exception):  # a process that does not answer is no news here
                known.append(await asyncio.wait_for(detail(), _DETAIL_TIMEOUT))
        text = f"nothing has moved for {self.silence:.0f} s; waiting for {self.waiting_for()}"
        return "; ".join([text, *filter(None, known)])


async def guarded(run: Awaitable[None], activity: Activity, *, silence: float, say: Callable[[str], None]) -> None:
    """Awaits `run`; says its open blocks after `silence` seconds without progress, and ends it after twice as many.

    0 switches that off. Raises RunError where it ended the run, for silence or a failed check. Where the event loop
    itself is blocked, faulthandler's thread prints the tracebacks of all threads and ends the process.
    """
    task = asyncio.ensure_future(run)
    watches = [asyncio.ensure_future(_check(activity))]
    if silence > 0:
        watches.append(asyncio.ensure_future(_watch(activity, silence, say)))
    try:
        await asyncio.wait({task, *watches}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_GRACE)
            for watch in watches:
                if watch.done():
                    watch.result()
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    finally:
        for watch in watches:
            watch.cancel()
        faulthandler.cancel_dump_traceback_later()
    task.result()


async def _check(activity: Activity) -> None:
    """Never returns; raises RunError where a check fails."""
    while True:
        activity.check()
        await asyncio.sleep(_CHECK_EVERY)


async def _watch(activity: Activity, silence: float, say: Callable[[str], None]) -> None:
    """Never returns; raises RunError once nothing has moved for twice `silence` seconds."""
    said_at = 0.0
    while True:
        # Re-armed at every look, so it fires only where the event loop is blocked.
        faulthandler.dump_traceback_later(2 * silence + _GRACE, exit=True, file=_STDERR)
        await asyncio.sleep(min(silence / 10, 5.0))
        if activity.silence > 2 * silence:
            raise RunError(await activity.report())
        if activity.silence > silence and said_at != activity.moved_at:
            said_at = activity.moved_at
            say(await activity.report())
