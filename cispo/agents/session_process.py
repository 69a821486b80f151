"""The driver's end of a process of user code: requests and answers, several at a time.

    SessionProcess.ask(request, limit) --frame--> session_worker --frame--> Answer

A request over its time limit ends the process, and is the fault of its own session alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cispo.agents.chat import Ask, Told
from cispo.agents.environment import Identity
from cispo.agents.session_worker import Answer, Asked, Message, Ready, Replies, Request, Setup
from cispo.errors import UserError
from cispo.rollout.frames import frame, receive, receive_async, send, start_process
from cispo.rollout.reward_worker import START_SECONDS
from cispo.runtime.orphans import kill_marked

_MARK = "CISPO_SESSION"
"""Environment variable of a process of user code and of those that it starts, in any process group."""

# Seconds in which a process answers although its user code sleeps.
_PING_SECONDS = 2.0


class SessionError(Exception):
    """User code without a usable answer; the message is the predicate of a sentence about it."""

    def __init__(self, problem: str, *, timed_out: bool = False) -> None:
        super().__init__(problem)
        self.timed_out = timed_out


class ProcessEnded(Exception):
    """The process ended during a request; `waiting` is the number of requests that it was serving, and `ran` says
    whether this one's user code was running, and not waiting for the policy."""

    def __init__(self, waiting: int, how: str, *, ran: bool = False) -> None:
        super().__init__(how)
        self.waiting, self.ran = waiting, ran


TellPolicy = Callable[[Sequence[Ask]], Awaitable[tuple[Told, ...]]]
"""Requests of an agent that came together -> the policy's answers."""


@dataclass(slots=True)
class _Waiting:
    """A request on its way."""

    answer: asyncio.Future[Answer]
    policy: TellPolicy | None = None
    """Of an agent."""
    since: float | None = None
    """Start of the stretch of user code that runs; None before the request is served, and while the policy is asked."""
    asking: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        self.since = time.monotonic() if not self.asking else None
        self.changed.set()

    @contextlib.contextmanager
    def clock_stands(self) -> Iterator[None]:
        """The time of the policy is not the user code's."""
        before = self.since
        self.asking += 1
        self.start()
        try:
            yield
        except Exception:
            self.resume(before)
            raise
        else:
            self.resume(None)

    def resume(self, since: float | None) -> None:
        """User code runs again; a refused request leaves it in its stretch since `since`."""
        self.asking -= 1
        self.start()
        if self.since is not None and since is not None:
            self.since = since


