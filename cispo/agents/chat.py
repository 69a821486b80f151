"""The policy as a function of chat messages: the seam between an agent of the user and the engines.

    async def solve(chat: Chat, question: str, **_) -> float | Mapping[str, float] | None      the agent, in its process
        reply = await chat(messages) --Ask--> driver: ledger, rounds, engines --Told--> reply

The agent owns its loop: it may rewrite the history, ask for summaries, or let sub-agents ask side by side.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from cispo.agents.contract import Reply, Status
from cispo.agents.tools import tool_of
from cispo.types import Message

ToolLike = Callable[..., object] | Mapping[str, object]
"""A function with type hints, or a tool in JSON schema."""


class ChatEnded(Exception):
    """The policy cannot be asked: an agent that does not catch it ends its attempt with `status`."""

    status: Status


class ContextFull(ChatEnded):
    """The messages leave no room for a reply in `rollout.max_context`: fewer of them may be asked."""

    status = Status.CONTEXT


class OutOfTurns(ChatEnded):
    """`env.max_turns` replies were sampled."""

    status = Status.TURNS


class ChatRefused(ValueError):
    """The chat template refuses the messages; the message says why."""


class Chat(Protocol):
    """The policy, for one attempt.

    Example: reply = await chat([{"role": "user", "content": "2+2?"}]); then reply.text, reply.calls, and for the next
    request reply.message.
    """

    async def __call__(
        self, messages: Sequence[Message], *, tools: Sequence[ToolLike] = (), max_tokens: int | None = None
    ) -> Reply:
        """The policy's reply to a conversation. The same messages asked again are sampled again.

        `max_tokens` can only lower `rollout.max_tokens`. Raises ContextFull, OutOfTurns and ChatRefused.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to the policy."""

    number: int
    """Of the agent's life in its process, from 0."""
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...]
    max_tokens: int | None


@dataclass(frozen=True, slots=True)
class Told:
    """The answer to an `Ask`: a reply, or the error that the agent gets."""

    number: int
    reply: Reply | None
    error: Literal["", "context", "turns", "refused", "ended"] = ""
    sentence: str = ""

    def result(self) -> Reply:
        """The reply. Raises the error."""
        match self.error:
            case "context":
                raise ContextFull(self.sentence)
            case "turns":
                raise OutOfTurns(self.sentence)
            case "refused":
                raise ChatRefused(self.sentence)
            case "ended":
                raise asyncio.CancelledError(self.sentence)
        assert self.reply is not None
        return self.reply


def error_of(error: Exception) -> Literal["context", "turns", "refused"]:
    """The name of an error of `Chat` in a `Told`."""
    return "context" if isinstance(error, ContextFull) else "turns" if isinstance(error, OutOfTurns) else "refused"


Send = Callable[[tuple[Ask, ...]], None]


_Open = TypeVar("_Open", asyncio.Future[Told], Future[Told])


class _Requests(Generic[_Open]):
    """Requests of one agent that wait for their answers."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._open: dict[int, _Open] = {}
        self._numbers = itertools.count()

    def tell(self, answers: Sequence[Told]) -> None:
        for told in answers:
            waiting = self._open.get(told.number)
            if waiting is not None and not waiting.done():
                waiting.set_result(told)

    def end(self) -> None:
        """Ends all requests that are open."""
        self.tell([Told(number, None, "ended", "the attempt is over") for number in list(self._open)])


class AgentChat(_Requests[asyncio.Future[Told]]):
    """`Chat` of an agent whose event loop runs in a thread of its own."""

    def __init__(self, send: Send, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(send)
        self._loop = loop
        self._unsent: list[Ask] = []

    async def __call__(
        self, messages: Sequence[Message], *, tools: Sequence[ToolLike] = (), max_tokens: int | None = None
    ) -> Reply:
        ask = ask_of(next(self._numbers), messages, tools, max_tokens)
        self._open[ask.number] = self._loop.create_future()
        self._unsent.append(ask)
        if len(self._unsent) == 1:
            # Behind the tasks that are ready: those that ask side by side are asked together.
            self._loop.call_soon(self._flush)
        try:
            return (await self._open[ask.number]).result()
        finally:
            self._open.pop(ask.number, None)

    def _flush(self) -> None:
        asks, self._unsent = tuple(self._unsent), []
        self._send(asks)

    def tell(self, answers: Sequence[Told]) -> None:
        """Delivers answers, those of one frame in one step; called from any thread."""
        self._loop.call_soon_threadsafe(super().tell, answers)


class PlainChat(_Requests[Future[Told]]):
    """The same for an agent that is a plain function: a call blocks."""

    def __call__(
        self, messages: Sequence[Message], *, tools: Sequence[ToolLike] = (), max_tokens: int | None = None
    ) -> Reply:
        ask = ask_of(next(self._numbers), messages, tools, max_tokens)
        self._open[ask.number] = waiting = Future()
        self._send((ask,))
        try:
            return waiting.result().result()
        finally:
            self._open.pop(ask.number, None)


def ask_of(number: int, messages: Sequence[Message], tools: Sequence[ToolLike], max_tokens: int | None) -> Ask:
    """The request of a call. Raises ChatRefused for arguments that are no messages, tools or number."""
    if isinstance(messages, str) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages
    ):
        raise ChatRefused("chat takes a list of messages, each with a role")
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
        raise ChatRefused(f"chat takes a max_tokens of at least 1, not {max_tokens!r:.40}")
    definitions = tuple(tool if isinstance(tool, Mapping) else tool_of(tool, "chat").definition for tool in tools)
    return Ask(number, tuple(dict(message) for message in messages), definitions, max_tokens)
