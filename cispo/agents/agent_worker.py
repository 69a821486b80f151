"""An agent of the user in its process: a function that owns its loop, in a thread of its own.

    solve(chat, **columns) --Asked--> driver --Told--> solve ... --> rewards by name, or the error that ended it

A thread an agent: one that blocks stops no other, and as many may wait for the policy as there are attempts.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cispo.agents.chat import AgentChat, Ask, ChatEnded, PlainChat, Told
from cispo.agents.environment import accepted, named_rewards

Send = Callable[[tuple[Ask, ...]], None]


_CLIENT = frozenset(("base_url", "api_key"))
"""Parameters of an agent that asks the policy with a client of OpenAI's API."""

_GIVEN = _CLIENT | {"chat", "messages", "seed", "attempt"}
"""Parameters that are no columns: the policy, the prompt's messages, and the attempt's identity."""


def is_agent(used: Sequence[object], key: str) -> bool:
    """Whether the object that `env.use` names is a function with a parameter `chat`, or with those of a client."""
    if key != "env.use" or not inspect.isfunction(used[0]):
        return False
    return "chat" in inspect.signature(used[0]).parameters or takes_client(used[0])


def takes_client(function: object) -> bool:
    """Whether an agent asks the policy with a client of OpenAI's API."""
    assert callable(function)
    return _CLIENT <= inspect.signature(function).parameters.keys()


def bypass_proxies() -> None:
    """A client must not ask a proxy that the environment names for the endpoint, which is on this machine."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))


def agent_columns(function: object) -> frozenset[str]:
    """Columns of the dataset row that an agent needs: its parameters without a default."""
    assert callable(function)
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind in kinds and p.default is p.empty) - _GIVEN


@dataclass(frozen=True, slots=True)
class Solved:
    """The end of an agent."""

    rewards: Mapping[str, float]
    status: str = ""
    """The status of an agent that a bound of `Chat` ended."""


class Agent:
    """One attempt of an agent."""

    def __init__(
        self, session: int, function: Callable[..., object], columns: Mapping[str, object], send: Send
    ) -> None:
        self.session = session
        self._function, self._columns, self._send = function, columns, send
        self._chat: AgentChat | PlainChat | None = None

    async def solve(self) -> Solved:
        """Runs the agent to its end. Its errors pass."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Solved] = loop.create_future()

        def run() -> None:
            result, failure = None, None
            try:
                result = self._run()
            # User code may raise anything, and a thread has nobody above it.
            except BaseException as error:
                failure = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")

            def settle() -> None:
                if not done.done():
                    done.set_exception(failure) if failure is not None else done.set_result(result or Solved({}))

            loop.call_soon_threadsafe(settle)

        threading.Thread(target=run, daemon=True).start()
        return await done

    def _run(self) -> Solved:
        try:
            if inspect.iscoroutinefunction(self._function):
                value = asyncio.run(self._solve())
            else:
                self._chat = chat = PlainChat(self._send)
                value = self._function(**self._arguments(chat))
        except ChatEnded as error:
            return Solved({}, str(error.status))
        except BaseExceptionGroup as group:
            ended, others = group.split(ChatEnded)
            if ended is None or others is not None:
                raise
            first = ended
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            assert isinstance(first, ChatEnded)
            return Solved({}, str(first.status))
        return Solved(named_rewards(value, "agent"))

    async def _solve(self) -> object:
        self._chat = chat = AgentChat(self._send, asyncio.get_running_loop())
        value = self._function(**self._arguments(chat))
        assert inspect.isawaitable(value)
        return await value

    def _arguments(self, chat: AgentChat | PlainChat) -> dict[str, object]:
        return accepted(self._function, {**self._columns, "chat": chat})

    def tell(self, answers: Sequence[Told]) -> None:
        """Delivers the policy's replies; called from any thread."""
        if self._chat is not None:
            self._chat.tell(answers)

    def end(self) -> None:
        """Ends the agent's open requests: its attempt is over."""
        if self._chat is not None:
            self._chat.end()
