"""The plan of `cispo compare`: the arms that recipes x algorithms x updates per batch span, on one task and budget."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cispo.algorithms.choice import algorithm_of
from cispo.engines.choice import settled
from cispo.errors import UserError
from cispo.recipe.load import changed, load_recipe, need
from cispo.recipe.schema import MAX_NAME, NAME, Recipe
from cispo.recipe.text import read_value

# Keys that are no part of an algorithm: an arm of another algorithm keeps the recipe's.
_SHARED_KEYS = ("updates_per_batch", "epochs", "overlong_penalty")
_TASK_SECTIONS = ("policy", "data", "eval", "sft", "reward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One algorithm in one setting, to be run once a seed."""

    name: str
    setting: str
    """Arms are compared within a setting: the recipe and updates per batch where there are several, else ""."""
    recipe: Recipe
    """The recipe of the first seed."""

    @property
    def folder_name(self) -> str:
        label = f"{self.name} {self.setting}" if self.setting else self.name
        return re.sub(r"[^A-Za-z0-9._=+-]+", "_", label).strip("_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    folder: Path
    arms: Sequence[Arm]
    seeds: int
    metric: str
    command: str


def make_plan(
    items: Sequence[str], *, algorithms: str | None, seeds: int, metric: str, updates: str | None, name: str | None
) -> Plan:
    """The arms that recipes (and key=value items), algorithms and updates per batch span.

    Raises UserError for arms that cannot be run or compared: an unknown algorithm, recipes of different tasks ...
    """
    paths = [item for item in items if "=" not in item or Path(item).exists()]
    overrides = [item for item in items if item not in paths]
    if not paths:
        raise UserError("compare needs at least one recipe")
    if not metric:
        raise UserError("--metric is empty")
    recipes = [settled(load_recipe(path, overrides)) for path in paths]
    for recipe in recipes:
        need(recipe, "data", "reward")
    if metric.startswith("eval/"):
        need(recipes[0], "eval")
    _check_same_task(recipes, paths)
    counts = _updates(updates)
    arms = []
    for path, recipe in zip(paths, recipes, strict=True):
        for count in counts:
            label = [Path(path).stem] * (len(paths) > 1 and algorithms is not None)
            label += [f"k={count}"] * (len(counts) > 1)
            for algorithm in [None] if algorithms is None else _split(algorithms):
                arm = _arm_recipe(recipe, algorithm, count, overrides)
                title = algorithm or (Path(path).stem if len(paths) > 1 else recipe.algorithm.name)
                arms.append(Arm(name=title, setting=" ".join(label), recipe=arm))
    if name is not None and (not re.fullmatch(NAME, name) or len(name) > MAX_NAME):
        raise UserError(f"--name {name!r:.120} is not a name of letters, digits, '.', '_' and '-'")
    folder = Path(recipes[0].output_dir) / (name or f"{recipes[0].name}-compare")
    command = shlex.join(["cispo", "compare", *sys.argv[2:]])
    return Plan(folder=folder, arms=_distinct(arms), seeds=seeds, metric=metric, command=command)


def _updates(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    counts = text.split(",")
    wrong = [c for c in counts if not re.fullmatch(r"\s*[1-9]\d{0,8}\s*", c, re.ASCII)]
    if wrong:
        raise UserError(f"--updates-per-batch {text!r:.80}: {wrong[0]!r:.80} is not a positive number")
    return [int(c) for c in counts]


def _split(algorithms: str) -> list[str]:
    """ "cispo,grpo(kl_coef=0, clip_high=0.3)" at the commas outside of parentheses."""
    names = [part.strip() for part in re.split(r",(?![^(]*\))", algorithms)]
    if not all(names):
        raise UserError(f"--algorithms {algorithms!r}: a name is empty")
    return names


def _arm_recipe(recipe: Recipe, algorithm: str | None, updates: int | None, overrides: Sequence[str]) -> Recipe:
    """The recipe with an arm's algorithm: its own settings where it names the same one, else that algorithm's defaults.

    `algorithm.key=value` on the command line holds for every arm, name(key=value) for its own.
    """
    keys = recipe.algorithm.model_dump(mode="json")
    if algorithm is not None:
        match = re.fullmatch(r"([^()]+?)\s*(?:\((.*)\))?", algorithm)
        if match is None:
            raise UserError(f"--algorithms: {algorithm!r} is not of the form name or name(key=value, ...)")
        name, settings = match[1], match[2] or ""
        if name != keys["name"]:
            kept = {key: keys[key] for key in _SHARED_KEYS}
            given = [o.removeprefix("algorithm.").split("=", 1)[0] for o in overrides if o.startswith("algorithm.")]
            keys = {**kept, **{key: keys[key] for key in given if key in keys}, "name": name}
        keys |= _settings(settings, algorithm)
    if updates is not None:
        keys["updates_per_batch"] = updates
    train = recipe.train.model_dump() | {"max_prompts": recipe.train.steps * recipe.rollout.prompts_per_step}
    arm = changed(recipe, {"algorithm": keys, "train": train}, where=algorithm or recipe.name)
    try:
        algorithm_of(arm)
    except UserError as error:
        raise UserError(f"arm {algorithm or recipe.name}: {error}") from None
    return arm


def _settings(text: str, algorithm: str) -> dict[str, object]:
    settings: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--algorithms: {item!r} in {algorithm!r} is not of the form key=value")
        if key.strip() in settings:
            raise UserError(f"--algorithms: {algorithm!r} sets {key.strip()} twice")
        settings[key.strip()] = read_value(value.strip(), f"algorithm.{key.strip()}", f"--algorithms: {item!r}")
    return settings


def _check_same_task(recipes: Sequence[Recipe], paths: Sequence[str]) -> None:
    first = recipes[0]

    def budget(recipe: Recipe) -> tuple[int, ...]:
        rollout, prompts = recipe.rollout, recipe.train.steps * recipe.rollout.prompts_per_step
        return prompts, rollout.group_size, rollout.max_tokens, rollout.max_context

    for path, recipe in zip(paths[1:], recipes[1:], strict=True):
        other = [key for key in _TASK_SECTIONS if getattr(recipe, key) != getattr(first, key)]
        if other:
            raise UserError(
                f"{paths[0]} and {path} are different tasks: their {other[0]}: sections differ, so nothing that their "
                "arms reach can be compared"
            )
        if budget(recipe) != budget(first):
            raise UserError(
                f"{paths[0]} and {path} have different budgets (prompts, completions of each, max_tokens, "
                f"max_context): {budget(first)} and {budget(recipe)}"
            )


def _distinct(arms: Sequence[Arm]) -> list[Arm]:
    """Gives arms that are named twice names of their own; both run: a check that nothing differs by chance."""
    seen: dict[tuple[str, str], int] = {}
    result = []
    for arm in arms:
        count = seen[arm.name, arm.setting] = seen.get((arm.name, arm.setting), 0) + 1
        name = arm.name if count == 1 else f"{arm.name} #{count}"
        result.append(replace(arm, name=name))
    return result
