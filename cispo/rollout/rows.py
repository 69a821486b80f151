"""From a dataset's name to rows.

    source --load_rows--> rows --build_prompts--> prompts (`prompts`)

A row is a plain dict. Every key that a recipe gives for a dataset is used or refused, for every kind of source.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import UserError
from cispo.user_code import is_hub_id, load_object

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

Row = dict[str, Any]
Args = Mapping[str, Any]
"""A dataset's own arguments in the recipe."""

REASONING_GYM = "reasoning_gym:"
JSON_SUFFIXES = (".jsonl", ".json")

TRAIN = "train"
"""The split where the recipe names none: all rows of a file, one half of all procedural problems."""

SEED_STRIDE = 1_000_000
"""reasoning_gym draws item i of seed s from s + i: without a stride, seeds 0 and 1 would share all but one item."""


def load_rows(source: str, split: str, args: Args, limit: int | None, key: str) -> list[Row]:
    """The rows of a dataset, at most `limit` of them.

    `source` is one of
        module:function        called with `args` (and with `split` if it has that parameter); gives dicts
        reasoning_gym:TASK     a procedural task; `args` are size, seed and the task's own parameters
        FILE                   .jsonl, .json or .parquet: one split, `train`, and its slices (`train[:90%]`)
        FOLDER or OWNER/NAME   read by `datasets.load_dataset` with `args`
    `key` is the recipe key of the dataset ("data.train"). UserError when it cannot be read, has no rows, or cannot use
    `split` or `args`.
    """
    path, args = Path(source), copy.deepcopy(dict(args))
    if not source.strip():
        raise UserError(f"{key}.source is empty")
    if source.startswith(REASONING_GYM):
        rows = _reasoning_gym_rows(source.removeprefix(REASONING_GYM), split, args, key)
    elif path.suffix in JSON_SUFFIXES and not _is_folder(path, key):
        if args:
            raise UserError(f"{key}.args: '{source}' is read as it is and takes no arguments, not {', '.join(args)}")
        rows = _part_of(_json_rows(_existing(path, key), key), split, f"{key}: '{source}'")
    elif path.suffix == ".parquet" or _is_folder(path, key):
        rows = _local_rows(_existing(path, key), split, args, key)
    elif path.exists():
        raise UserError(f"{key}: '{source}' is no file that can be read: .jsonl, .json and .parquet are, and folders")
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
        raise UserError(f"{key}: '{source}' has no rows" + (f" in split '{split}'" if split != TRAIN else ""))
    return loaded


def _is_folder(path: Path, key: str) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise UserError(f"{key}: cannot read '{path}': {error.strerror}") from None


def _existing(path: Path, key: str) -> Path:
    if not path.exists():
        raise UserError(f"{key}: '{path}' does not exist")
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.exists() and not (file.is_file() or file.is_dir()):
            # Reading from a pipe or a device may never end.
            raise UserError(f"{key}: '{file}' is neither a regular file nor a folder")
    return path


def _part_of(rows: Iterator[Row], split: str, where: str) -> Iterable[Row]:
    """The rows of a file's split, as `datasets` cuts it: `train`, a slice of it, or a sum of slices."""
    if split == TRAIN:
        return rows
    from datasets import ReadInstruction

    loaded = list(rows)
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({TRAIN: len(loaded)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{where}, split '{split}': {error}") from None
    return [row for part in parts for row in loaded[part.from_ : part.to]]


def _json_rows(path: Path, key: str) -> Iterator[Row]:
    """Read by `json`: `datasets` would turn the answer "2024-01-01" into a datetime, and its errors name no line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix == ".json":
                values = _parse(file.read(), lambda error: f"{key}: '{path}' line {error.lineno}")
                if not isinstance(values, list):
                    raise UserError(f"{key}: '{path}' must hold a list of rows, not one {type(values).__name__}")
                for number, value in enumerate(values, start=1):
                    yield _as_row(value, f"{key}: row {number} of '{path}'")
                return
            # A file's lines end at line feeds alone: JSON strings may hold U+2028 and its like unescaped.
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{key}: '{path}' line {number}"
                    yield _as_row(_parse(line, lambda _, where=where: where, column=True), where)
    except (OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"{key}: cannot read '{path}': {error or 'it does not fit into memory'}") from error


def _parse(text: str, where: Callable[[json.JSONDecodeError], str], *, column: bool = False) -> object:
    """The JSON value of a text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f" (column {error.colno})" if column else ""
        raise UserError(f"{where(error)} is not JSON: {error.msg}{place}") from error
    # A number of more digits than Python reads, or too many brackets.
    except (ValueError, RecursionError) as error:
        start = json.JSONDecodeError("", text, 0)
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where(start)} cannot be read: {reason}") from None


def _local_rows(path: Path, split: str, args: Args, key: str) -> list[Row]:
    """A parquet file or a folder, through `datasets` with a temporary cache: nothing stays behind or goes stale."""
    import datasets

    # Its log would repeat the error, once for each file.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    source = {"path": str(path)} if path.is_dir() else {"path": "parquet", "data_files": str(path)}
    with tempfile.TemporaryDirectory(prefix="cispo-datasets-") as cache:
        try:
            return [dict(row) for row in datasets.load_dataset(**source, split=split, cache_dir=cache, **args)]
        # Any reader of files may fail here, on any content.
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"{key}: cannot read '{path}', split '{split}': {reason}") from error


