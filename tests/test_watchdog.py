"""A stalled run is reported and ended, a slow one is left alone, a blocked driver is ended from outside its loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from cispo.errors import RunError
from cispo.runtime import watchdog
from cispo.runtime.watchdog import Activity, guarded


def test_a_run_in_which_nothing_moves_is_ended_with_who_waits_for_what():
    activity, said = Activity(), []

    async def hang() -> None:
        with activity.doing("engine-0 to generate"), activity.doing("learner-0 to update"):
            await asyncio.sleep(3600)

    started = time.monotonic()
    with pytest.raises(RunError, match=r"nothing has moved .* engine-0 to generate \(for .* s\), learner-0 to update"):
        asyncio.run(guarded(hang(), activity, silence=0.4, say=said.append))
    assert 0.8 <= time.monotonic() - started < 30
    assert len(said) == 1 and "engine-0 to generate" in said[0], "said once before it is ended"


def test_what_moves_now_and_then_is_left_alone():
    activity, said = Activity(), []

    async def slow() -> None:
        for _ in range(30):
            with activity.doing("a step"):
                await asyncio.sleep(0.1)

    asyncio.run(guarded(slow(), activity, silence=2.5, say=said.append))
    assert not said


def test_a_run_that_has_lost_what_it_needs_is_ended(monkeypatch: pytest.MonkeyPatch):
    """Also with the watchdog off, and while its calls wait for ever."""
    monkeypatch.setattr(watchdog, "_CHECK_EVERY", 0.05)
    activity, looks, cleaned = Activity(), [], []

    def check() -> None:
        looks.append(1)
        if len(looks) > 3:
            raise RunError("the folder is gone")

    activity.checks.append(check)

    async def hang() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.append(True)

    for silence in (0, 100):
        looks.clear()
        with pytest.raises(RunError, match="^the folder is gone$"):
            asyncio.run(guarded(hang(), activity, silence=silence, say=print))
    assert len(cleaned) == 2


def test_errors_pass_and_zero_is_off():
    async def broken() -> None:
        await asyncio.sleep(0.01)
        raise ValueError("a bug")

    for silence in (0, 5):
        with pytest.raises(ValueError, match="a bug"):
            asyncio.run(guarded(broken(), Activity(), silence=silence, say=print))


def test_a_cancelled_run_is_cancelled_inside():
    ended = []

    async def hang() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    async def main() -> None:
        task = asyncio.create_task(guarded(hang(), Activity(), silence=5, say=print))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended


def test_a_driver_that_is_stuck_itself_is_ended_with_its_traceback():
    """Nothing in a blocked event loop could report it."""
    code = """
import asyncio, time
from cispo.runtime import watchdog
watchdog._GRACE = 0.5
async def stuck():
    await asyncio.sleep(0.2)
    time.sleep(600)
asyncio.run(watchdog.guarded(stuck(), watchdog.Activity(), silence=0.5, say=print))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and "Timeout" in done.stderr and "in stuck" in done.stderr
