"""From a dataset's name to prompts.

    source --load_rows--> rows --build_prompts--> prompts --check_length--> prompts --PromptSource--> P prompts a step

A row is a plain dict. Its columns fill the prompt's template and reach the reward functions by name.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import UserError
from cispo.recipe.schema import Data, Recipe
from cispo.rollout.renderer import Renderer
from cispo.types import Message, Prompt
from cispo.user_code import is_hub_id, load_object

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

Row = dict[str, Any]
Args = Mapping[str, Any]
"""A dataset's own arguments in the recipe."""

REASONING_GYM = "reasoning_gym:"
JSON_SUFFIXES = (".jsonl", ".json")

SEED_STRIDE = 1_000_000
"""reasoning_gym draws item i of seed s from s + i: without a stride, seeds 0 and 1 would share all but one item."""


def prompts_of(data: Data, key: str, renderer: Renderer, recipe: Recipe) -> list[Prompt]:
    """The prompts of a recipe section, each short enough for the context."""
    prompts = build_prompts(load_rows(data.source, data.split, data.args, data.limit, key), data.prompt, key)
    for prompt in prompts:
        check_length(len(renderer.render(prompt.messages)), recipe, f"{key}: prompt {prompt.id}")
    return prompts


def check_length(length: int, recipe: Recipe, name: str) -> None:
    """UserError unless `length` tokens leave room in the context for at least one more."""
    room = recipe.rollout.max_context - 1
    if length > room:
        raise UserError(
            f"{name} has {length} tokens; rollout.max_context {recipe.rollout.max_context} leaves room for {room}"
        )


def load_rows(source: str, split: str, args: Args, limit: int | None, key: str) -> list[Row]:
    """The rows of a dataset, at most `limit` of them.

    `source` is one of
        module:function        called with `args` (and with `split` if it has that parameter); gives dicts
        reasoning_gym:TASK     a procedural task; `args` are size, seed and the task's own parameters
        FILE                   .jsonl, .json or .parquet
        FOLDER or OWNER/NAME   read by `datasets.load_dataset` with `args`
    `key` is the recipe key of the dataset ("data.train"). UserError when it cannot be read or has no rows.
    """
    if source.startswith(REASONING_GYM):
        rows = _reasoning_gym_rows(source.removeprefix(REASONING_GYM), split, args, key)
    elif Path(source).suffix in JSON_SUFFIXES:
        rows = _json_rows(_existing(source, key), key)
    elif Path(source).suffix == ".parquet" or Path(source).is_dir():
        rows = _local_rows(_existing(source, key), split, args, key)
    elif ":" in source:
        rows = _function_rows(source, split, args, key)
    elif is_hub_id(source):
        rows = _hub_rows(source, split, args, key)
    else:
        raise UserError(
            f"{key}: '{source}' does not exist, and is neither module:function, reasoning_gym:TASK, a .jsonl, .json or "
            "parquet file, nor OWNER/NAME on the hub"
        )
    loaded = list(itertools.islice(rows, limit))
    if not loaded:
        raise UserError(f"{key}: '{source}' has no rows")
    return loaded


def _existing(source: str, key: str) -> Path:
    if not Path(source).exists():
        raise UserError(f"{key}: '{source}' does not exist")
    return Path(source)


