"""The commands as Python functions, for scripts and notebooks: `cispo.train(recipe, rewards=[f])` and its kin.

    recipe (name, file, mapping) + rewards + changes --> recipe file and key=value items --> the command

They do as the commands of the same names, with errors raised instead of printed. Reward functions may be defined in the
script or the notebook itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cispo.errors import RunError, UserError

if TYPE_CHECKING:
    from cispo.compare.results import Results
    from cispo.recipe.schema import Recipe

# Any: the arguments of a reward function are the dataset's columns.
Reward = Callable[..., Any]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The run folder that a training filled."""

    folder: Path

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One row a step."""
        from cispo.output.folder import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint: a Hugging Face model folder."""
        from cispo.output.checkpoint import CheckpointFolder

        return CheckpointFolder(self.folder, 1).last()

    @property
    def best(self) -> Path | None:
        """The best checkpoint by `train.best`."""
        from cispo.output.checkpoint import CheckpointFolder
        from cispo.recipe.held_out import best_metric
        from cispo.recipe.load import read_stored

        metric = best_metric(read_stored(self.folder / "recipe.yaml"))
        return CheckpointFolder(self.folder, 1, metric).best()


def train(
    recipe: str | Path | Mapping[str, object] | Recipe,
    rewards: Sequence[Reward | tuple[Reward, float]] = (),
    *,
    resume: bool | Literal["auto"] = False,
    **changes: object,
) -> TrainedRun:
    """Runs a recipe, as `cispo train` does.

    `rewards` take the place of the recipe's reward functions; a pair is (function, weight). `changes` are sections with
    the keys to change: train={"steps": 20}. Raises UserError for bad input, RunError for a run that broke,
    KeyboardInterrupt for one that was interrupted, after it has saved.
    """
    from cispo.commands.train import train as command

    with _as_command(recipe, rewards, changes) as (path, items):
        return TrainedRun(_run(lambda: command(path, items, resume=resume)))


def sft(recipe: str | Path | Mapping[str, object] | Recipe, **changes: object) -> Path:
    """The supervised warm-up of a recipe alone; returns the checkpoint."""
    from cispo.commands.train import sft as command

    with _as_command(recipe, (), changes) as (path, items):
        return _run(lambda: command(path, items))


def evaluate(
    recipe: str | Path | Mapping[str, object] | Recipe,
    rewards: Sequence[Reward | tuple[Reward, float]] = (),
    *,
    checkpoint: str | Path | None = None,
    **changes: object,
) -> dict[str, float]:
    """Metrics of one policy on the held-out prompts; that of the recipe without a `checkpoint`."""
    from cispo.commands.evaluate import evaluate_checkpoint as command

    with _as_command(recipe, rewards, changes) as (path, items):
        return _run(lambda: command(path, items, None if checkpoint is None else str(checkpoint)))


def generate(
    recipe: str | Path | Mapping[str, object] | Recipe,
    prompt: str,
    *,
    n: int = 4,
    columns: Mapping[str, str] | None = None,
    checkpoint: str | Path | None = None,
    **changes: object,
) -> list[str]:
    """Completions of one prompt; with `columns` of a dataset row, their rewards are printed too."""
    from cispo.commands.evaluate import generate as command

    given = [f"{name}={value}" for name, value in (columns or {}).items()]
    with _as_command(recipe, (), changes) as (path, items):
        return _run(
            lambda: command(
                path,
                items,
                prompt=prompt,
                checkpoint=None if checkpoint is None else str(checkpoint),
                number=n,
                columns=given,
            )
        )