class SessionProcess:
    """One process with imported user code."""

    def __init__(self, setup: Setup) -> None:
        """Starts the process and blocks until the objects are imported. Raises UserError naming the recipe key."""
        self._waiting: dict[int, _Waiting] = {}
        self._reader: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        self._pings = itertools.count(-1, -1)
        self.alive = True
        self._socket, theirs = socket.socketpair()
        self._mark = uuid.uuid4().hex
        with theirs:
            self._process = start_process("cispo.agents.session_worker:main", [theirs.fileno()], {_MARK: self._mark})
        self._socket.settimeout(START_SECONDS)
        try:
            send(self._socket, setup)
            self.ready = receive(self._socket, Ready)
        except (EOFError, OSError):
            self.kill()
            names = ", ".join(setup.used)
            raise UserError(f"{setup.key}: the import of {names} {self._how()}") from None
        if self.ready.error is not None:
            self.kill()
            raise UserError(self.ready.error)
        self._socket.setblocking(False)

    async def ask(self, request: Request, limit: float, policy: TellPolicy | None = None) -> Answer:
        """The answer to a request. Raises SessionError where its user code takes over `limit` seconds at a stretch,
        which ends the process, and ProcessEnded where the process ends otherwise. `policy` answers an agent."""
        loop = asyncio.get_running_loop()
        self._waiting[request.id] = waiting = _Waiting(loop.create_future(), policy)
        try:
            if not self.alive:
                raise ProcessEnded(0, self._how())
            await self._write(request)
            if self._reader is None or self._reader.done():
                self._reader = loop.create_task(self._read())
            if not await _answered(waiting, limit) and len(self._waiting) > 1 and not await self._responds():
                # Any of its requests may hold Python's lock: those that ran are tried again, each alone.
                self._end()
            if not waiting.answer.done():
                self._waiting.pop(request.id)
                self._end("was ended for another session's request")
                raise SessionError(f"did not finish within {limit:g} s", timed_out=True)
            return waiting.answer.result()
        finally:
            self._waiting.pop(request.id, None)

    async def _responds(self) -> bool:
        """Whether the process answers a request that runs no user code."""
        loop = asyncio.get_running_loop()
        request = Request(next(self._pings), -1, "ping", b"", Identity(0, 0))
        self._waiting[request.id] = waiting = _Waiting(loop.create_future(), since=time.monotonic())
        try:
            async with asyncio.timeout(_PING_SECONDS):
                await self._write(request)
                await asyncio.wait({waiting.answer})
            return waiting.answer.exception() is None
        except TimeoutError:
            return False
        finally:
            self._waiting.pop(request.id, None)

    async def _write(self, message: Request | Replies) -> None:
        """Sends a message; returns as well where the process ends before it has taken all of it."""
        task = asyncio.create_task(self._send(message))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def _send(self, message: Request | Replies) -> None:
        with contextlib.suppress(OSError):  # it ended: the reader reports how
            async with self._sending:
                await asyncio.get_running_loop().sock_sendall(self._socket, frame(message))

    async def _read(self) -> None:
        while self._waiting:
            try:
                message = await receive_async(self._socket, Message)
            except (EOFError, OSError):
                self._end()
                return
            waiting = self._waiting.get(message.id)
            if waiting is None:
                continue
            if isinstance(message, Answer) and not waiting.answer.done():
                waiting.answer.set_result(message)
            elif isinstance(message, Asked):
                task = asyncio.create_task(self._tell(waiting, message))
                # An event loop keeps weak references to its tasks only.
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)
            else:
                waiting.start()

    async def _tell(self, waiting: _Waiting, asked: Asked) -> None:
        """Asks the policy for an agent. An error that is none of the agent's ends its request."""
        assert waiting.policy is not None
        before = waiting.since
        try:
            with waiting.clock_stands():
                answers = await waiting.policy(asked.asks)
        except Exception as error:
            if not waiting.answer.done():
                waiting.answer.set_exception(error)
            return
        if before is not None and waiting.since is not None and all(told.reply is None for told in answers):
            waiting.since = before
        if self.alive:
            await self._write(Replies(asked.id, answers))

    def waiting_for(self, request: int) -> _Waiting | None:
        """A request under way."""
        return self._waiting.get(request)

    def _end(self, how: str = "") -> None:
        """Ends the process, and with it all requests that it serves."""
        self.kill()
        waiting = [w for w in self._waiting.values() if not w.answer.done()]
        for one in waiting:
            ended = ProcessEnded(len(waiting) if not how else 0, how or self._how(), ran=one.since is not None)
            one.answer.set_exception(ended)

    def kill(self) -> None:
        """Ends the process at once, with the processes that the user's code started."""
        if not self.alive:
            return
        self.alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        kill_marked(_MARK, self._mark)
        for task in self._writes:
            # A process that holds Python's lock reads nothing: a write that waits for it would wait for ever.
            task.get_loop().remove_writer(self._socket)
            task.cancel()
        if self._reader is not None and not self._reader.done() and self._reader is not asyncio.current_task():
            # Before the socket is closed: the loop knows it by its number, which the next one may get.
            self._reader.get_loop().remove_reader(self._socket)
            self._reader.cancel()
        self._socket.close()

    def _how(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return f"crashed its process ({signal.Signals(-code).name})"
        return f"ended its process with exit code {code}"


async def _answered(waiting: _Waiting, limit: float) -> bool:
    """Waits for an answer; False once a stretch of user code takes over `limit` seconds."""
    while not waiting.answer.done():
        left = None if waiting.since is None else waiting.since + limit - time.monotonic()
        if left is not None and left <= 0:
            return False
        waiting.changed.clear()
        changed = asyncio.ensure_future(waiting.changed.wait())
        try:
            await asyncio.wait({changed, waiting.answer}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
    return True