def _json_rows(path: Path, key: str) -> Iterator[Row]:
    """Read by `json`: `datasets` would turn the answer "2024-01-01" into a datetime, and its errors name no line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read '{path}': {error}") from error
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{key}: '{path}' line {error.lineno} is not JSON: {error.msg}") from error
        if not isinstance(values, list):
            raise UserError(f"{key}: '{path}' must hold a list of rows, not one {type(values).__name__}")
        for number, value in enumerate(values, start=1):
            yield _as_row(value, f"{key}: row {number} of '{path}'")
        return
    # Not splitlines(), which also splits at U+2028 and its like: JSON strings may hold them unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{key}: '{path}' line {number} is not JSON: {error.msg} (column {error.colno})") from error
        yield _as_row(value, f"{key}: '{path}' line {number}")


def _local_rows(path: Path, split: str, args: Args, key: str) -> list[Row]:
    """A parquet file or a folder, through `datasets` with a temporary cache: nothing stays behind or goes stale."""
    import datasets
    from datasets.exceptions import DatasetsError

    with tempfile.TemporaryDirectory(prefix="cispo-datasets-") as cache:
        try:
            if path.is_dir():
                found = datasets.load_dataset(str(path), split=split, cache_dir=cache, **args)
            else:
                found = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache)
            return [dict(row) for row in found]
        except (OSError, ValueError, TypeError, RuntimeError, DatasetsError) as error:
            reason = error.__cause__ or error
            raise UserError(f"{key}: cannot read '{path}', split '{split}': {reason}") from error


def _hub_rows(source: str, split: str, args: Args, key: str) -> Iterable[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(source, split=split, **args)
    except (OSError, ValueError, TypeError, RuntimeError, DatasetsError) as error:
        raise UserError(f"{key}: cannot load '{source}', split '{split}', from the hub: {error}") from error


def _function_rows(source: str, split: str, args: Args, key: str) -> Iterator[Row]:
    function = load_object(source, key)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: '{source}' is not a function: {error}") from error
    given = {"split": split, **args} if "split" in parameters else dict(args)
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise UserError(f"{key}: {source} takes {', '.join(parameters)}: {error}") from error
    try:
        values = iter(function(**given))
        for number in itertools.count():
            try:
                value = next(values)
            except StopIteration:
                return
            yield _as_row(value, f"{key}: row {number} of {source}")
    except UserError:
        raise
    # User code may raise anything.
    except Exception as error:
        raise UserError(f"{key}: {source} raised {type(error).__name__}: {error}") from error


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is not an object with columns but a {type(value).__name__}")
    return dict(value)


def in_split(problem: str, split: str) -> bool:
    """Whether a generated problem belongs to a split: a hash of its text puts it in "train" or in every other split.

    Half of all problems are on each side, so that train and held-out problems are disjoint for all seeds.
    """
    return hashlib.sha256(problem.encode()).digest()[0] % 2 == (split == "train")


def _reasoning_gym_rows(task: str, split: str, args: Args, key: str) -> Iterator[Row]:
    """Rows with the columns question and answer, the item's metadata, and those that `rewards.gym:score` takes.

    `item` keeps its Python types: two tasks (arc_agi, rearc) tell tuples from lists when they score.
    """
    params = {name: value for name, value in args.items() if name not in ("size", "seed")}
    size, seed = int(args.get("size", 500)), int(args.get("seed", 0))
    # A split holds half of the problems: this many items are enough unless the task has very few problems.
    items = 4 * size + 100
    if size < 1 or items > SEED_STRIDE or seed < 0:
        raise UserError(f"{key}: {REASONING_GYM}{task} needs a size of 1 to {SEED_STRIDE // 5} and a seed of 0 or more")
    dataset = _reasoning_gym_dataset(task, {**params, "size": items, "seed": seed * SEED_STRIDE}, key)
    found = 0
    for index in range(items):
        item = dataset[index]
        if not in_split(item["question"], split):
            continue
        own = {"question": item["question"], "answer": item["answer"], "task": task, "params": params, "item": item}
        yield {**item["metadata"], **own}
        found += 1
        if found == size:
            return
    raise UserError(f"{key}: {REASONING_GYM}{task} has only {found} problems in split '{split}' among {items} items")


def _reasoning_gym_dataset(task: str, args: Args, key: str) -> ProceduralDataset:
    """reasoning_gym's dataset for a task; UserError when the task or one of its parameters does not exist."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f", did you mean {' or '.join(close)}?" if close else f"; there are {len(DATASETS)}, such as chain_sum"
        raise UserError(f"{key}: reasoning_gym has no task '{task}'{hint}")
    parameters = list(inspect.signature(DATASETS[task][1]).parameters)
    for name in args:
        if name not in parameters:
            raise UserError(f"{key}: {REASONING_GYM}{task} has no parameter '{name}'; it takes {', '.join(parameters)}")
    try:
        return reasoning_gym.create_dataset(task, **args)
    # A task's config checks itself with assert, and leaves wrong types to fail in a comparison.
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{key}: {REASONING_GYM}{task} refuses its parameters: {error}") from error


def build_prompts(rows: Sequence[Row], template: str | None, key: str) -> list[Prompt]:
    """One prompt a row; its id is the row's position.

    The messages are the column `messages` if there is one, else `template` filled with the columns as one user message,
    else the column `prompt` (text or messages). UserError names the column that is missing or has the wrong type.
    """
    return [
        Prompt(id=index, messages=_messages(row, template, f"{key}: row {index}"), columns=row)
        for index, row in enumerate(rows)
    ]


def _messages(row: Row, template: str | None, where: str) -> tuple[Message, ...]:
    if "messages" in row:
        return _checked_messages(row["messages"], f"{where}: column 'messages'")
    if template is not None:
        try:
            text = template.format_map(row)
        except KeyError as error:
            raise UserError(f"{where} has no column {error}, which the template needs; {_available(row)}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{where} does not fit the template {template!r}: {error}") from error
        return ({"role": "user", "content": text},)
    if "prompt" not in row:
        raise UserError(f"{where} has no column 'messages' or 'prompt', and there is no template; {_available(row)}")
    if isinstance(row["prompt"], str):
        return ({"role": "user", "content": row["prompt"]},)
    return _checked_messages(row["prompt"], f"{where}: column 'prompt'")


def _checked_messages(value: object, where: str) -> tuple[Message, ...]:
    messages = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not messages or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
        raise UserError(f"{where} must be a list of messages with role and content, not {value!r:.80}")
    return messages


def _available(row: Row) -> str:
    return f"its columns are {', '.join(map(str, row)) or 'none'}"
