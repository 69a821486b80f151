"""One attempt's side of the user's code: tools, or an object with steps, behind the same four verbs.

    columns, seed, attempt --open_session--> Session: start, step, reward, close

Understood are: functions and MCP servers as tools; a class with `step` (text or `Step` back, or gymnasium's five
values); and a class without `step`: its public methods are tools, with `reset(**columns)` and `get_reward()` (TRL's
environments).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Protocol

from cispo.agents.contract import Reply, Step, ToolCall
from cispo.agents.mcp_servers import McpServer
from cispo.agents.tools import SESSION, AnyTool, as_error, as_text, in_thread, tool_named, tool_of
from cispo.errors import UserError
from cispo.types import Message

Observation = str | Sequence[Message]

# Characters of one observation. A tool that prints megabytes must not fill the context.
_TEXT_LIMIT = 20_000

_TRL_METHODS = ("reset", "get_reward", "close")


class BadStep(ValueError):
    """A return value of the user's code that has no meaning; the message is the predicate of a sentence."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The attempt that an environment is made for."""

    seed: int
    """Equal for the attempts of a group, so that they start alike."""
    attempt: int
    """Of the group, from 0."""


class Session(Protocol):
    """An attempt in progress."""

    @property
    def tools(self) -> Sequence[AnyTool]:
        """The tools that the policy may call, for the chat template."""
        ...

    async def start(self) -> Observation:
        """Text or messages after the prompt; () for none."""
        ...

    async def step(self, reply: Reply) -> tuple[Step | None, int]:
        """The answer to a reply (None ends the episode), and the number of its calls that failed."""
        ...

    async def reward(self) -> Mapping[str, float]:
        """Rewards of the whole episode by name."""
        ...

    async def close(self) -> None: ...


class ToolSession:
    """Tools that are functions: a reply without a call is the answer."""

    def __init__(self, tools: Sequence[AnyTool], columns: Mapping[str, object], owner: object = None) -> None:
        """`owner` is closed with the session: an object of TRL's contract, with the tools as methods, or servers."""
        self.tools, self._columns, self._owner = tools, columns, owner
        self._session: dict[str, object] = {}

    async def start(self) -> Observation:
        reset = getattr(self._owner, "reset", None)
        if reset is None:
            return ()
        return _observation(await _result(reset, **accepted(reset, self._columns)))

    async def step(self, reply: Reply) -> tuple[Step | None, int]:
        if reply.problem:
            return Step(observation=[_tool_message("error: " + reply.problem)]), 0
        if not reply.calls:
            return None, 0
        results = await asyncio.gather(*map(self._call, reply.calls))
        ends = [result for result in results if isinstance(result[0], Step)]
        failed = sum(wrong for _, wrong in results)
        messages = [_tool_message(text, call) for call, (text, _) in zip(reply.calls, results, strict=True)]
        if not ends:
            return Step(observation=messages), failed
        last = ends[-1][0]
        assert isinstance(last, Step)
        return Step(observation=messages, reward=last.reward, done=last.done), failed

    async def _call(self, call: ToolCall) -> tuple[str | Step, bool]:
        """The text that the policy reads, or a `Step`, and whether the call failed."""
        try:
            columns = {**self._columns, SESSION: self._session}
            value = await tool_named(self.tools, call.name).call(call.arguments, columns)
            if isinstance(value, Step):
                return _ended(value), False
            return as_text(value, _TEXT_LIMIT), False
        # The recipe's fault, and nothing that the policy could mend.
        except UserError:
            raise
        # User code may raise anything.
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            return as_error(error), True

    async def reward(self) -> Mapping[str, float]:
        get = getattr(self._owner, "get_reward", None)
        return {} if get is None else named_rewards(await _result(get), "env")

    async def close(self) -> None:
        close = getattr(self._owner, "close", None)
        if close is not None:
            await _result(close)


class ServerGroup:
    """MCP servers of one attempt: they end with it."""

    def __init__(self, servers: Sequence[McpServer]) -> None:
        self._servers = servers

    async def close(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers))


class StepSession:
    """An object with `step`."""

    tools: Sequence[AnyTool] = ()

    def __init__(self, environment: object) -> None:
        self._environment = environment

    async def start(self) -> Observation:
        start = getattr(self._environment, "start", None)
        return () if start is None else _observation(await _result(start))

    async def step(self, reply: Reply) -> tuple[Step | None, int]:
        step: Callable[..., object] = getattr(self._environment, "step")  # noqa: B009
        value = await _result(step, reply)
        return _as_step(value), 0

    async def reward(self) -> Mapping[str, float]:
        reward = getattr(self._environment, "reward", None)
        return {} if not callable(reward) else named_rewards(await _result(reward), "env")

    async def close(self) -> None:
        close = getattr(self._environment, "close", None)
        if close is not None:
            await _result(close)


# Games draw from Python's own random numbers, which `reset` seeds for the process.
_GYM = asyncio.Lock()


class GymSession(StepSession):
    """gymnasium's contract on texts: reset(seed) -> (text, info), step(text) -> (text, reward, terminated, truncated,
    info). Calls never overlap."""

    def __init__(self, environment: object, seed: int) -> None:
        super().__init__(environment)
        self._seed = seed

    async def start(self) -> Observation:
        reset: Callable[..., object] = getattr(self._environment, "reset")  # noqa: B009
        async with _GYM:
            value = await _result(reset, seed=self._seed)
        return _observation(value[0] if isinstance(value, tuple) and value else value)

    async def step(self, reply: Reply) -> tuple[Step | None, int]:
        step: Callable[..., object] = getattr(self._environment, "step")  # noqa: B009
        async with _GYM:
            return _as_step(await _result(step, reply.text)), 0


