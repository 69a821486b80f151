"""Requests and answers in the form of OpenAI's API.

HTTP body --read_body--> JSON --messages_of, tools_of, prompt_of, limit_of--> a request to the policy
reply --said_of, calls_of, finish_of, usage_of--> JSON
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

from aiohttp import web

from cispo.agents.contract import Reply
from cispo.agents.ledger import Sampled
from cispo.types import FinishReason, Message

MODEL = "policy"
"""Name of the model; requests may give any other."""

LARGEST_BODY = 64 << 20
"""Bytes of a request."""

Json = dict[str, object]


class Refused(Exception):
    """An answer of OpenAI's error form."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def response(self) -> web.Response:
        error = {"message": str(self), "type": "invalid_request_error", "param": self.param, "code": self.code}
        return web.json_response({"error": error}, status=self.status)


TRANSPORT = ("stream", "stream_options")
"""Fields that say how an answer is sent."""

# Values that leave the distribution as it is.
_NEUTRAL: Mapping[str, Sequence[object]] = {"n": (None, 1), "best_of": (None, 1), "logit_bias": (None, {})}
_REASONS = {
    "n": "n must be 1: every reply of an attempt is trained on",
    "best_of": "best_of must be 1: every reply of an attempt is trained on",
    "logit_bias": "logit_bias is not supported: replies are drawn from the policy's own distribution",
}


async def read_body(request: web.Request) -> Json:
    """The request's JSON object. Raises Refused for any other body and for parameters that cannot be ignored."""
    try:
        body = json.loads(await request.read())
    except web.HTTPRequestEntityTooLarge:
        raise Refused(400, f"the request has over {LARGEST_BODY >> 20} MiB") from None
    except (ValueError, RecursionError):
        raise Refused(400, "the request is no JSON") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request is no JSON object")
    for name, neutral in _NEUTRAL.items():
        if body.get(name) not in neutral:
            raise Refused(400, _REASONS[name], param=name)
    return body


def messages_of(body: Json) -> list[Message]:
    """The conversation. Their contents are the chat template's concern."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of at least one message", param="messages")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Refused(400, f"messages[{number}] is no message with a role", param="messages")
    return messages


def tools_of(body: Json) -> list[Mapping[str, object]]:
    """The tools in JSON schema, each with parameters."""
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Refused(400, "tools must be a list of tools", param="tools")
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Refused(400, f"tools[{number}] is no function with a name", param="tools")
        schema = function.get("parameters") or {}
        if not isinstance(schema, Mapping) or not isinstance(schema.get("properties", {}), Mapping):
            raise Refused(400, f"tools[{number}] has parameters that are no JSON schema", param="tools")
    return [_with_parameters(tool) for tool in tools]


def _with_parameters(tool: Mapping[str, object]) -> Mapping[str, object]:
    """A tool whose function has a schema, as parsers expect."""
    function = tool["function"]
    assert isinstance(function, Mapping)
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {**tool, "function": {**function, "parameters": schema}}


def prompt_of(body: Json, *, vocabulary: int) -> str | list[int]:
    """The prompt of a completion: text, or token ids below the size of the `vocabulary`."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        if not all(0 <= token < vocabulary for token in prompt):
            raise Refused(400, f"prompt has token ids outside of 0 to {vocabulary - 1}", param="prompt")
        return prompt
    raise Refused(400, "prompt must be one text or one list of token ids", param="prompt")


def limit_of(body: Json) -> int | None:
    """The most tokens of the answer; None leaves the run's."""
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise Refused(400, f"{name} must be a number of at least 1", param=name)
        return value
    return None


def said_of(reply: Reply) -> Json:
    """A reply as a message of OpenAI's API."""
    calls = calls_of(reply)
    message: Json = {"role": "assistant", "content": None if calls and not reply.content else reply.content}
    if reply.thought:
        message["reasoning_content"] = reply.thought
    return {**message, "tool_calls": calls} if calls else message


def calls_of(reply: Reply) -> list[Json]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
        }
        for call in reply.calls
    ]


def finish_of(reply: Reply) -> str:
    if reply.finish_reason is not FinishReason.STOP:
        return "length"
    return "tool_calls" if reply.calls else "stop"


def envelope_of(body: Json, kind: str, sampled: Sampled) -> Json:
    model = body.get("model")
    return {
        "id": f"{'cmpl' if kind == 'text_completion' else 'chatcmpl'}-{sampled.number}",
        "object": kind,
        "created": int(time.time()),
        "model": model if isinstance(model, str) else MODEL,
    }


def usage_of(sampled: Sampled) -> Json:
    read, said = sampled.reply.prompt_tokens, sampled.reply.tokens
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


def ids_of(body: Json, sampled: Sampled) -> Json:
    """The sampled tokens, in vLLM's field, where a request asks for them."""
    return {"token_ids": list(sampled.completion.token_ids)} if body.get("return_token_ids") else {}
