"""Messages of clients in one form, and the part of a message that a client gives back unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from cispo.agents.contract import Reply
from cispo.agents.parsing import split_thought
from cispo.types import Message

_THOUGHTS = ("reasoning_content", "reasoning")
_OF_THE_API = ("refusal", "annotations", "audio", "function_call")
"""Fields of OpenAI's replies that no template reads."""


def without_thought(message: Message) -> Message:
    """A message of the policy without its thought."""
    content = message["content"]
    spoken = split_thought(content)[1] if isinstance(content, str) else content
    return {**{k: v for k, v in message.items() if k not in _THOUGHTS}, "content": spoken}


def canonical(message: Message) -> Message:
    """A message of a client in the form that chat templates take: text for lists of text parts, "" for no content, role
    `system` for `developer`, and arguments of calls as objects."""
    role = message.get("role")
    own = {name: value for name, value in message.items() if value is not None and name not in _OF_THE_API}
    own |= {"role": "system" if role == "developer" else role, "content": _text(message)}
    calls = own.pop("tool_calls", ())
    if isinstance(calls, Sequence) and not isinstance(calls, str) and calls:
        own["tool_calls"] = [_call(call) for call in calls]
    if "reasoning" in own:
        thought = own.pop("reasoning")
        own.setdefault("reasoning_content", thought)
    return own


def identity(message: Message) -> str:
    """The part of a canonical message that a client gives back unchanged: no thought, no ids of calls, no blanks at the
    ends, arguments in any order."""
    content, role = message["content"], message["role"]
    calls: list[object] = []
    if role == "assistant":
        content = split_thought(content)[1] if isinstance(content, str) else content
        given = message.get("tool_calls", ())
        calls = [_called(call) for call in given] if isinstance(given, Sequence) else []
    content = content.strip() if isinstance(content, str) else content
    name = message.get("name") if role in ("user", "system") else None
    return as_json([role, content, calls, name])


def identities(reply: Reply) -> set[str]:
    """Identities of the forms in which clients give a reply back: its content and calls, or its text with or without
    the thought, with the calls as fields or in the text alone."""
    calls = [{"function": {"name": c.name, "arguments": dict(c.arguments)}} for c in reply.calls]
    forms = [(reply.content, calls), *((text, c) for text in (reply.text, reply.remembered) for c in (calls, []))]
    found = set[str]()
    for content, own in forms:
        message: Message = {"role": "assistant", "content": content, "tool_calls": own}
        found.add(identity(message))
        # A parser's own marks of a thought: the text as it is.
        found.add(as_json(["assistant", content.strip(), [_called(call) for call in own], None]))
    return found


def thought_of(message: Message) -> str:
    """The thought that a client gave back."""
    given = message.get("reasoning_content")
    if isinstance(given, str):
        return given.strip()
    content = message["content"]
    return split_thought(content)[0] if isinstance(content, str) else ""


def _text(message: Message) -> object:
    """The content as text where it consists of text."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    return content


def _call(call: object) -> object:
    """A call with its arguments as an object, where they are JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return call
    return {**call, "function": {**function, "arguments": arguments}}


def _called(call: object) -> object:
    """Name and arguments of a call."""
    function = call.get("function") if isinstance(call, Mapping) else None
    return [function.get("name"), function.get("arguments")] if isinstance(function, Mapping) else call


def as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