def used_tools(used: Sequence[object], key: str) -> list[AnyTool]:
    """The tools of the objects that the recipe names; an environment with `step` has none.

    Raises UserError where an object is neither function nor class, or a class is not alone.
    """
    if any(map(inspect.isclass, used)):
        if len(used) > 1:
            raise UserError(f"{key}: an environment class is named alone, without tools beside it")
        kind = used[0]
        assert isinstance(kind, type)
        return [] if hasattr(kind, "step") else methods_as_tools(kind, None, key)
    tools: list[AnyTool] = []
    for thing in used:
        if isinstance(thing, McpServer):
            tools += thing.tools
        elif callable(thing):
            tools.append(tool_of(thing, key))
        else:
            raise UserError(f"{key} names a {type(thing).__name__}, where a function or a class is expected")
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{key}: two tools are named '{twice}'")
    return tools


async def open_session(used: Sequence[object], columns: Mapping[str, object], identity: Identity, key: str) -> Session:
    """The session of one attempt. `used` are the objects that the recipe names: functions, or one class.

    Errors of the user's constructor pass through.
    """
    kind = used[0] if used else None
    if not isinstance(kind, type):
        own = [await thing.for_attempt() if isinstance(thing, McpServer) else thing for thing in used]
        servers = [thing for thing in own if isinstance(thing, McpServer) and thing.per_attempt]
        return ToolSession(used_tools(own, key), columns, ServerGroup(servers) if servers else None)
    known = {**columns, "seed": identity.seed, "attempt": identity.attempt}
    environment = await _result(kind, **accepted(kind, known))
    if not hasattr(kind, "step"):
        return ToolSession(methods_as_tools(kind, environment, key), known, environment)
    gym = hasattr(kind, "reset") and not hasattr(kind, "start")
    return GymSession(environment, identity.seed) if gym else StepSession(environment)


def methods_as_tools(kind: type, owner: object, key: str) -> list[AnyTool]:
    """The public methods of a class in TRL's form, bound to `owner`."""
    methods = [
        (name, method)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and name not in _TRL_METHODS
    ]
    if not methods:
        raise UserError(f"{key}: class {kind.__name__} has neither `step` nor public methods that could be tools")
    return [tool_of(MethodType(method, owner or kind), key, name) for name, method in methods]


def accepted(function: Callable[..., object], values: Mapping[str, object]) -> dict[str, object]:
    """Those of `values` that a function has parameters for; all of them where it takes `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(values)
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {name: value for name, value in values.items() if name in names}


async def _result(function: Callable[..., object], *args: object, **kwargs: object) -> object:
    """A call of user code: a plain function runs in a thread, beside those of other sessions."""
    if inspect.iscoroutinefunction(function):
        return await function(*args, **kwargs)
    value = await in_thread(function, *args, **kwargs)
    return await value if inspect.isawaitable(value) else value


def _observation(value: object) -> Observation:
    if value is None:
        return ()
    if isinstance(value, str):
        return as_text(value, _TEXT_LIMIT)
    if isinstance(value, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in value):
        return [_plain(message) for message in value]
    raise BadStep(f"said {type(value).__name__} where text or messages are expected")


def _plain(message: Mapping[str, object]) -> Message:
    """The message as JSON holds it, its text cut: it crosses to the driver, and its template reads it."""
    content = message.get("content", "")
    if not isinstance(content, str | list):
        raise BadStep(f"said a message with {type(content).__name__} where its text is expected")
    try:
        plain = json.loads(json.dumps(dict(message)))
    except (TypeError, ValueError, RecursionError):
        raise BadStep("said a message that is not plain JSON") from None
    return {**plain, "content": as_text(content, _TEXT_LIMIT)} if isinstance(content, str) else plain


def _as_step(value: object) -> Step | None:
    """None, text, messages, a `Step`, a number (a last reward), or gymnasium's five values."""
    if value is None or isinstance(value, Step):
        if value is not None:
            rewards = named_rewards(value.reward, "step")
            return Step(observation=_observation(value.observation), reward=rewards, done=bool(value.done))
        return None
    if isinstance(value, tuple):
        if len(value) != 5:
            raise BadStep(f"returned {len(value)} values; gymnasium's step returns 5")
        text, reward, terminated, truncated, _ = value
        rewards = named_rewards(reward, "step")
        return Step(observation=_observation(text), reward=rewards, done=bool(terminated or truncated))
    return Step(observation=_observation(value))


def named_rewards(value: object, name: str) -> dict[str, float]:
    """A reward or rewards by name as finite numbers."""
    named = value if isinstance(value, Mapping) else {} if value is None else {name: value}
    found = {}
    for key, number in named.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise BadStep(f"gave the reward {number!r:.80} as '{key}', which is no finite number")
        found[str(key)] = float(number)
    return found


def rewards_of(step: Step) -> dict[str, float]:
    """The rewards of a step by name, those of 0 left out."""
    return {name: value for name, value in named_rewards(step.reward, "step").items() if value}


def _ended(step: Step) -> Step:
    """A tool's `Step` in plain values."""
    return replace(
        step,
        observation=_text_of(step.observation),
        reward=named_rewards(step.reward, "step"),
        done=bool(step.done),
    )


def _text_of(observation: object) -> str:
    return as_text(observation, _TEXT_LIMIT) if isinstance(observation, str) else ""


def _tool_message(text: str | Step, call: ToolCall | None = None) -> Message:
    content = text if isinstance(text, str) else _text_of(text.observation)
    named = {} if call is None else {"name": call.name, "tool_call_id": call.id}
    return {"role": "tool", "content": content, **named}
