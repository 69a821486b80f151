"""Environments, tools and agents in processes of user code: sessions that survive the death of their process.

    SessionPool.open(prompt, ...) -> RemoteSession: start, step(reply) ..., reward, close

An environment is a function of its seed and the replies that it got: where its process ends, another one gets the same
replies and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from cispo.agents.agent_worker import Solved
from cispo.agents.chat import Ask, Told
from cispo.agents.contract import Reply, Step
from cispo.agents.environment import Identity, Observation
from cispo.agents.session_process import ProcessEnded, SessionError, SessionProcess, TellPolicy
from cispo.agents.session_worker import Answer, Ready, Request, Setup, Verb
from cispo.errors import UserError

# Deaths of its process after which an agent that was waiting for the policy each time runs alone.
_DEATHS = 2

_Agent = tuple[Callable[[], None], TellPolicy]


class SessionPool:
    """Processes that share the sessions of a run; started with the first session, and again after a death."""

    def __init__(self, setup: Setup, *, timeout: float, workers: int) -> None:
        """`timeout` is in seconds for one request."""
        assert workers > 0 and timeout > 0
        self.setup, self.timeout = setup, timeout
        self.seconds = 0.0
        """Spent in user code, summed over sessions."""
        self._processes: list[SessionProcess | None] = [None] * workers
        self._locks = [asyncio.Lock() for _ in range(workers)]
        self._alone: set[SessionProcess] = set()
        self._numbers = itertools.count()
        self._ready: Ready | None = None

    def check(self) -> Ready:
        """Imports the user's objects. Raises UserError naming the recipe key."""
        if self._ready is None:
            self._processes[0] = SessionProcess(self.setup)
            self._ready = self._processes[0].ready
        return self._ready

    def open(self, columns: Mapping[str, object], identity: Identity) -> RemoteSession:
        """A session for one attempt; nothing is sent yet."""
        return RemoteSession(self, next(self._numbers), pickle.dumps(dict(columns)), identity)

    async def process_of(self, session: int) -> SessionProcess:
        """The process that serves a session, started again where it has ended."""
        slot = session % len(self._processes)
        async with self._locks[slot]:
            process = self._processes[slot]
            if process is None or not process.alive:
                process = self._processes[slot] = await asyncio.to_thread(SessionProcess, self.setup)
        return process

    async def process_alone(self) -> SessionProcess:
        """A process for one suspect."""
        process = await asyncio.to_thread(SessionProcess, self.setup)
        self._alone = {one for one in self._alone if one.alive} | {process}
        return process

    def end_alone(self, process: SessionProcess) -> None:
        """Ends the process of a suspect with its session."""
        process.kill()
        self._alone.discard(process)

    def next_request(self) -> int:
        return next(self._numbers)

    def close(self) -> None:
        """Ends all processes; if the pool is used again, it starts new ones."""
        for process in (*self._processes, *self._alone):
            if process is not None:
                process.kill()
        self._processes = [None] * len(self._processes)
        self._alone.clear()