def compare(
    recipe: str | Path | Mapping[str, object] | Recipe,
    rewards: Sequence[Reward | tuple[Reward, float]] = (),
    *,
    algorithms: str | Sequence[str] | None = None,
    seeds: int = 5,
    metric: str = "eval/accuracy",
    updates_per_batch: Sequence[int] | None = None,
    parallel: int | None = None,
    name: str | None = None,
    **changes: object,
) -> dict[str, Results]:
    """Runs algorithms side by side, several seeds each; setting -> results, "" where there is one setting."""
    from cispo.compare.command import compare as command

    names = algorithms if algorithms is None or isinstance(algorithms, str) else ",".join(algorithms)
    updates = None if updates_per_batch is None else ",".join(map(str, updates_per_batch))
    with _as_command(recipe, rewards, changes) as (path, items):
        return _run(
            lambda: command(
                [str(path), *items],
                algorithms=names,
                seeds=seeds,
                metric=metric,
                updates=updates,
                parallel=parallel,
                name=name,
                plot_only=False,
                fit=False,
                equal=None,
            )
        )


def show(
    recipe: str | Path | Mapping[str, object] | Recipe,
    rewards: Sequence[Reward | tuple[Reward, float]] = (),
    **changes: object,
) -> None:
    """Prints the resolved recipe, the algorithm in words, and the process and memory plan."""
    from cispo.commands.show import show as command

    with _as_command(recipe, rewards, changes) as (path, items):
        _run(lambda: command(path, items))


def export(checkpoint: str | Path, to: str | Path, *, dtype: str = "float32", merge: bool = False) -> Path:
    """Writes a checkpoint as a Hugging Face model folder; returns that."""
    from cispo.commands.export import export as command

    command(Path(checkpoint), Path(to), dtype, merge=merge)
    return Path(to)


@contextlib.contextmanager
def _as_command(
    recipe: str | Path | Mapping[str, object] | Recipe,
    rewards: Sequence[Reward | tuple[Reward, float]],
    changes: Mapping[str, object],
) -> Iterator[tuple[Path, list[str]]]:
    """(recipe file, key=value items) for a command."""
    items = [f"{key}={_written(value, key)}" for key, value in changes.items()]
    if rewards:
        items.append(f"reward.functions={_written(_terms(rewards), 'rewards')}")
    if isinstance(recipe, str | Path):
        yield Path(recipe), items
        return
    from cispo.recipe.load import dump_yaml
    from cispo.recipe.schema import Recipe

    with tempfile.TemporaryDirectory(prefix="cispo-recipe-") as folder:
        file = Path(folder) / "given.yaml"
        text = dump_yaml(recipe) if isinstance(recipe, Recipe) else _written(dict(recipe), "recipe")
        file.write_text(text, encoding="utf-8")
        yield file, items


def _terms(rewards: Sequence[Reward | tuple[Reward, float]]) -> list[dict[str, object]]:
    from cispo.recipe.user_code import give

    if callable(rewards):
        raise UserError("rewards must be a list of functions: rewards=[f]")
    pairs = [(r if isinstance(r, tuple) else (r, 1.0)) for r in rewards]
    for function, _ in pairs:
        if not callable(function) and not isinstance(function, str):
            raise UserError(f"rewards: {function!r:.80} is neither a function nor module:function")
    names = [f if isinstance(f, str) else give(f, "rewards") for f, _ in pairs]
    double = next((name for name in names if names.count(name) > 1 and name.startswith("__main__:")), None)
    if double is not None:
        raise UserError(f"rewards: two functions are called {double.partition(':')[2]}: give each a name of its own")
    return [{"fn": name, "weight": weight} for name, (_, weight) in zip(names, pairs, strict=True)]


def _written(value: object, key: str) -> str:
    """A value as JSON, which is YAML."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"{key}: {error}") from None


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run(command: Callable[[], _T]) -> _T:
    """The command's result, also where an event loop runs already, as in a notebook: then in a thread."""
    from cispo.runtime.interrupts import interrupt_running

    if not _loop_runs():
        return command()
    found: list[_T] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            found.append(command())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while thread.is_alive():
        try:
            thread.join(0.2)
        except KeyboardInterrupt:
            if not interrupt_running():
                raise
    if failed:
        raise failed[0]
    if not found:
        raise RunError("the command ended without a result")
    return found[0]
