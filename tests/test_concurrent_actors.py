"""Overlapping calls of one object, in this process and in a Ray actor: results, cancellation, errors."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cispo.errors import ProcessDied, RunError, UserError
from cispo.runtime.actors import Handle, LocalRuntime, Runtime, _RayHandle

ROOT = Path(__file__).parents[1]


class Clerk:
    """An object with a slow coroutine and a fast method."""

    def __init__(self) -> None:
        self.waiting = 0

    async def wait(self, seconds: float) -> float:
        self.waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self.waiting -= 1
        return seconds

    def count(self) -> int:
        return self.waiting

    async def fail(self, kind: str) -> None:
        await asyncio.sleep(0.01)
        raise {"user": UserError, "run": RunError}[kind](f"a {kind} error")

    def close(self) -> None:
        pass


async def until(handle: Handle, waiting: int) -> None:
    started = time.monotonic()
    while await handle.call("count") != waiting:
        assert time.monotonic() - started < 20
        await asyncio.sleep(0.01)


async def work(runtime: Runtime) -> None:
    handle = await runtime.start(Clerk, name="clerk", concurrent=True)
    long = asyncio.ensure_future(handle.call("wait", 60.0))
    await until(handle, 1)
    assert await asyncio.gather(*(handle.call("wait", 0.01 * i) for i in range(5))) == [0.01 * i for i in range(5)]
    assert await handle.call("count") == 1, "the long call goes on"
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    await until(handle, 0)
    for kind, error in (("user", UserError), ("run", RunError)):
        with pytest.raises(error, match=f"^a {kind} error$"):
            await handle.call("fail", kind)


def check(runtime: Runtime) -> None:
    try:
        asyncio.run(work(runtime))
    finally:
        runtime.close()


def test_calls_overlap_and_are_cancelled_here() -> None:
    check(LocalRuntime())


def test_calls_overlap_and_are_cancelled_in_a_ray_actor() -> None:
    """In a process of its own: Ray reads its settings once, and other tests have other settings."""
    code = """
from cispo.runtime.actors import RayRuntime
from cispo.runtime.watchdog import Activity
from tests.test_concurrent_actors import check

check(RayRuntime(processes=1, activity=Activity()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_process_that_ray_ends_for_memory_is_one_sentence():
    """Ray's error is no RayActorError, and its text lists the processes of the machine."""
    from ray.exceptions import OutOfMemoryError

    async def ended() -> object:
        raise OutOfMemoryError("Task was killed due to the node running low on memory.\nPID\tMEM\n1\t9 GB")

    handle = object.__new__(_RayHandle)
    handle.name = "learner-0"
    sentence = r"^the process of learner-0 ended unexpectedly \(Ray ended it because the machine has no memory left\)$"
    with pytest.raises(ProcessDied, match=sentence):
        asyncio.run(handle.wait(ended()))
