"""A reward function: its signature, its calls for a group of completions, and the values that it returns.

    "module:name" --load_function--> Function --calls_of a group--> Call, Call, ... --start, read--> values

Two contracts. A function of ours gets one completion (or `completions`, the whole group) and the columns of the row.
One in TRL's form (`completions` with `**kwargs`, `prompts` or another argument of TRL) gets lists with an entry for
each completion. Nothing mutable is shared: every call gets its arguments fresh. Nothing heavy is imported, for the
worker's sake.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import math
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, SupportsFloat

from cispo.errors import UserError
from cispo.recipe.user_code import load_object

Value = tuple[float | None, dict[str, object]]
"""A function's reward of a completion (finite, or None where it does not apply), and extra values to log."""

FACTS = (
    "prompt",
    "messages",
    "conversation",
    "token_ids",
    "finish_reason",
    "truncated",
    "status",
    "turns",
    "calls",
    "failed_calls",
    "unreadable",
    "turn_rewards",
    "step",
    "steps",
)
"""Facts of an attempt that a function gets by name, where the dataset has no such column."""

TRL_FACTS = ("prompts", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that a function in TRL's form gets beside completions and columns."""

OUR_FILES = ("reward_function.py", "reward_worker.py", "reward_clock.py")
"""Files whose lines say nothing about a reward function's error."""

_SCALARS = ("str", "int", "float", "bool")


@dataclass(frozen=True, slots=True)
class Signature:
    """The parameters of a reward function."""

    group: bool
    """`completions`, the whole group, instead of one `completion`."""
    asynchronous: bool
    columns: frozenset[str] | None
    """Dataset columns that it takes; None: all."""
    required: frozenset[str]
    """Columns without a default."""
    lists: bool = False
    """TRL's form: every column is a list with an entry a completion, and `prompts` is passed."""
    facts: frozenset[str] = frozenset()
    """FACTS and, in TRL's form, TRL_FACTS that it takes."""
    code: str = ""
    """Hash of the file that defines the function; "" where there is none."""
    shipped: bool = False
    """A judge of ours: text of the policy that it cannot read, for want of time too, is wrong and no error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A term of the reward.

    Example: RewardFunction(fn="rewards.numeric:numeric", weight=0.5, args={"tolerance": 1e-3})
    """

    fn: str
    weight: float = 1.0
    args: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments; they take precedence over dataset columns of the same name."""
    timeout: float | None = None
    """Seconds of one call; None: the runner's."""
    concurrency: int | None = None
    """Most calls at a time; None: no bound of its own."""
    sources: tuple[str, ...] = ()
    """Names of the prompts' sources that it applies to; all without one."""

    def applies(self, source: str) -> bool:
        return not self.sources or source in self.sources


@dataclass(frozen=True, slots=True)
class Failure:
    """A call without a usable value."""

    function: int
    completion: int
    """-1 for a call with the whole group."""
    problem: str
    """Predicate of a sentence about the function: "raised ZeroDivisionError: division by zero"."""
    where: str = ""
    """The place in the function's code, if known: "file, line N"."""
    timed_out: bool = False
    fatal: bool = False
    """Whether the call ended its process."""


class BadValue(ValueError):
    """A return value that is no reward; the message is a `Failure.problem`."""


@dataclass(frozen=True, slots=True)
class Function:
    """An imported reward function with its fixed arguments."""

    call: Callable[..., Any]
    args: Mapping[str, object]
    signature: Signature
    positional: tuple[str, ...] = ()
    """Parameters that are given by position only, in order."""
    files: frozenset[str] = frozenset()
    """The user's files: of the module that the recipe names, and of the function's own code."""

    def invoke(self, arguments: dict[str, object]) -> object:
        """Calls it with arguments by name."""
        given = [arguments.pop(name) for name in self.positional if name in arguments]
        return self.call(*given, **arguments)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One group for reward functions."""

    completions: tuple[str, ...]
    row: bytes
    """Pickled (columns, prompt): the prompt is its text, or its messages where the dataset has messages."""
    facts: bytes = b""
    """Pickled `FACTS` of each completion, where a function takes one of them."""
    given_up: frozenset[tuple[int, int]] = frozenset()
    """(function, completion) of calls that ended their process, and count as 0."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function, with one completion or with the group."""

    function: Function
    index: int
    completion: int
    """-1 for the group."""
    start: Callable[[], Any]
    """Its return value, or the awaitable of an async function."""
    read: Callable[[object], list[Value]]
    """Checks a return value; BadValue if it is no reward."""

    def failure(self, error: BaseException) -> Failure:
        """The report of an error raised by the call, located at the last traceback line in the user's own files."""
        if isinstance(error, BadValue):
            return Failure(self.index, self.completion, str(error))
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in self.function.files]
        where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
        return Failure(self.index, self.completion, f"raised {_text_of(error):.300}{_hint(error)}", where)