class RemoteSession:
    """One attempt's environment, in any process of the pool."""

    def __init__(self, pool: SessionPool, number: int, columns: bytes, identity: Identity) -> None:
        self._pool, self._number, self._columns, self._identity = pool, number, columns, identity
        self._process: SessionProcess | None = None
        self._past: list[tuple[Verb, Reply | None]] = []
        """Requests that made the state of the environment, for another process to repeat."""
        self._request = -1
        self._suspect = False
        self._deaths = 0
        self._policy_seconds = 0.0
        self.seconds = 0.0

    async def start(self) -> Observation:
        value = (await self._ask("start")).value
        assert isinstance(value, str | list | tuple)
        return value

    async def step(self, reply: Reply) -> tuple[Step | None, int]:
        answer = await self._ask("step", reply)
        assert answer.value is None or isinstance(answer.value, Step)
        return answer.value, answer.failed

    async def reward(self) -> Mapping[str, float]:
        value = (await self._ask("reward")).value
        assert isinstance(value, dict)
        return value

    async def solve(self, begin: Callable[[], None], policy: TellPolicy) -> Solved:
        """The end of an agent. `begin` is called before each of its lives: one, unless its process dies."""
        value = (await self._ask("solve", agent=(begin, policy))).value
        assert isinstance(value, Solved)
        return value

    @contextlib.contextmanager
    def clock_stands(self) -> Iterator[None]:
        """While the policy is asked past the frames of this session: that time is none of the user code's."""
        started = time.perf_counter()
        waiting = None if self._process is None else self._process.waiting_for(self._request)
        try:
            with contextlib.nullcontext() if waiting is None else waiting.clock_stands():
                yield
        finally:
            self._policy_seconds += time.perf_counter() - started

    def fail(self, error: Exception) -> None:
        """Ends the request under way with an error that is none of the user code's."""
        waiting = None if self._process is None else self._process.waiting_for(self._request)
        if waiting is not None and not waiting.answer.done():
            waiting.answer.set_exception(error)

    async def close(self) -> None:
        """Tells the environment that its attempt has ended; its errors no longer matter."""
        if self._process is not None and self._process.alive:
            with contextlib.suppress(SessionError, ProcessEnded):
                await self._send("close", None)
            if self._suspect:
                self._pool.end_alone(self._process)

    async def _ask(self, verb: Verb, reply: Reply | None = None, agent: _Agent | None = None) -> Answer:
        started = time.perf_counter()
        try:
            answer = await self._lasting(verb, reply, agent)
        finally:
            elapsed = max(time.perf_counter() - started - self._policy_seconds, 0.0)
            self._policy_seconds = 0.0
            self.seconds += elapsed
            self._pool.seconds += elapsed
        if verb in ("start", "step"):
            self._past.append((verb, reply))
        return answer

    async def _lasting(self, verb: Verb, reply: Reply | None, agent: _Agent | None) -> Answer:
        """The answer of a process that lives: of another one where the first died by a request of another session."""
        while True:
            try:
                if self._process is None or not self._process.alive:
                    await self._repeat_past()
                if agent is None:
                    return await self._send(verb, reply)
                begin, policy = agent
                begin()
                return await self._send(verb, reply, self._timed(policy))
            except ProcessEnded as death:
                if self._suspect and death.waiting:
                    raise SessionError(str(death)) from None
                self._deaths += death.waiting > 0
                # Alone in its process, a second death is its own.
                self._suspect = self._suspect or (death.waiting > 0 and (death.ran or self._deaths > _DEATHS))

    def _timed(self, policy: TellPolicy) -> TellPolicy:
        """`policy` with its seconds counted, which are none of the user code's."""

        async def timed(asks: Sequence[Ask]) -> tuple[Told, ...]:
            started = time.perf_counter()
            try:
                return await policy(asks)
            finally:
                self._policy_seconds += time.perf_counter() - started

        return timed

    async def _repeat_past(self) -> None:
        pool = self._pool
        self._process = await (pool.process_alone() if self._suspect else pool.process_of(self._number))
        for verb, reply in self._past:
            await self._send(verb, reply)

    async def _send(self, verb: Verb, reply: Reply | None, policy: TellPolicy | None = None) -> Answer:
        assert self._process is not None
        self._request = self._pool.next_request()
        request = Request(self._request, self._number, verb, self._columns, self._identity, reply)
        answer = await self._process.ask(request, self._pool.timeout, policy)
        if answer.ends_run:
            raise UserError(answer.problem)
        if answer.problem:
            raise SessionError(answer.problem)
        return answer


def pool_of(used: Sequence[str], args: Mapping[str, object], key: str, *, timeout: float, workers: int) -> SessionPool:
    """The pool of a recipe's environment. Raises UserError where its objects cannot be imported or used."""
    pool = SessionPool(Setup(tuple(used), dict(args), key), timeout=timeout, workers=workers)
    try:
        pool.check()
    except BaseException:
        pool.close()
        raise
    return pool
