"""The time of one call of an async reward function, without the time for which it waits its turn.

    with waiting():                   in a reward function: this time does not run against `timeout`
        await limiter.acquire()

`timeout` is a limit on the work of a call, and on the answer of a server; the queue before it is no fault of the call.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

_T = TypeVar("_T")

_CLOCK: contextvars.ContextVar[Clock | None] = contextvars.ContextVar("reward_clock", default=None)

# Seconds between looks at a clock that stands still.
_LOOK = 0.05


@dataclass(slots=True)
class Clock:
    """Seconds that a call has used."""

    _used: float = 0.0
    _waits: int = 0
    """Nested `waiting` blocks, also of tasks that the call has started."""
    _since: float = field(default_factory=time.monotonic)

    @property
    def used(self) -> float:
        return self._used + (0.0 if self._waits else time.monotonic() - self._since)

    @property
    def stands(self) -> bool:
        return self._waits > 0

    def stop(self) -> None:
        self._used, self._waits = self.used, self._waits + 1

    def go(self) -> None:
        self._waits -= 1
        if not self._waits:
            self._since = time.monotonic()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """A block that does not count as time of the reward function's call; without effect outside of one."""
    clock = _CLOCK.get()
    if clock is None:
        yield
        return
    clock.stop()
    try:
        yield
    finally:
        clock.go()


async def limited(call: Coroutine[object, object, _T], seconds: float) -> _T | None:
    """The result of the call, None where it takes more than `seconds`.

    A call that is over its limit is cancelled, and not waited for: it may swallow its cancellation.
    """
    clock = Clock()
    context = contextvars.copy_context()
    context.run(_CLOCK.set, clock)
    task = asyncio.create_task(call, context=context)
    while not task.done() and (clock.stands or clock.used < seconds):
        await asyncio.wait({task}, timeout=_LOOK if clock.stands else max(seconds - clock.used, 0.001))
    if task.done():
        return task.result()
    task.cancel()
    return None
