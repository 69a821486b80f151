"""The process that runs environments and tools, and its messages to and from the driver (`session_process`).

    driver   Setup, Request, Request, ...   ->   worker: one task a request, plain functions in threads
    driver   <-   Ready, Started, Answer, ...            frames as those of a reward worker

A request names a session, which is made by its first request. The driver keeps the time: it counts from `Started`, and
a request over its limit ends the process. This module imports nothing heavy, so that a worker starts quickly.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from cispo.agents.contract import Reply, Step
from cispo.agents.environment import BadStep, Identity, Observation, Session, open_session, used_tools
from cispo.errors import UserError
from cispo.rollout.frames import receive, send
from cispo.user_code import load_object

Verb = Literal["start", "step", "reward", "close"]

# Plain functions that run side by side in one process.
_THREADS = 64


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message: the objects that the recipe names."""

    used: tuple[str, ...]
    """module:name of a class, or of functions."""
    args: Mapping[str, object]
    """Further columns of every row."""
    key: str
    """The recipe key that names them."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker's first answer: the tools in JSON schema, or the reason why an object could not be used."""

    tools: tuple[Mapping[str, object], ...]
    required: frozenset[str] = frozenset()
    """Columns that the tools need."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One verb of a session."""

    id: int
    session: int
    verb: Verb
    columns: bytes
    """The pickled columns of the dataset row."""
    identity: Identity
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A message on a request."""

    id: int


@dataclass(frozen=True, slots=True)
class Started(Message):
    """The request is being served: its time counts from here."""


@dataclass(frozen=True, slots=True)
class Answer(Message):
    """The request's result, or the predicate of a sentence on its failure."""

    value: Observation | Step | dict[str, float] | None = None
    failed: int = 0
    """Calls of a step that failed."""
    problem: str = ""


class SessionWorker:
    """Serves the requests of many sessions; those of one session come one after another."""

    def __init__(self, setup: Setup, used: list[object], connection: socket.socket) -> None:
        self.setup, self.used, self.connection = setup, used, connection
        self.sessions: dict[int, Session] = {}
        self._sending = threading.Lock()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(_THREADS))
        requests: asyncio.Queue[Request] = asyncio.Queue()
        threading.Thread(target=self._read, args=(loop, requests), daemon=True).start()
        # An event loop keeps weak references to its tasks only.
        running: set[asyncio.Task[None]] = set()
        while True:
            task = asyncio.create_task(self._serve(await requests.get()))
            running.add(task)
            task.add_done_callback(running.discard)

    def _read(self, loop: asyncio.AbstractEventLoop, requests: asyncio.Queue[Request]) -> None:
        while True:
            try:
                request = receive(self.connection, Request)
            except (EOFError, ConnectionError):
                # The driver is gone: end, with the processes that the user's code started.
                os.killpg(0, signal.SIGKILL)
                return
            loop.call_soon_threadsafe(requests.put_nowait, request)

    async def _serve(self, request: Request) -> None:
        self._send(Started(request.id))
        try:
            answer = await self._answer(request)
        except BadStep as error:
            answer = Answer(request.id, problem=str(error))
        # User code may raise anything.
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            text = " ".join(str(error).split())
            answer = Answer(request.id, problem=f"raised {type(error).__name__}: {text:.300}")
        self._send(answer)

    async def _answer(self, request: Request) -> Answer:
        session = self.sessions.get(request.session)
        if session is None:
            if request.verb == "close":
                return Answer(request.id)
            columns = {**pickle.loads(request.columns), **self.setup.args}
            session = await open_session(self.used, columns, request.identity, self.setup.key)
            self.sessions[request.session] = session
        match request.verb:
            case "start":
                return Answer(request.id, await session.start())
            case "step":
                assert request.reply is not None
                return Answer(request.id, *await session.step(request.reply))
            case "reward":
                return Answer(request.id, dict(await session.reward()))
            case "close":
                del self.sessions[request.session]
                await session.close()
                return Answer(request.id)

    def _send(self, frame: Started | Answer) -> None:
        with self._sending:
            send(self.connection, frame)


def main(connection_fd: int) -> None:
    """Imports the user's objects, answers `Ready`, and serves until the driver is gone."""
    connection = socket.socket(fileno=connection_fd)
    setup = receive(connection, Setup)
    try:
        used = [load_object(path, setup.key) for path in setup.used]
        tools = used_tools(used, setup.key)
    except UserError as error:
        send(connection, Ready((), error=str(error)))
        return
    required = frozenset[str]().union(*(tool.required_columns for tool in tools)) - setup.args.keys()
    send(connection, Ready(tuple(tool.definition for tool in tools), required))
    asyncio.run(SessionWorker(setup, used, connection).run())
