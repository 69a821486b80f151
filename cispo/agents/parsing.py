"""From the tokens of a reply to its parts: thought, content and calls.

    text --parser--> Reply           compact form | vLLM's parsers by name | module:function of the user

Without a name, calls are read in the compact form of small policies: `[name argument, argument]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cispo.agents.contract import Reply, ToolCall
from cispo.errors import UserError
from cispo.recipe.user_code import load_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Parser = Callable[[str], Reply]
"""The text of a reply, special tokens included and without its end, to its parts."""

Definitions = Sequence[Mapping[str, object]]
"""Tools in JSON schema."""

_COMPACT = re.compile(r"\[([A-Za-z_]\w*)((?:\s[^\[\]]*)?)\]")
_THOUGHT = re.compile(r"\A\s*(?:<think>)?(.*?)</think>", re.DOTALL)


def parser_of(name: str | None, tools: Definitions, tokenizer: PreTrainedTokenizerBase, key: str) -> Parser:
    """The parser that the recipe names. Raises UserError for an unknown name."""
    if name is None:
        return lambda text: compact(text, tools)
    if ":" in name:
        return _of_user(load_object(name, key), name)
    return _of_vllm(name, tools, tokenizer, key)


def compact(text: str, tools: Definitions) -> Reply:
    """Reads `[name a, b]` calls: arguments by position, of a single parameter the whole rest."""
    thought, content = split_thought(text)
    parameters = {_function(tool)["name"]: list(_properties(tool)) for tool in tools}
    calls, problem = list[ToolCall](), ""
    for match in _COMPACT.finditer(content):
        name, rest = match[1], match[2].strip()
        names = parameters.get(name, [])
        values = [rest] if len(names) == 1 else [part.strip() for part in rest.split(",")] if rest else []
        if name in parameters and len(values) > len(names):
            problem = f"{name} takes {len(names)} arguments, not {len(values)}"
            continue
        # Of an unknown tool the arguments have no names: the call fails by the name alone.
        arguments = dict(zip(names or map(str, range(len(values))), values, strict=False))
        calls.append(ToolCall(id=f"call_{len(calls)}", name=name, arguments=arguments))
    left = _COMPACT.sub("", content).strip() if calls else content
    return Reply(text=text, content=left, thought=thought, calls=tuple(calls), problem=problem, spoken=content)


def split_thought(text: str) -> tuple[str, str]:
    """(thought, the rest) of a reply with a reasoning block up to </think>; its start mark may be the prompt's."""
    match = _THOUGHT.match(text)
    return ("", text) if match is None else (match[1].strip(), text[match.end() :])


def _function(tool: Mapping[str, object]) -> Mapping[str, object]:
    function = tool["function"]
    assert isinstance(function, Mapping)
    return function


def _properties(tool: Mapping[str, object]) -> Mapping[str, object]:
    schema = _function(tool)["parameters"]
    assert isinstance(schema, Mapping)
    properties = schema.get("properties", {})
    assert isinstance(properties, Mapping)
    return properties


def _of_user(function: Callable[[str], object], name: str) -> Parser:
    def parse(text: str) -> Reply:
        reply = function(text)
        if not isinstance(reply, Reply):
            raise UserError(f"env.tool_parser {name} returned {type(reply).__name__}, not a Reply")
        return replace(reply, text=text)

    return parse


def _of_vllm(name: str, tools: Definitions, tokenizer: Any, key: str) -> Parser:
    """vLLM's tool parser of that name, behind its reasoning parser of the same name where there is one."""
    # Seconds: imported only where a recipe names one.
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    try:
        kind = ToolParserManager.get_tool_parser(name)
    except KeyError:
        known = ", ".join(sorted(ToolParserManager.list_registered()))
        raise UserError(f"{key}: vLLM has no tool parser '{name}' (it has {known})") from None
    definitions = [json.loads(json.dumps(tool)) for tool in tools]
    request: Any = ChatCompletionRequest.model_validate(
        {"model": "", "messages": [{"role": "user", "content": ""}], **({"tools": definitions} if definitions else {})}
    )
    parser = kind(tokenizer, request.tools)
    reasoning = None
    if name in ReasoningParserManager.list_registered():
        reasoning = ReasoningParserManager.get_reasoning_parser(name)(tokenizer)

    def parse(text: str) -> Reply:
        thought, rest = "", text
        if reasoning is not None:
            # First: the tool parser alone takes the thought for content.
            found, left = reasoning.extract_reasoning(text, request)
            thought, rest = found or "", left or ""
        try:
            result = parser.extract_tool_calls(rest, request)
            calls = [
                ToolCall(id=f"call_{number}", name=call.function.name, arguments=json.loads(call.function.arguments))
                for number, call in enumerate(result.tool_calls)
            ]
        # The policy may write anything, and a parser may stumble over it.
        except Exception as error:
            reason = " ".join(str(error).split())
            return Reply(
                text=text, content=rest, thought=thought, problem=f"the call cannot be read: {reason:.200}", spoken=rest
            )
        return Reply(text=text, content=result.content or "", thought=thought, calls=tuple(calls), spoken=rest)

    return parse
