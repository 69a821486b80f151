"""A limit on the time of a call, in seconds of this process's CPU, so that a verdict does not depend on other programs.

It works in a main thread, where a reward worker calls rewards; in any other thread a call has no limit.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

_Result = TypeVar("_Result")

# For a call that waits instead of computing.
_WALL_FACTOR = 10.0


class TimeIsUp(BaseException):
    """A call took too long. No Exception, which the code below it might catch."""


def limited(seconds: float, call: Callable[[], _Result]) -> _Result:
    """The call's result. Raises TimeIsUp after `seconds` of CPU time, or ten times as many of the clock."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    timers = {timer: signal.getitimer(timer) for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL)}
    _set_timers(0.0)
    handlers = {number: signal.signal(number, _time_is_up) for number in (signal.SIGPROF, signal.SIGALRM)}
    try:
        # Twice, for a signal that arrives in the inner one.
        try:
            _set_timers(seconds)
            return call()
        finally:
            _set_timers(0.0)
    finally:
        _set_timers(0.0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # Those of the caller's own code.
        for timer, (delay, interval) in timers.items():
            signal.setitimer(timer, delay, interval)


def _set_timers(seconds: float) -> None:
    for timer, limit in ((signal.ITIMER_PROF, seconds), (signal.ITIMER_REAL, _WALL_FACTOR * seconds)):
        # Again and again: a library may catch everything.
        signal.setitimer(timer, limit, limit / 10)


def _time_is_up(*_: object) -> NoReturn:
    raise TimeIsUp
