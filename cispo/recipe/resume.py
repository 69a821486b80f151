"""Changes that a resumed run may have: those of where and how long it runs, none that makes it another run.

A path may be given in another form, or from another current directory, as long as it leads to the same files.
"""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cispo.errors import UserError
from cispo.recipe.load import locate, read_stored, stored_values, with_paths
from cispo.recipe.schema import Recipe

# Sections and keys that change nothing of the computation, or only of the steps to come.
_FREE = (
    "output_dir",
    "logging",
    "device",
    "runtime",
    "rollout.engines",
    "rollout.tensor_parallel",
    "rollout.placement",
    "rollout.gpu_memory",
    "rollout.weight_sync",
    "rollout.verify_weights",
    "rollout.engine_args",
    "reward.timeout",
    "reward.workers",
    "reward.functions.timeout",
    "reward.functions.concurrency",
    # A row that is too long was never sampled, however that is told.
    "data.overlong",
    "learner.ranks",
    "learner.shard",
    "learner.context_parallel",
    "learner.expert_parallel",
    "learner.expert_tensor_parallel",
    "learner.tokens_per_micro_batch",
    "learner.gradient_checkpointing",
    "learner.offload",
    "train",
    "control",
)

_PATH = re.compile(r"policy\.(model|tokenizer)|(data|data\.sources\.\d+|eval|eval\.\d+|sft\.data)\.source")
"""Keys that can name a file or folder to read."""

_LISTS = ("data.sources", "eval", "reward.functions")
"""Lists whose entries are compared key by key."""


def check_same_run(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the paths that only the run knows, and the number format and engine that an auto chose in it.

    Raises UserError where the run folder's recipe differs in a key that makes another run of it. A key that is newer
    than the run has its default in the run.
    """
    before = read_stored(folder / "recipe.yaml")
    homes = _homes(before, folder)
    recipe = _with_stored_choices(_with_stored_paths(recipe, before, homes), before)
    found = difference(before, recipe, free=_FREE, homes=homes)
    if found is not None:
        key, old, new = found
        raise UserError(
            f"--resume: the run in {folder} has {key} {old!r}, not {new!r}: that would be another run (start it "
            "without --resume)"
        )
    return recipe


def difference(
    before: Recipe, now: Recipe, *, free: Sequence[str] = ("output_dir", "logging"), homes: Sequence[Path] = ()
) -> tuple[str, object, object] | None:
    """The first key, in alphabetical order, in which two recipes differ, and its two values; None without one.

    `free` are sections and keys that may differ. Relative paths of `before` start from one of `homes`.
    """
    old, new = _leaves(before), _leaves(now)
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        plain = re.sub(r"\.\d+(?=\.)", "", key)
        if any(plain == name or plain.startswith(f"{name}.") for name in free) or repr(a) == repr(b):
            continue
        if _PATH.fullmatch(key) and isinstance(a, str) and isinstance(b, str) and _same_files(a, b, homes):
            continue
        return key, a, b
    return None


def output_dirs(recipe: Recipe, path: str | Path, overrides: Sequence[str]) -> list[str]:
    """Folders in which to look for a recipe's runs: its output_dir first.

    One that was relative to another current directory may lie beside the recipe's file, and a file recipe.yaml in the
    run folder itself.
    """
    if any(item.startswith("output_dir=") for item in overrides):
        return [recipe.output_dir]
    file = locate(path)
    above = [str(file.absolute().parents[1])] if file.name == "recipe.yaml" and len(file.absolute().parts) > 2 else []
    return [recipe.output_dir, str(file.parent / recipe.output_dir), *above]


def _homes(before: Recipe, folder: Path) -> list[Path]:
    """The directories that relative paths of a run may start from: the one of its start, where that can be told."""
    runs, given = folder.absolute().parent, Path(before.output_dir)
    if given.is_absolute() or ".." in given.parts or runs.parts[-len(given.parts) :] != given.parts:
        return []
    return [runs.parents[len(given.parts) - 1]] if given.parts else [runs]


def _with_stored_paths(recipe: Recipe, before: Recipe, homes: Sequence[Path]) -> Recipe:
    known = [value for key, value in _leaves(before).items() if _PATH.fullmatch(key) and isinstance(value, str)]

    def found(value: str) -> str:
        if os.path.exists(value):
            return value
        places = [place for place in known if Path(place).is_absolute() and _ends_with(place, value)]
        places += [str(home / value) for home in homes]
        return next((place for place in places if os.path.exists(place)), value)

    return with_paths(recipe, found)


def _with_stored_choices(recipe: Recipe, before: Recipe) -> Recipe:
    policy, rollout = recipe.policy, recipe.rollout
    if policy.dtype == "auto":
        policy = policy.model_copy(update={"dtype": before.policy.dtype})
    if rollout.engine == "auto":
        rollout = rollout.model_copy(update={"engine": before.rollout.engine})
    return recipe.model_copy(update={"policy": policy, "rollout": rollout})


def _same_files(before: str, now: str, homes: Sequence[Path]) -> bool:
    """Whether a path of a run and one of today lead to the same files, or to files with the same content.

    A path of the run that leads nowhere any more, since the files were moved, is compared by its name.
    """
    if not os.path.exists(now):
        return False
    places = [place for place in (Path(before), *(home / before for home in homes)) if os.path.exists(place)]
    if not places:
        return _ends_with(now, before if not os.path.isabs(before) else Path(before).name)
    return any(os.path.samefile(place, now) or _same_content(place, Path(now)) for place in places)


def _ends_with(path: str, end: str) -> bool:
    parts = Path(end).parts
    return bool(parts) and Path(path).parts[-len(parts) :] == parts


def _same_content(a: Path, b: Path) -> bool:
    if a.is_dir() and b.is_dir():
        names = [{str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} for folder in (a, b)]
        return names[0] == names[1] and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names[0])
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)


def _leaves(recipe: Recipe) -> dict[str, object]:
    """Dotted key -> value as it is stored; an empty section is a value."""
    return dict(_walk(stored_values(recipe), ""))


def _walk(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if prefix + key in _LISTS and isinstance(value, list):
            value = {str(number): entry for number, entry in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
