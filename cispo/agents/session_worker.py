"""The process that runs environments and tools, and its messages to and from the driver (`session_process`).

    driver   Setup, Request, Request, ...   ->   worker: one task a request, plain functions in threads
    driver   <-   Ready, Started, Answer, ...            frames as those of a reward worker
    driver   <-   Asked   ->   Replies                   of an agent: its requests to the policy, and the answers

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

from cispo.agents.agent_worker import Agent, Solved, agent_columns, bypass_proxies, is_agent, takes_client
from cispo.agents.chat import Ask, Told
from cispo.agents.contract import Reply, Step
from cispo.agents.environment import BadStep, Identity, Observation, Session, open_session, used_tools
from cispo.agents.mcp_servers import McpServer, is_mcp
from cispo.errors import UserError
from cispo.recipe.user_code import load_object
from cispo.rollout.frames import receive, send

Verb = Literal["start", "step", "reward", "solve", "close", "ping"]

# Plain functions that run side by side in one process.
_THREADS = 64


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message: the objects that the recipe names."""

    used: tuple[str, ...]
    """module:name of a class or of functions, or commands of MCP servers."""
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
    agent: bool = False
    """Whether the object is a function that owns its loop."""
    takes_client: bool = False
    """Whether that function asks the policy with a client of OpenAI's API."""


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

    value: Observation | Step | Solved | dict[str, float] | None = None
    failed: int = 0
    """Calls of a step that failed."""
    problem: str = ""
    ends_run: bool = False
    """Whether the problem is the recipe's: a whole sentence."""


@dataclass(frozen=True, slots=True)
class Asked(Message):
    """An agent asks the policy: the request's time stands until all answers are on their way back."""

    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True)
class Replies(Message):
    """The answers to an `Asked`."""

    answers: tuple[Told, ...]


class SessionWorker:
    """Serves the requests of many sessions; those of one session come one after another."""

    def __init__(self, setup: Setup, used: list[object], connection: socket.socket) -> None:
        self.setup, self.used, self.connection = setup, used, connection
        self.sessions: dict[int, Session] = {}
        self.agents: dict[int, Agent] = {}
        """Agents that run, by the number of their request."""
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
                message = receive(self.connection, object)
            except (EOFError, ConnectionError):
                # The driver is gone: end, with the processes that the user's code started.
                os.killpg(0, signal.SIGKILL)
                return
            if isinstance(message, Request):
                loop.call_soon_threadsafe(requests.put_nowait, message)
            elif isinstance(message, Replies) and (agent := self.agents.get(message.id)) is not None:
                agent.tell(message.answers)

    async def _serve(self, request: Request) -> None:
        self._send(Started(request.id))
        try:
            answer = await self._answer(request)
        except BadStep as error:
            answer = Answer(request.id, problem=str(error))
        except UserError as error:
            answer = Answer(request.id, problem=str(error), ends_run=True)
        # User code may raise anything.
        except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
            text = " ".join(str(error).split())
            answer = Answer(request.id, problem=f"raised {type(error).__name__}: {text:.300}")
        self._send(answer)

    async def _answer(self, request: Request) -> Answer:
        if request.verb == "ping":
            return Answer(request.id)
        if request.verb == "solve":
            return Answer(request.id, await self._solve(request))
        session = self.sessions.get(request.session)
        if session is None:
            if request.verb == "close":
                for agent in [agent for agent in self.agents.values() if agent.session == request.session]:
                    agent.end()
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
            case _:
                del self.sessions[request.session]
                await session.close()
                return Answer(request.id)

    async def _solve(self, request: Request) -> Solved:
        columns = {**pickle.loads(request.columns), **self.setup.args}
        columns |= {"seed": request.identity.seed, "attempt": request.identity.attempt}
        function = self.used[0]
        assert callable(function)
        agent = Agent(request.session, function, columns, lambda asks: self._send(Asked(request.id, asks)))
        self.agents[request.id] = agent
        try:
            return await agent.solve()
        finally:
            del self.agents[request.id]

    def _send(self, frame: Started | Answer | Asked) -> None:
        with self._sending:
            send(self.connection, frame)


def main(connection_fd: int) -> None:
    """Imports the user's objects, answers `Ready`, and serves until the driver is gone."""
    connection = socket.socket(fileno=connection_fd)
    setup = receive(connection, Setup)
    try:
        # Outside of an event loop: a module may run one of its own while it is imported.
        used: list[object] = [
            McpServer(entry, setup.key) if is_mcp(entry) else load_object(entry, setup.key) for entry in setup.used
        ]
        asyncio.run(_serve(setup, used, connection))
    except UserError as error:
        send(connection, Ready((), error=str(error)))


async def _serve(setup: Setup, used: list[object], connection: socket.socket) -> None:
    """Raises UserError before `Ready` where an object could not be used."""
    for thing in used:
        if isinstance(thing, McpServer):
            await thing.start()
    if is_agent(used, setup.key):
        bypass_proxies()
        needed = agent_columns(used[0]) - setup.args.keys()
        send(connection, Ready((), needed, agent=True, takes_client=takes_client(used[0])))
        return await SessionWorker(setup, used, connection).run()
    tools = used_tools(used, setup.key)
    required = frozenset[str]().union(*(tool.required_columns for tool in tools)) - setup.args.keys()
    send(connection, Ready(tuple(tool.definition for tool in tools), required))
    await SessionWorker(setup, used, connection).run()
