"""From a dataset's name to rows.

    source --load_rows--> rows (`tables`) --load_prompts--> prompts (`prompts`)

A row is a plain dict when it is used. Every key that a recipe gives for a dataset is used or refused, for every kind of
source.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import inspect
import itertools
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import UserError, missing_package
from cispo.recipe.user_code import is_hub_id, load_object
from cispo.rollout.json_rows import as_row, json_rows, jsonl_rows
from cispo.rollout.tables import ArrowRows, Row, Table

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from reasoning_gym.dataset import ProceduralDataset

Args = Mapping[str, Any]
"""A dataset's own arguments in the recipe."""

REASONING_GYM = "reasoning_gym:"
JSON_SUFFIXES = (".jsonl", ".json")

TRAIN = "train"
"""The split where the recipe names none: all rows of a file, one half of all procedural problems."""

SEED_STRIDE = 1_000_000
"""reasoning_gym draws item i of seed s from s + i: without a stride, seeds 0 and 1 would share all but one item."""


def load_rows(
    source: str, split: str, args: Args, limit: int | None, key: str, *, config: str | None = None
) -> Sequence[Row]:
    """The rows of a dataset, at most `limit` of them. Those of files and hub datasets stay in a compact form.

    `source` is one of
        module:function        called with `args` (and with `split` if it has that parameter); gives dicts
        reasoning_gym:TASK     a procedural task; `args` are size, seed and the task's own parameters
        FILE                   .jsonl, .json or .parquet: one split, `train`, and its slices (`train[:90%]`)
        FOLDER or OWNER/NAME   read by `datasets.load_dataset` with `args` and its configuration `config`
    `key` is the recipe key of the dataset ("data.train"). UserError when it cannot be read, has no rows, or cannot use
    `split`, `args` or `config`.
    """
    path, args = Path(source), copy.deepcopy(dict(args))
    if not source.strip():
        raise UserError(f"{key}.source is empty")
    if config is not None:
        _check_config(source, config, args, key)
        args["name"] = config
    rows: Iterator[Row] | Sequence[Row]
    if source.startswith(REASONING_GYM):
        rows = _reasoning_gym_rows(source.removeprefix(REASONING_GYM), split, args, key)
    elif path.suffix in JSON_SUFFIXES and not _is_folder(path, key):
        if args:
            raise UserError(f"{key}.args: '{source}' is read as it is and takes no arguments, not {', '.join(args)}")
        most = limit if split == TRAIN else None
        read = jsonl_rows if path.suffix == ".jsonl" else json_rows
        rows = _part_of(read(_existing(path, key), most, key), split, f"{key}: '{source}'")
    elif path.suffix == ".parquet" or _is_folder(path, key):
        rows = _local_rows(_existing(path, key), split, args, limit, key)
    elif path.exists():
        raise UserError(f"{key}: '{source}' is no file that can be read: .jsonl, .json and .parquet are, and folders")
    elif ":" in source:
        rows = _function_rows(source, split, args, key)
    elif is_hub_id(source):
        rows = _hub_rows(source, split, args, limit, key)
    else:
        raise UserError(
            f"{key}: '{source}' does not exist, and is neither module:function, reasoning_gym:TASK, a .jsonl, .json or "
            "parquet file, nor OWNER/NAME on the hub"
        )
    loaded = _first(rows, limit) if isinstance(rows, Table) else list(itertools.islice(rows, limit))
    if not len(loaded):
        raise UserError(f"{key}: '{source}' has no rows" + (f" in split '{split}'" if split != TRAIN else ""))
    return loaded


def _check_config(source: str, config: str, args: Args, key: str) -> None:
    if source.startswith(REASONING_GYM) or not (Path(source).is_dir() or (is_hub_id(source) and ":" not in source)):
        raise UserError(f"{key}.config is '{config}', but only folders and hub datasets have configurations")
    if "name" in args:
        raise UserError(f"{key}.config is '{config}' and {key}.args.name {args['name']!r}: leave one of them out")


def _first(rows: Table, limit: int | None) -> Table:
    return rows if limit is None or limit >= len(rows) else rows.part(0, limit)


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


def _part_of(rows: Sequence[Row], split: str, where: str) -> Sequence[Row]:
    """The rows of a file's split, as `datasets` cuts it: `train`, a slice of it, or a sum of slices."""
    if split == TRAIN:
        return rows
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({TRAIN: len(rows)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{where}, split '{split}': {error}") from None
    if isinstance(rows, Table) and len(parts) == 1:
        return rows.part(*_bounds(parts[0].from_, parts[0].to, len(rows)))
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _bounds(start: int | None, stop: int | None, size: int) -> tuple[int, int]:
    start, stop, _ = slice(start, stop).indices(size)
    return start, max(start, stop)


def _local_rows(path: Path, split: str, args: Args, limit: int | None, key: str) -> Sequence[Row]:
    """A parquet file or a folder, through `datasets` with a temporary cache: nothing stays behind or goes stale.

    The files of the cache are mapped, so that their rows stay readable, and their disk space taken, until the process
    ends.
    """
    import datasets

    # Its log would repeat the error, once for each file.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    source = {"path": str(path)} if path.is_dir() else {"path": "parquet", "data_files": str(path)}
    # A file that is mapped stays as a hidden one in a folder of NFS.
    with tempfile.TemporaryDirectory(prefix="cispo-datasets-", ignore_cleanup_errors=True) as cache:
        try:
            return _rows_of(
                datasets.load_dataset(**source, split=split, cache_dir=cache, **args), limit, f"{key}: '{path}'"
            )
        # Any reader of files may fail here, on any content.
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"{key}: cannot read '{path}', split '{split}': {reason}") from error


def _hub_rows(source: str, split: str, args: Args, limit: int | None, key: str) -> Sequence[Row]:
    import datasets

    try:
        return _rows_of(datasets.load_dataset(source, split=split, **args), limit, f"{key}: '{source}'")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: cannot load '{source}', split '{split}', from the hub: {reason}") from error


def _rows_of(dataset: Dataset | IterableDataset, limit: int | None, where: str) -> Sequence[Row]:
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return ArrowRows(dataset, where)
    return [dict(row) for row in itertools.islice(dataset, limit)]


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
            yield as_row(value, f"{key}: row {number} of {source}")
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
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise missing_package(f"{key}: {REASONING_GYM}{task}", error.name or "reasoning_gym") from error

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