def _hub_rows(source: str, split: str, args: Args, key: str) -> Iterator[Row]:
    import datasets

    try:
        for row in datasets.load_dataset(source, split=split, **args):
            yield dict(row)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: cannot load '{source}', split '{split}', from the hub: {reason}") from error


def _function_rows(source: str, split: str, args: Args, key: str) -> Iterator[Row]:
    function = load_object(source, key)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: '{source}' is not a function: {error}") from error
    given = _arguments(parameters, source, split, args, key)
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
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {source} raised {type(error).__name__}: {error}") from error


def _arguments(
    parameters: Mapping[str, inspect.Parameter], source: str, split: str, args: Args, key: str
) -> dict[str, object]:
    """`args`, and the split where the function takes it."""
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if "split" in args:
        if split not in (TRAIN, args["split"]):
            raise UserError(f"{key}.split is '{split}' and {key}.args.split {args['split']!r}: leave one of them out")
        return dict(args)
    if "split" in parameters or (takes_any and split != TRAIN):
        return {"split": split, **args}
    if split != TRAIN:
        raise UserError(f"{key}.split is '{split}', but {source} has no parameter 'split'")
    return dict(args)


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is not an object with columns but a {type(value).__name__}")
    row = dict(value)
    other = next((name for name in row if not isinstance(name, str)), None)
    if other is not None:
        raise UserError(f"{where} has a column {other!r:.80}, whose name is no text")
    return row


def in_split(problem: str, split: str) -> bool:
    """Whether a generated problem belongs to a split: a hash of its text puts it in "train" or in every other split.

    Half of all problems are on each side, so that train and held-out problems are disjoint for all seeds. UserError for
    a slice, and for a name that is meant to be "train".
    """
    _check_procedural(split)
    return hashlib.sha256(problem.encode()).digest()[0] % 2 == (split == TRAIN)


@functools.cache
def _check_procedural(split: str) -> None:
    if not re.fullmatch(r"[\w.-]+", split):
        raise UserError(f"split '{split}': procedural problems have no slices, but args such as size and seed")
    if split != TRAIN and difflib.get_close_matches(split.lower(), [TRAIN], cutoff=0.75):
        raise UserError(f"split '{split}' would be the held-out half of all problems; did you mean '{TRAIN}'?")


def _reasoning_gym_rows(task: str, split: str, args: Args, key: str) -> Iterator[Row]:
    """Rows with the columns question and answer, the item's metadata, and those that `rewards.gym:score` takes.

    `item` keeps its Python types: two tasks (arc_agi, rearc) tell tuples from lists when they score.
    """
    try:
        _check_procedural(split)
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    params = {name: value for name, value in args.items() if name not in ("size", "seed")}
    size, seed = _whole(args.get("size", 500)), _whole(args.get("seed", 0))
    # A split holds half of the problems: this many items are enough unless the task has very few problems.
    items = 4 * size + 100
    if size < 1 or items > SEED_STRIDE or seed < 0:
        raise UserError(f"{key}: {REASONING_GYM}{task} needs a size of 1 to {SEED_STRIDE // 5} and a seed of 0 or more")
    dataset = _reasoning_gym_dataset(task, {**params, "size": items, "seed": seed * SEED_STRIDE}, key)
    found = 0
    for index in range(items):
        try:
            item = dataset[index]
        # A generator may fail on parameters that its config let pass.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{key}: {REASONING_GYM}{task} makes no item {index}: {reason:.300}") from error
        if not in_split(item["question"], split):
            continue
        own = {"question": item["question"], "answer": item["answer"], "task": task, "params": params, "item": item}
        yield {**item["metadata"], **own}
        found += 1
        if found == size:
            return
    raise UserError(f"{key}: {REASONING_GYM}{task} has only {found} problems in split '{split}' among {items} items")


def _whole(value: object) -> int:
    """A whole number, or -1 for anything else."""
    return int(value) if isinstance(value, int | float) and value == value // 1 and value is not True else -1


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
    # A task's config checks itself with assert, and leaves wrong types to fail anywhere.
    except Exception as error:
        raise UserError(f"{key}: {REASONING_GYM}{task} refuses its parameters: {error}") from error
