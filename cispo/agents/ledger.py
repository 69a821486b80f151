"""The conversations of one attempt as token ids: which part of a request was sampled, and which part is new.

    messages --place--> Place: ids of the prompt --engine--> Completion --record--> ledger --turns--> (Turn, ...)

A request's longest known beginning is taken as the ids that were read and sampled; the rest goes through
`Renderer.extend`. An unknown beginning is rendered as a whole and starts a segment, as does a history from which
`env.thinking` removes thoughts. A reply is recognised by its visible part, so a client that drops the reasoning, writes
the JSON of the arguments in another order or strips blanks still continues the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cispo.agents.contract import Reply
from cispo.agents.identity import as_json, canonical, identities, identity, thought_of, without_thought
from cispo.rollout.renderer import Renderer, Tools
from cispo.types import Completion, FinishReason, Message, Turn

Thinking = Literal["keep", "template", "drop"]
"""Thoughts in the history: appended always; as the chat template has it; or removed from every past reply."""


@dataclass(slots=True, kw_only=True)
class Sampled:
    """One sampled reply of the attempt."""

    number: int
    """Position in time, from 0."""
    before: Sampled | None
    """The reply whose prompt and tokens this one's prompt begins with; None where the prompt was rendered anew."""
    context: tuple[int, ...]
    """Tokens of the prompt behind those of `before`; the whole prompt without one."""
    completion: Completion
    reply: Reply

    @property
    def ids(self) -> list[int]:
        """Prompt and completion."""
        parts = [ids for one in self.chain for ids in (one.context, one.completion.token_ids)]
        return [token for part in parts for token in part]

    @property
    def chain(self) -> list[Sampled]:
        """The replies in the ids of this one, itself last."""
        chain: list[Sampled] = [self]
        while chain[-1].before is not None:
            chain.append(chain[-1].before)
        return chain[::-1]

    @property
    def ended(self) -> bool:
        """Whether the reply has its end token: without one, nothing can follow it."""
        return self.completion.finish_reason is FinishReason.STOP


@dataclass(slots=True, eq=False)
class _Node:
    """A message of a known conversation, behind those above it."""

    children: dict[str, list[_Node]] = field(default_factory=dict)
    """By the identity of the next message; replies that look alike share one."""
    sampled: Sampled | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A request's place among the conversations."""

    ids: tuple[int, ...]
    """The prompt."""
    before: Sampled | None
    """The reply that the prompt continues; None: the prompt starts a segment."""
    context: tuple[int, ...]
    """Tokens of the prompt behind those of `before`."""
    messages: tuple[Message, ...] = ()
    """The request's messages in canonical form."""
    node: _Node | None = None
    """The place in the tree of messages, under which the reply is filed."""


