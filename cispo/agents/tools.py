"""A tool: a plain function of the user, its schema for the chat template, and its calls.

    def f(a: int, *, table: dict) -> str --tool_of--> Tool --definition--> the template's `tools`
    arguments of a call --call--> the function's result as text, or a ToolError with a sentence for the policy

Type hints give the schema and convert the arguments (pydantic); the docstring, in Google's, NumPy's or reST's style,
gives the descriptions. Keyword-only parameters are columns of the dataset row, hidden from the policy; `session` is the
attempt's own dictionary, empty at first.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_type_hints

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from cispo.errors import UserError

SESSION = "session"
"""Keyword-only parameter for the attempt's own dictionary: a tool keeps its state there."""

# Characters of an error's message that a policy reads.
_ERROR_LENGTH = 300


class ToolError(Exception):
    """A call that the policy can mend; the message is a sentence for it."""


class AnyTool(Protocol):
    """A tool of the policy: a function, or one of an MCP server."""

    @property
    def name(self) -> str: ...

    @property
    def definition(self) -> dict[str, object]:
        """The tool in JSON schema, as chat templates and OpenAI's API take it."""
        ...

    @property
    def required_columns(self) -> frozenset[str]:
        """Columns of the dataset row that its calls need."""
        ...

    async def call(self, arguments: Mapping[str, object], columns: Mapping[str, object]) -> object:
        """The result of a call. Raises ToolError with a sentence for the policy; other errors pass."""
        ...


@dataclass(frozen=True, slots=True)
class Tool:
    """One function with the two halves of its signature."""

    name: str
    description: str
    function: Callable[..., object]
    arguments: type[BaseModel]
    """Model of the parameters that the policy fills in."""
    columns: frozenset[str]
    """Names of the keyword-only parameters."""
    required_columns: frozenset[str]
    """Those without a default."""

    @property
    def definition(self) -> dict[str, object]:
        """The function in JSON schema, as chat templates and OpenAI's API take it."""
        schema = self.arguments.model_json_schema()
        schema.pop("title", None)
        for parameter in schema.get("properties", {}).values():
            parameter.pop("title", None)
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}

    async def call(self, arguments: Mapping[str, object], columns: Mapping[str, object]) -> object:
        """The function's result. Raises ToolError for arguments that do not fit; the function's own errors pass."""
        try:
            model = self.arguments.model_validate(dict(arguments))
        except ValidationError as error:
            raise ToolError(f"{self.name}: {_problem(error)}") from None
        values = {name: getattr(model, name) for name in type(model).model_fields}
        own = {name: columns[name] for name in self.columns if name in columns}
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**values, **own)
        # In a thread, so that the calls of one reply run side by side.
        return await in_thread(self.function, **values, **own)


async def in_thread(function: Callable[..., object], *args: object, **kwargs: object) -> object:
    """A plain function of the user, called in a thread.

    StopIteration cannot pass through a future, and KeyboardInterrupt would end the event loop: both come as
    RuntimeError.
    """

    def call() -> object:
        try:
            return function(*args, **kwargs)
        except (StopIteration, KeyboardInterrupt) as error:
            raise RuntimeError(f"{type(error).__name__} {error}".rstrip()) from error

    return await asyncio.to_thread(call)


def tool_of(function: Callable[..., object], key: str, name: str = "") -> Tool:
    """The tool that a function or a bound method is. `key` is the recipe key that names it.

    Raises UserError for a function that no call could fill in: one with `*args`, or without type hints.
    """
    name = name or getattr(function, "__name__", type(function).__name__)
    try:
        signature = inspect.signature(function)
        hints = get_type_hints(function, include_extras=True)
    # Hints are the user's code: evaluating them may raise anything.
    except Exception as error:
        raise UserError(f"{key}: the signature of tool '{name}' cannot be read: {error}") from None
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    described = {parameter.arg_name: parameter.description or "" for parameter in doc.params}
    fields: dict[str, Any] = {}
    columns, required = set(), set()
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            columns.add(parameter.name)
            if parameter.default is parameter.empty and parameter.name != SESSION:
                required.add(parameter.name)
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UserError(f"{key}: tool '{name}' takes {parameter}: a call fills in named parameters only")
        if parameter.name not in hints:
            raise UserError(f"{key}: parameter '{parameter.name}' of tool '{name}' has no type hint")
        default = ... if parameter.default is parameter.empty else parameter.default
        description = described.get(parameter.name) or None
        fields[parameter.name] = (hints[parameter.name], Field(default, description=description))
    try:
        model = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        model.model_json_schema()
    except (PydanticUserError, NameError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: the type hints of tool '{name}' have no JSON schema: {reason:.200}") from None
    text = "\n".join(filter(None, (doc.short_description, doc.long_description)))
    return Tool(name, text, function, model, frozenset(columns), frozenset(required))


def tool_named(tools: Sequence[AnyTool], name: str) -> AnyTool:
    """The tool of that name. Raises ToolError naming those that exist."""
    found = next((tool for tool in tools if tool.name == name), None)
    if found is None:
        names = [tool.name for tool in tools]
        close = difflib.get_close_matches(name, names, 1)
        meant = f"; did you mean '{close[0]}'?" if close else ""
        raise ToolError(f"there is no tool '{name:.80}', only {', '.join(names) or 'none'}{meant}")
    return found


def as_text(value: object, limit: int) -> str:
    """A tool's result as the policy reads it: text as it is, other values as JSON; cut at `limit` characters.

    Raises ToolError for a value that is neither text nor JSON.
    """
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False, allow_nan=True)
        except (TypeError, ValueError, RecursionError):
            raise ToolError(f"the tool returned {type(value).__name__}, which is not text") from None
    # A lone surrogate can be no token.
    value = value.encode("utf-8", "replace").decode()
    if len(value) <= limit:
        return value
    return f"{value[:limit]}\n[{len(value) - limit} more characters were cut]"


def as_error(error: BaseException) -> str:
    """An exception as the sentence that the policy reads."""
    if isinstance(error, ToolError):
        return f"error: {error}"
    text = " ".join(str(error).split())
    return f"error: {type(error).__name__}: {text:.{_ERROR_LENGTH}}" if text else f"error: {type(error).__name__}"


def _problem(error: ValidationError) -> str:
    """Pydantic's first complaint, with the name of the argument."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"argument '{name}': {first['msg']}{more}"
