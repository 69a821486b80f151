"""The process that runs reward functions, and its messages to and from the driver (`cispo.rollout.reward_process`).

    driver   Setup, Job, Job, ...      ->   worker: calls the functions in its main thread, where signals work
    driver   <-   Ready, Reply, Reply, ...          a frame is 8 bytes of length and a pickle, over a socket

A call over its time limit ends the process, even one that holds the GIL: faulthandler's watchdog is a C thread. The
*black box*, a file that the driver holds too, survives the process: its first bytes name the last call, followed by the
traceback of the watchdog or of a crash. A worker also ends when the driver's end of the socket is closed. This module
imports nothing heavy, so that a worker starts quickly.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import math
import os
import queue
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from cispo.errors import UserError
from cispo.recipe.user_code import Given, take_given
from cispo.rollout.frames import receive, send
from cispo.rollout.reward_clock import limited
from cispo.rollout.reward_function import Attempt, Call, Failure, Function, Signature, Value, calls_of, load_function

LAST_CALL = struct.Struct("<qqq")
"""Start of the black box: job, function and completion of the last call; completion -1 is the whole group."""

START_SECONDS = 300
"""Limit for importing the functions, with room for a busy machine."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message to a worker: its functions and their limit."""

    functions: tuple[tuple[str, Mapping[str, object], str], ...]
    """(module:name, args, recipe key) of each."""
    limits: tuple[float, ...]
    """Seconds of one call of each."""
    asynchronous: bool
    """Jobs name async functions, which run side by side on one event loop; False: plain functions, one at a time."""
    concurrency: tuple[int | None, ...] = ()
    """Most calls of each async function at a time; () and None: no bound."""
    given: Given = ()
    """Functions that were handed over in Python."""

    @property
    def timeout(self) -> float:
        """The longest limit."""
        return max(self.limits)


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker's first answer: the signatures of its functions, or the reason why one could not be imported."""

    signatures: tuple[Signature, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One group for some of the functions."""

    id: int
    prompt_id: int
    functions: tuple[int, ...]
    group: Attempt


@dataclass(frozen=True, slots=True)
class Reply:
    """A job's values [functions of the job][G], or its first failure."""

    id: int
    values: list[list[Value]]
    failure: Failure | None = None


class Worker:
    """Runs jobs: plain functions one call at a time, async ones side by side."""

    def __init__(self, functions: list[Function], setup: Setup, connection: socket.socket, black_box: int) -> None:
        self.functions = functions
        self.setup = setup
        self.connection = connection
        self.black_box = black_box
        self.guarded_at = -math.inf
        self.guarded_for = 0.0
        # Over all jobs: the bound is one of the server behind the function.
        self.turns = [contextlib.nullcontext() if n is None else asyncio.Semaphore(n) for n in self._concurrency()]

    def _concurrency(self) -> Sequence[int | None]:
        return self.setup.concurrency or [None] * len(self.functions)

    def run(self) -> None:
        """Serves jobs of plain functions without end."""
        jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._start_reading(jobs.put)
        while True:
            job = jobs.get()
            # A function that draws random numbers draws the same ones in every worker.
            random.seed(job.prompt_id)
            reply = _reply(
                job, ((self._call(job.id, c) for c in calls_of(self.functions[i], i, job.group)) for i in job.functions)
            )
            faulthandler.cancel_dump_traceback_later()
            self.guarded_at = -math.inf
            send(self.connection, reply)

    async def run_async(self) -> None:
        """Serves jobs of async functions without end."""
        loop = asyncio.get_running_loop()
        jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._start_reading(lambda job: loop.call_soon_threadsafe(jobs.put_nowait, job))
        # An event loop keeps weak references to its tasks only.
        running = {asyncio.create_task(self._watch_the_loop())}
        while True:
            task = asyncio.create_task(self._answer(await jobs.get()))
            running.add(task)
            task.add_done_callback(running.discard)

    def _start_reading(self, deliver: Callable[[Job], object]) -> None:
        def read() -> None:
            while True:
                try:
                    job = receive(self.connection, Job)
                except (EOFError, ConnectionError):
                    _leave()
                deliver(job)

        threading.Thread(target=read, daemon=True).start()

    def _call(self, job: int, call: Call) -> list[Value] | Failure:
        self._guard(job, call)
        try:
            return call.read(call.start())
        # User code may raise anything.
        except (Exception, SystemExit) as error:
            return call.failure(error)

    async def _call_async(self, call: Call) -> list[Value] | Failure:
        async def run() -> list[Value] | Failure:
            try:
                return call.read(await call.start())
            # User code may raise anything, the CancelledError of a task of its own included.
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                return call.failure(error)

        limit = self.setup.limits[call.index]
        async with self.turns[call.index]:
            outcome = await limited(run(), limit)
        if outcome is not None:
            return outcome
        return Failure(call.index, call.completion, f"did not finish within {limit:g} s", timed_out=True)

    async def _answer(self, job: Job) -> None:
        calls = [
            asyncio.gather(*map(self._call_async, calls_of(self.functions[index], index, job.group)))
            for index in job.functions
        ]
        send(self.connection, _reply(job, await asyncio.gather(*calls)))

    def _guard(self, job: int, call: Call) -> None:
        """Writes the starting call into the black box and arms the watchdog.

        Arming costs 60 us: the watchdog is set 5 % late, and set anew only once that margin is used up.
        """
        os.pwrite(self.black_box, LAST_CALL.pack(job, call.index, call.completion), 0)
        limit = self.setup.limits[call.index]
        margin = 0.05 * limit
        if limit != self.guarded_for or time.monotonic() - self.guarded_at > margin:
            faulthandler.dump_traceback_later(limit + margin, exit=True, file=self.black_box)
            self.guarded_at, self.guarded_for = time.monotonic(), limit

    async def _watch_the_loop(self) -> None:
        """Ends the process when a function blocks the event loop that all functions share."""
        limit = self.setup.timeout
        for beat in itertools.count():
            # The driver sees that the loop lives, however long its calls wait for their turns.
            os.pwrite(self.black_box, LAST_CALL.pack(-1, beat, -1), 0)
            faulthandler.dump_traceback_later(1.25 * limit, exit=True, file=self.black_box)
            await asyncio.sleep(0.25 * limit)


def _reply(job: Job, outcomes: Iterable[Iterable[list[Value] | Failure]]) -> Reply:
    """The values of all calls [functions][calls], or the first failure; lazy outcomes behind it are not computed."""
    values: list[list[Value]] = []
    for of_function in outcomes:
        values.append([])
        for outcome in of_function:
            if isinstance(outcome, Failure):
                return Reply(job.id, [], outcome)
            values[-1] += outcome
    return Reply(job.id, values)


def main(connection_fd: int, black_box: int) -> None:
    """Imports the functions, answers `Ready`, and takes jobs until the driver is gone."""
    try:
        _work(socket.socket(fileno=connection_fd), black_box)
    except (EOFError, ConnectionError):
        _leave()


def _leave() -> NoReturn:
    """The driver is gone: ends this process and all processes that its functions started."""
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("it was killed")


def _work(connection: socket.socket, black_box: int) -> None:
    setup = receive(connection, Setup)
    faulthandler.enable(file=black_box)
    faulthandler.dump_traceback_later(START_SECONDS, exit=True, file=black_box)
    try:
        take_given(setup.given)
        functions = [load_function(*function) for function in setup.functions]
    except UserError as error:
        return send(connection, Ready((), str(error)))
    faulthandler.cancel_dump_traceback_later()
    send(connection, Ready(tuple(function.signature for function in functions)))
    worker = Worker(functions, setup, connection, black_box)
    if setup.asynchronous:
        asyncio.run(worker.run_async())
    else:
        worker.run()