def load_function(path: str, args: Mapping[str, object], key: str) -> Function:
    """Imports a reward function and reads its signature; UserError when it is not one."""
    call = load_object(path, key)
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: '{path}' is not a function: {error}") from error
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {name for name, parameter in parameters.items() if parameter.kind not in variable}
    rest = next((p.name for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    # TRL passes everything by name.
    whole = rest == "kwargs" and not names & {"completion", "completions"}
    if len(names & {"completion", "completions"}) != 1 and not whole:
        takes = ", ".join(parameters) or "nothing"
        raise UserError(f"{key}: '{path}' must take completion, or completions for whole groups, but takes {takes}")
    for name in args:
        # By convention, `_` takes what the function does not look at.
        if name not in names and rest in (None, "_"):
            raise UserError(f"{key}: '{path}' has no parameter '{name}'; it takes {', '.join(parameters)}")
    columns = names - {"completion", "completions", *args}
    facts = columns & {*FACTS}
    lists = whole or "completions" in names and (bool(columns & {*TRL_FACTS}) or rest == "kwargs")
    if lists and not any(_annotation(parameters[name]) in _SCALARS for name in columns):
        facts |= {*TRL_FACTS} if rest == "kwargs" else columns & {*TRL_FACTS}
        columns -= {*TRL_FACTS}
    else:
        lists = False
    signature = Signature(
        group=whole or "completions" in names,
        asynchronous=inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__),
        columns=None if rest else frozenset(columns),
        required=frozenset(n for n in columns if parameters[n].default is inspect.Parameter.empty),
        lists=lists,
        facts=frozenset(facts),
        code=_hash_of_code(call),
        shipped=_is_shipped(call),
    )
    positional = [n for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    module = sys.modules.get(path.partition(":")[0])
    files = frozenset(filter(None, [_source_file(call), getattr(module, "__file__", None)]))
    return Function(call=call, args=args, signature=signature, positional=tuple(positional), files=files)


def _annotation(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def _source_file(call: Callable[..., object]) -> str | None:
    """The file that defines a function, or the class of a callable object."""
    while isinstance(call, functools.partial):
        call = call.func
    definition = inspect.unwrap(call) if inspect.isroutine(call) or inspect.isclass(call) else type(call)
    try:
        return inspect.getsourcefile(definition)
    # OSError: of a class that a notebook defines.
    except (TypeError, OSError):
        return None


def _is_shipped(call: Callable[..., object]) -> bool:
    file = _source_file(call)
    try:
        shipped = [str(own) for own in resources.files("cispo.rewards").iterdir()]
    except ModuleNotFoundError:
        return False
    # A notebook's cell names a file that is not there.
    if file is None or not os.path.exists(file):
        return False
    return any(os.path.exists(own) and os.path.samefile(file, own) for own in shipped)


def _hash_of_code(call: Callable[..., object]) -> str:
    file = _source_file(call)
    try:
        return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest() if file else ""
    except OSError:
        return ""


def calls_of(function: Function, index: int, group: Attempt) -> Iterator[Call]:
    """The calls of the function number `index` for a group."""
    if function.signature.group:
        logged = _Logged(len(group.completions))
        yield Call(function, index, -1, partial(_start_group, function, group, logged), logged.read)
        return
    for number in range(len(group.completions)):
        start = partial(_start_one, function, group, number)
        if (index, number) in group.given_up:
            start = partial(tuple[float, dict[str, object]], (0.0, {"problem": "time"}))
        yield Call(function, index, number, start, lambda result: [read_value(result)])


def _start_one(function: Function, group: Attempt, number: int) -> object:
    columns, _ = _fresh_row(function, group)
    facts = _facts_of(function, group)[number] if group.facts else {}
    given = {"completion": group.completions[number]}
    return function.invoke(facts | columns | copy.deepcopy(dict(function.args)) | given)


@dataclass(frozen=True, slots=True)
class TrainerState:
    """The part of transformers' TrainerState that rewards of TRL look at."""

    global_step: int
    max_steps: int


class _Logged:
    """TRL's `log_extra` and `log_metric` of one call: they become extra values of the group's samples."""

    def __init__(self, size: int) -> None:
        self._extra: list[dict[str, object]] = [{} for _ in range(size)]

    def extra(self, column: str, values: Sequence[object]) -> None:
        for own, value in zip(self._extra, values, strict=True):
            own[column] = value

    def metric(self, name: str, value: object) -> None:
        for own in self._extra:
            own[name] = value

    def read(self, results: object) -> list[Value]:
        values = read_group(results, size=len(self._extra))
        if not any(self._extra):
            return values
        logged = [json.loads(json.dumps(own, default=_plain)) for own in self._extra]
        return [(value, own | extra) for own, (value, extra) in zip(logged, values, strict=True)]


def _start_group(function: Function, group: Attempt, logged: _Logged) -> object:
    completions: Sequence[object] = list(group.completions)
    each = _facts_of(function, group) if group.facts else []
    facts: dict[str, object] = {name: [own[name] for own in each] for name in (each[0] if each else ())}
    if not function.signature.lists:
        columns, _ = _fresh_row(function, group)
        return function.invoke(facts | columns | copy.deepcopy(dict(function.args)) | {"completions": completions})
    rows = [_fresh_row(function, group) for _ in completions]
    arguments: dict[str, object] = {name: [row[name] for row, _ in rows] for name in rows[0][0]}
    prompts = [prompt for _, prompt in rows]
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in group.completions]
    # As TRL: the row's own prompt and completion are not among the columns.
    arguments = {name: values for name, values in arguments.items() if name not in ("prompt", "completion")}
    facts |= _trl_facts(function, group, logged, prompts)
    return function.invoke(facts | arguments | copy.deepcopy(dict(function.args)) | {"completions": completions})


def _trl_facts(function: Function, group: Attempt, logged: _Logged, prompts: Sequence[object]) -> dict[str, object]:
    own = pickle.loads(group.facts) if group.facts else []
    made: dict[str, object] = {"prompts": prompts, "log_extra": logged.extra, "log_metric": logged.metric}
    if own:
        made["completion_ids"] = [facts["token_ids"] for facts in own]
        made["trainer_state"] = TrainerState(global_step=own[0]["step"], max_steps=own[0]["steps"])
    return {name: value for name, value in made.items() if name in function.signature.facts}


def _fresh_row(function: Function, group: Attempt) -> tuple[dict[str, object], object]:
    """The columns that the function takes, and the prompt; new objects each time."""
    columns, prompt = pickle.loads(group.row)
    wanted = function.signature.columns
    return {name: value for name, value in columns.items() if wanted is None or name in wanted}, prompt


def _facts_of(function: Function, group: Attempt) -> list[dict[str, object]]:
    """The facts of each completion that the function takes by name; new objects each time."""
    wanted = [name for name in FACTS if name in function.signature.facts]
    return [{name: own[name] for name in wanted if name in own} for own in pickle.loads(group.facts)]


def read_value(result: object) -> Value:
    """The value in a result for one completion: a number, None, or a tuple of one of these and a dict to log."""
    extra: dict[str, object] = {}
    if isinstance(result, tuple):
        if len(result) != 2 or not isinstance(result[1], Mapping):
            raise BadValue("returned a tuple that is not (number, dict of extra values)")
        # Samples are written as JSON: a number of numpy or torch becomes a float, other non-JSON values their text.
        extra = json.loads(json.dumps({str(k): v for k, v in result[1].items()}, default=_plain))
        result = result[0]
    if result is None:
        return None, extra
    # int and float first: the check of a protocol takes 3.5 us.
    if isinstance(result, str) or not isinstance(result, (int, float, SupportsFloat)):
        raise BadValue(f"returned {result!r:.60}, which is not a number but a {type(result).__name__}")
    if not math.isfinite(value := float(result)):
        raise BadValue(f"returned {value}")
    return value, extra


def _plain(value: object) -> float | str:
    return float(value) if isinstance(value, SupportsFloat) else str(value)


def read_group(results: object, size: int) -> list[Value]:
    """The values in a result for a group: `size` results in a list, tuple, array ..."""
    if isinstance(results, str | Mapping) or not isinstance(results, Sized) or not isinstance(results, Iterable):
        raise BadValue(f"returned a {type(results).__name__}, not a list of {size} numbers")
    if len(results) != size:
        raise BadValue(f"returned {len(results)} values for {size} completions")
    return [read_value(result) for result in results]


def _text_of(error: BaseException) -> str:
    try:
        text = str(error)
    # The error's class is the user's code too.
    except Exception:
        text = "(its message cannot be read)"
    return " ".join(f"{type(error).__name__}: {text}".split())


def _hint(error: BaseException) -> str:
    if isinstance(error, TypeError) and "string indices must be integers" in str(error):
        return (
            " (a completion is a text; in TRL's form, completions with **kwargs, it is a list of messages where the "
            "dataset's prompts are messages)"
        )
    return ""