class Ledger:
    """The conversations of one attempt. Used by one event loop; nothing here waits.

    Example: place = ledger.place(messages, tools); completion = <sample place.ids>; ledger.record(place, completion,
    reply). The next request repeats the messages with the reply (`reply_message`, or a client's form of it) and more.
    """

    def __init__(self, renderer: Renderer, thinking: Thinking = "keep") -> None:
        self.renderer, self.thinking = renderer, thinking
        self.sampled: list[Sampled] = []
        """Every reply, in the order of time."""
        self._roots: dict[str, _Node] = {}

    def place(self, messages: Sequence[Message], tools: Tools = ()) -> Place:
        """The prompt of a chat request. Raises UserError where the chat template refuses the messages."""
        asked = tuple(map(canonical, messages))
        keys = [identity(message) for message in asked]
        root = self._roots.setdefault(as_json(list(tools)), _Node())
        path = _longest(root, asked, keys)
        known = max((n for n, node in enumerate(path) if node.sampled and node.sampled.ended), default=None)
        before = None if known is None else path[known].sampled
        filed = path[-1] if path else root
        for key in keys[len(path) :]:
            node = _Node()
            filed.children.setdefault(key, []).append(node)
            filed = node
        replies = [node.sampled.reply if node.sampled else None for node in path]
        replies += [None] * (len(asked) - len(replies))
        if before is None:
            place = self.restart(asked, replies, tools)
        else:
            assert known is not None
            place = self.follow(before, asked[known + 1 :], asked, replies, tools)
        return replace(place, messages=asked, node=filed)

    def follow(
        self,
        before: Sampled,
        rest: Sequence[Message],
        history: Sequence[Message],
        replies: Sequence[Reply | None],
        tools: Tools = (),
        plain: int = 0,
    ) -> Place:
        """The prompt behind a reply that `rest` answers; `history` is the whole conversation, as `restart` takes it."""
        if self._rewrites(before, rest, tools):
            return self.restart(history, replies, tools, plain)
        context = self.renderer.extend(rest, before.completion.token_ids, tools)
        return self._continuing(before, context)

    def restart(
        self, history: Sequence[Message], replies: Sequence[Reply | None], tools: Tools = (), plain: int = 0
    ) -> Place:
        """The prompt of a conversation that is rendered as a whole.

        `replies` has for each message the reply that it is, or None. The first `plain` messages are a dataset's prompt.
        """
        shown = [self._shown(message, reply) for message, reply in zip(history, replies, strict=True)]
        return begin(self.renderer.render_history(shown, tools, plain))

    def place_ids(self, ids: Sequence[int]) -> Place:
        """The prompt of a request that gives token ids: it continues the longest reply whose ids it begins with."""
        ids = list(ids)
        found, length = None, 0
        for one in self.sampled:
            own = one.ids
            if len(own) > length and ids[: len(own)] == own:
                found, length = one, len(own)
        return Place(ids=tuple(ids), before=found, context=tuple(ids[length:]))

    def place_text(self, text: str) -> Place:
        """The prompt of a request that gives text: it continues the longest reply whose text it begins with.

        The end token of that reply, which its text does not show, stays.
        """
        found, length = None, 0
        for one in self.sampled:
            own = self.renderer.decode_reply(one.ids)
            if one.ended and len(own) > length and text.startswith(own):
                found, length = one, len(own)
        if found is None:
            return begin(self.renderer.encode_prompt(text))
        return self._continuing(found, self.renderer.encode_text(text[length:]))

    def record(self, place: Place, completion: Completion, reply: Reply) -> Sampled:
        """Files the reply that was sampled at a place."""
        one = Sampled(
            number=len(self.sampled), before=place.before, context=place.context, completion=completion, reply=reply
        )
        self.sampled.append(one)
        if place.node is not None:
            node = _Node(sampled=one)
            for key in identities(reply):
                place.node.children.setdefault(key, []).append(node)
        return one

    def turns(
        self, rewards: Mapping[int, Mapping[str, float]] | None = None, kept: Collection[int] | None = None
    ) -> tuple[Turn, ...]:
        """The attempt's turns, segment after segment; of the `kept` replies, where given.

        `rewards` are by name, those of each reply; `rewards` and `kept` have its `number`.
        A segment ends where its last reply was sampled, and the segments are in the order of their ends: the last turn
        is the last reply in time. Where two requests continue one reply, the first of them continues its segment; the
        other reads the whole prompt as context. Each sampled token is in one turn.
        """
        segments = self.segments(kept)
        return tuple(
            Turn(
                context_ids=one.context if place or one.before is None else tuple(_prompt(one)),
                completion=one.completion,
                continues=place > 0,
                rewards=(rewards or {}).get(one.number, {}),
            )
            for segment in segments
            for place, one in enumerate(segment)
        )

    def segments(self, kept: Collection[int] | None = None) -> list[list[Sampled]]:
        """The replies in the order of `turns`, a list a segment."""
        segments: list[list[Sampled]] = []
        for one in self.sampled:
            if kept is not None and one.number not in kept:
                continue
            open_end = next((s for s in segments if s[-1] is one.before), None)
            if open_end is None:
                segments.append([one])
            else:
                open_end.append(one)
        return sorted(segments, key=lambda segment: segment[-1].number)

    def _continuing(self, before: Sampled, context: Sequence[int]) -> Place:
        return Place(ids=(*before.ids, *context), before=before, context=tuple(context))

    def _rewrites(self, before: Sampled, rest: Sequence[Message], tools: Tools) -> bool:
        """Whether `env.thinking` removes a thought from the history that `rest` follows."""
        if self.thinking == "keep" or not any(one.reply.thinks for one in before.chain):
            return False
        return self.thinking == "drop" or not self.renderer.keeps_thought(rest, tools)

    def _shown(self, message: Message, reply: Reply | None) -> Message:
        """A message of a history that is rendered anew: recognised replies with the thoughts that a client dropped,
        or under `drop` without any."""
        if message["role"] != "assistant":
            return message
        if reply is not None and self.thinking != "keep":
            return reply_message(self.renderer, reply, thought=self.thinking == "template")
        return without_thought(message) if self.thinking == "drop" else message


def begin(ids: Sequence[int]) -> Place:
    """The place of a prompt that continues nothing."""
    return Place(ids=tuple(ids), before=None, context=tuple(ids))


def reply_message(renderer: Renderer, reply: Reply, *, thought: bool = True) -> Message:
    """A reply as the chat template takes it; without a template, as the text that was sampled."""
    if renderer.tokenizer.chat_template is None:
        return {"role": "assistant", "content": reply.text if thought else reply.remembered}
    message: dict[str, object] = {"role": "assistant", "content": reply.content}
    if thought and reply.thought:
        message |= renderer.thought_fields(reply.thought, reply.content)
    if reply.calls:
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
            for c in reply.calls
        ]
    return message


def _longest(root: _Node, messages: Sequence[Message], keys: Sequence[str]) -> list[_Node]:
    """The nodes of the known beginning: through the replies that reach the deepest sampled one; of replies that look
    alike the one with the request's thought, else the last."""

    def score(path: list[_Node]) -> tuple[int, int, int]:
        deepest = max((n + 1 for n, node in enumerate(path) if node.sampled and node.sampled.ended), default=0)
        pairs = zip(path, messages, strict=False)
        same = sum(node.sampled is not None and node.sampled.reply.thought == thought_of(m) != "" for node, m in pairs)
        newest = max((node.sampled.number for node in path if node.sampled), default=-1)
        return deepest, same, newest

    best: list[_Node] = []
    waiting: list[list[_Node]] = [[]]
    while waiting:
        path = waiting.pop()
        at = path[-1] if path else root
        found = at.children.get(keys[len(path)], []) if len(path) < len(keys) else []
        waiting += [[*path, node] for node in found]
        if not found and (score(path), len(path)) > (score(best), len(best)):
            best = path
    return best


def _prompt(one: Sampled) -> Iterator[int]:
    yield from one.before.ids if one.before is not None else ()
    yield from one.context
