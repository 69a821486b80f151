"""The policy as an agent's attempt asks it, on the driver's side.

    messages --ledger--> prompt ids --sampler: rounds or apart--> completion --parser--> Reply, filed in the ledger

A reply is sampled once: where the agent's process ends, another one runs the agent from its start, and the requests
that it repeats are answered with the replies that they got.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cispo.agents.chat import Ask, ChatEnded, ChatRefused, ContextFull, OutOfTurns, Told, error_of
from cispo.agents.contract import Reply
from cispo.agents.ledger import Ledger, Place, Sampled, reply_message
from cispo.agents.parsing import Parser, parser_of
from cispo.errors import UserError
from cispo.rollout.renderer import Renderer, Tools
from cispo.types import Completion, Message, Turn

SampleTurn = Callable[[Sequence[int], int | None], Awaitable[Completion]]
"""(prompt, most tokens where that is below the run's limit) -> the policy's reply."""

_Request = tuple[str, int]
"""Body of a request, and how many equal ones came before it in the agent's present life."""


# Requests for each of `env.max_turns`, a client's retries included: an agent that repeats a request for ever ends.
_PER_TURN = 8


class Listener:
    """From a completion to a `Reply`, with the recipe's parser for each set of tools."""

    def __init__(self, renderer: Renderer, parser: str | None) -> None:
        self._renderer, self._name = renderer, parser
        self._parsers: dict[str, Parser] = {}

    def check(self, tools: Tools) -> None:
        """Raises UserError where the recipe names no parser that exists."""
        self._parser(tools)

    def hear(self, completion: Completion, tools: Tools, prompt_tokens: int = 0, number: int | None = None) -> Reply:
        """The reply with its parts, and as the message that a next request repeats.

        With its `number` in the attempt, the ids of its calls are of the attempt and not of the reply alone: agents
        look results up by them.
        """
        text = self._renderer.decode(completion.token_ids)
        parse = self._parser(tools)
        reply = parse(self._renderer.decode_reply(completion.token_ids) if self._name else text)
        calls = reply.calls
        if number is not None:
            calls = tuple(replace(call, id=f"call_{number}_{place}") for place, call in enumerate(calls))
        reply = replace(
            reply,
            calls=calls,
            finish_reason=completion.finish_reason,
            prompt_tokens=prompt_tokens,
            tokens=len(completion.token_ids),
        )
        return replace(reply, message=reply_message(self._renderer, reply))

    def _parser(self, tools: Tools) -> Parser:
        key = json.dumps(list(tools), sort_keys=True, default=str)
        if key not in self._parsers:
            self._parsers[key] = parser_of(self._name, tools, self._renderer.tokenizer, "env.tool_parser")
        return self._parsers[key]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of an attempt."""

    max_turns: int
    max_context: int


class Conversations:
    """The policy, for one attempt. Used in one event loop."""

    def __init__(self, ledger: Ledger, sample: SampleTurn, listener: Listener, limits: Limits) -> None:
        self.ledger = ledger
        self.events = {"calls": 0, "failed": 0, "unreadable": 0}
        self._sample, self._listener, self._limits = sample, listener, limits
        self._answers: dict[_Request, asyncio.Task[Sampled]] = {}
        self._asked: dict[_Request, None] = {}
        """Requests of the agent's present life, in order."""
        self._count: Counter[str] = Counter()
        self._requests = 0
        self._last: tuple[Message, ...] = ()

    def check(self, tools: Tools) -> None:
        """Raises ChatRefused for tools of an agent that the recipe's parser does not take."""
        try:
            self._listener.check(tools)
        # Parsers of vLLM and of users validate tools as they like.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ChatRefused(f"the tools cannot be read: {reason:.300}") from None

    def begin(self) -> None:
        """The agent starts, or starts again in another process: its requests are counted from the first."""
        self._asked.clear()
        self._count.clear()
        self._requests = 0

    async def ask(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        max_tokens: int | None = None,
        *,
        once: bool = False,
    ) -> Reply:
        """The reply to a chat request.

        With `once` an equal request has the same answer, as a client's retries need; without it each is sampled, and
        the n-th of them has the answer of the n-th of an earlier life. Raises ContextFull, OutOfTurns and ChatRefused.
        """
        body = json.dumps([list(messages), list(tools), max_tokens], sort_keys=True, default=str)
        return (await self._answer(body, lambda: self._placed(messages, tools), tools, max_tokens, once)).reply

    async def ask_at(
        self,
        place: Callable[[], Place],
        body: str,
        max_tokens: int | None = None,
        *,
        tools: Tools = (),
        once: bool = False,
    ) -> Sampled:
        """The same for a prompt of any form: `place` is called when it is sampled, and `body` identifies it."""
        return await self._answer(body, place, tools, max_tokens, once)

    async def tell(self, asks: Sequence[Ask]) -> tuple[Told, ...]:
        """Answers to requests that an agent's process sent together."""
        return tuple(await asyncio.gather(*map(self._told, asks)))

    async def _told(self, ask: Ask) -> Told:
        try:
            return Told(ask.number, await self.ask(ask.messages, ask.tools, ask.max_tokens))
        except (ChatEnded, ChatRefused) as error:
            return Told(ask.number, None, error_of(error), str(error))

    async def _answer(
        self, body: str, place: Callable[[], Place], tools: Tools, max_tokens: int | None, once: bool
    ) -> Sampled:
        request = (body, 0 if once else self._count[body])
        self._requests += 1
        turns = self._limits.max_turns
        if (request not in self._asked and len(self._asked) >= turns) or self._requests > _PER_TURN * turns:
            raise OutOfTurns(f"the attempt has used its {turns} turns (env.max_turns)")
        task = self._answers.get(request)
        if task is None:
            placed = place()
            if len(placed.ids) >= self._limits.max_context:
                raise ContextFull(
                    f"the messages have {len(placed.ids)} tokens, and rollout.max_context is {self._limits.max_context}"
                )
            task = asyncio.create_task(self._sampled(placed, tools, max_tokens))
            self._answers[request] = task
        self._count[body] += 1
        self._asked[request] = None
        # The reply outlives a process that asked for it.
        return await asyncio.shield(task)

    async def _sampled(self, place: Place, tools: Tools, max_tokens: int | None) -> Sampled:
        completion = await self._sample(place.ids, max_tokens)
        reply = self._listener.hear(completion, tools, len(place.ids), len(self.ledger.sampled))
        self.events["calls"] += len(reply.calls)
        self.events["unreadable"] += bool(reply.problem)
        self._last = (*place.messages, reply.message)
        return self.ledger.record(place, completion, reply)

    def _placed(self, messages: Sequence[Message], tools: Tools) -> Place:
        try:
            return self.ledger.place(messages, tools)
        except UserError as error:
            raise ChatRefused(str(error)) from None

    def close(self) -> None:
        """Ends the requests that are open."""
        for task in self._answers.values():
            task.cancel()

    def turns(self, rewards: Mapping[str, float]) -> tuple[Turn, ...]:
        """The turns of the agent's last life, with its rewards on the last of them."""
        kept = {task.result().number for r in self._asked if (task := self._answers[r]).done() and not task.cancelled()}
        return self.ledger.turns({max(kept, default=0): rewards}, kept)

    def said(self, prompt: Sequence[Message]) -> tuple[Message, ...]:
        """The conversation of the last reply, behind the prompt where it begins with it."""
        length = len(prompt)
        begins = [dict(m) for m in self._last[:length]] == [dict(m) for m in prompt]
        return self._last[length:] if begins else self._last
