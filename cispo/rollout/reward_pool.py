"""Worker processes of reward functions.

    Job --run--> WorkerProcess (`reward_process`, `reward_worker`) --> Reply

Plain functions run in a pool of workers, one group at a time each. Async functions of all groups run side by side on
the event loop of one further worker. A worker that a function kills, or in which one exceeds its time, is replaced.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cispo.errors import UserError
from cispo.recipe.user_code import given
from cispo.rollout.reward_function import Failure, RewardFunction, Signature
from cispo.rollout.reward_process import WorkerDied, WorkerProcess
from cispo.rollout.reward_worker import START_SECONDS, Job, Reply, Setup


class WorkerPool:
    """The workers of a recipe's functions, started when they are needed. Call `close` at the end."""

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        timeout: float,
        workers: int,
        key: str,
        give_up: Callable[[Failure, int], None],
    ) -> None:
        """`timeout` is in seconds for one call, of functions without one of their own.

        `give_up` hears of each call of a shipped function that scores 0 because it ended its process, with the number
        of its prompt.
        """
        self.signatures: tuple[Signature, ...] = ()
        """Of each function; () before the first worker."""
        self._functions = tuple(functions)
        self._timeout, self._workers, self._key, self._give_up = timeout, workers, key, give_up
        self._job_ids = itertools.count()
        self._processes: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []
        self._shared: WorkerProcess | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots: asyncio.Semaphore
        self._starting: asyncio.Lock
        self._one_suspect: asyncio.Lock
        self._turns: Mapping[int, asyncio.Semaphore] = {}

    def check(self) -> None:
        """Imports every function in a worker. Raises UserError where one does not import or is no reward function."""
        if not self.signatures:
            self._idle.append(self._start_now(asynchronous=False))

    async def ready(self) -> None:
        """`check` on the running event loop, which the jobs that follow belong to."""
        self._bind()
        async with self._starting:
            if not self.signatures:
                await asyncio.to_thread(self.check)

    def next_job(self) -> int:
        return next(self._job_ids)

    def jobs(self, functions: Sequence[int]) -> list[list[int]]:
        """The functions by job: plain ones, each with a bound of its own, async ones."""
        plain = [i for i in functions if not self.signatures[i].asynchronous]
        alone = [[i] for i in plain if i in self._turns]
        together = [[i for i in plain if i not in self._turns], *alone]
        together.append([i for i in functions if self.signatures[i].asynchronous])
        return [job for job in together if job]

    async def run(self, job: Job) -> Reply:
        """The values of one of `jobs` for a group, or its failure."""
        first = job.functions[0]
        if self.signatures[first].asynchronous:
            return await self._run_async(job)
        if first in self._turns:
            async with self._turns[first]:
                return await self._run_plain(job)
        return await self._run_plain(job)

    def close(self) -> None:
        """Ends all workers; if the pool is used again, it starts new ones."""
        for worker in self._processes:
            worker.kill()
        self._processes.clear()
        self._idle.clear()

    def _bind(self) -> None:
        """Moves to the running event loop: locks and jobs belong to the old one, only idle workers move along."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        for worker in self._processes.difference(self._idle):
            worker.kill()
        self._loop = loop
        self._slots = asyncio.Semaphore(self._workers)
        self._starting = asyncio.Lock()
        self._one_suspect = asyncio.Lock()
        bounds = {i: f.concurrency for i, f in enumerate(self._functions) if f.concurrency is not None}
        self._turns = {i: asyncio.Semaphore(most) for i, most in bounds.items()}

    async def _run_plain(self, job: Job) -> Reply:
        """The job's values; a call of a shipped function that ends its process gives 0 for its completion."""
        async with self._slots:
            while True:
                reply = await self._run_in_a_worker(job)
                failure = reply.failure
                if failure is None or not failure.fatal or failure.completion < 0:
                    return reply
                if not self.signatures[failure.function].shipped:
                    return reply
                self._give_up(failure, job.prompt_id)
                given_up = job.group.given_up | {(failure.function, failure.completion)}
                job = replace(job, id=self.next_job(), group=replace(job.group, given_up=given_up))

    async def _run_in_a_worker(self, job: Job) -> Reply:
        worker = self._idle.pop() if self._idle else await self._start(asynchronous=False)
        try:
            return await self._run_alone(worker, job)
        except _Killed:
            worker = await self._start(asynchronous=False)
            return await self._run_alone(worker, job, again=True)
        finally:
            if worker.alive:
                self._idle.append(worker)

    async def _run_async(self, job: Job) -> Reply:
        async with self._starting:
            if self._shared is None or not self._shared.alive:
                self._shared = await self._start(asynchronous=True)
            worker = self._shared
        try:
            return await worker.run(job)
        except WorkerDied as death:
            if death.suspects == 1 and not death.killed:
                return Reply(job.id, [], death.failure(job))
        # The process ran other jobs as well, or was killed from outside. Alone in a process, one after the other, only
        # the guilty job fails.
        async with self._one_suspect:
            worker = await self._start(asynchronous=True)
            try:
                return await self._run_alone(worker, job, again=True)
            finally:
                worker.kill()

    async def _run_alone(self, worker: WorkerProcess, job: Job, *, again: bool = False) -> Reply:
        """The job in a worker that runs nothing else, so that a death is this job's failure.

        Raises _Killed where the worker was killed from outside. If that happens `again`, the job is to blame.
        """
        try:
            return await worker.run(job)
        except WorkerDied as death:
            if death.killed and not again:
                raise _Killed from None
            return Reply(job.id, [], death.failure(job))
        except asyncio.CancelledError:
            # The worker is still busy with a job without a reader.
            worker.kill()
            raise

    async def _start(self, *, asynchronous: bool) -> WorkerProcess:
        return await asyncio.to_thread(self._start_now, asynchronous=asynchronous)

    def _start_now(self, *, asynchronous: bool) -> WorkerProcess:
        functions = tuple((f.fn, f.args, f"{self._key}.{i}.fn") for i, f in enumerate(self._functions))
        setup = Setup(
            functions,
            limits=tuple(f.timeout or self._timeout for f in self._functions),
            asynchronous=asynchronous,
            concurrency=tuple(f.concurrency for f in self._functions),
            given=given([f.fn for f in self._functions]),
        )
        try:
            worker = self._started(setup)
        except _Killed:
            worker = self._started(setup, again=True)
        self.signatures = worker.signatures
        self._processes = {worker, *(process for process in self._processes if process.alive)}
        return worker

    def _started(self, setup: Setup, *, again: bool = False) -> WorkerProcess:
        """A worker; raises _Killed as `_run_alone` does, for a death during the import."""
        try:
            return WorkerProcess(setup)
        except WorkerDied as death:
            if death.killed and not again:
                raise _Killed from None
            names = ", ".join(function.fn for function in self._functions)
            raise UserError(f"{self._key}: importing {names} {death.how(START_SECONDS)}") from None


class _Killed(Exception):
    """A worker got SIGKILL from outside: from a user, or from a system out of memory."""
