"""`cispo train` and `cispo sft`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cispo.errors import UserError
from cispo.output.run_folder import create_run_folder, last_run_folder, no_run_above, only_user_of
from cispo.output.screen import Screen
from cispo.recipe.load import load_recipe, need
from cispo.recipe.resume import check_same_run, output_dirs
from cispo.recipe.schema import Recipe
from cispo.runtime.garbage import no_collections
from cispo.runtime.interrupts import Interrupts
from cispo.runtime.start_parts import StartParts
from cispo.runtime.watchdog import Activity

if TYPE_CHECKING:
    from cispo.runtime.ahead import Ahead


def train(path: Path, overrides: Sequence[str], *, resume: bool | Literal["auto"]) -> Path:
    """`cispo train`: everything a recipe names is checked first, then a run folder is made and filled.

    With `resume` the last run of that name goes on from its newest whole checkpoint, or from its start. "auto" starts
    the first run of a name. Returns the run folder.
    """
    start = StartParts()
    recipe = load_recipe(path, overrides)
    need(recipe, "data", "reward")
    screen = Screen()
    interrupts = Interrupts(screen.print)
    places = output_dirs(recipe, path, overrides) if resume else []
    found = (last_run_folder(place, recipe.name) for place in places)
    before = next((folder for folder in found if folder is not None), None)
    if before is not None:
        _go_on(recipe.model_copy(update={"output_dir": str(before.parent)}), before, screen, interrupts, start)
        return before
    if resume is True:
        raise UserError(f"--resume: {Path(recipe.output_dir) / recipe.name} holds no run")
    with _processes(recipe) as ahead:
        with start.timed("import"), no_collections():
            from cispo.run import Run, load_task
        with start.timed("inputs"):
            task = load_task(recipe)
        with no_run_above(Path(recipe.output_dir)), create_run_folder(recipe.output_dir, recipe.name) as folder:
            run = Run(recipe, task, folder, screen, interrupts, ahead=ahead, start=start)
            run.announce()
            interrupts.run(run.train())
            return folder.path


def _go_on(recipe: Recipe, path: Path, screen: Screen, interrupts: Interrupts, start: StartParts) -> None:
    """Continues the run in a folder, where it has steps left."""
    from cispo.output.checkpoint import CheckpointFolder, step_of
    from cispo.output.folder import logged_steps

    with only_user_of(path) as folder:
        recipe = check_same_run(recipe, path)
        checkpoint = CheckpointFolder(path, recipe.train.keep).resume_point(logged_steps(path), screen.warn)
        if checkpoint is not None and step_of(checkpoint) >= recipe.train.steps:
            screen.print(f"{path} has all its {recipe.train.steps} steps: a larger train.steps goes on from there")
            return
        with _processes(recipe) as ahead:
            with start.timed("import"), no_collections():
                from cispo.run import Run, load_task
            with start.timed("inputs"):
                task = load_task(recipe)
            run = Run(recipe, task, folder, screen, interrupts, checkpoint=checkpoint, ahead=ahead, start=start)
            run.announce()
            interrupts.run(run.train())


def _processes(recipe: Recipe, *, engines: bool = True) -> Ahead:
    """The run's processes, which begin to start now."""
    from cispo.runtime.ahead import Ahead

    def critic() -> bool:
        from cispo.algorithms.choice import algorithm_of

        return engines and algorithm_of(recipe).critic

    def settle(recipe: Recipe, device: Literal["cpu", "cuda"]) -> Recipe:
        from cispo.engines.choice import settled

        return settled(recipe, device)

    return Ahead(recipe, Activity(), critic=critic, settle=settle, engines=engines)


def sft(path: Path, overrides: Sequence[str]) -> Path:
    """`cispo sft`: the warm-up alone; returns the checkpoint."""
    recipe = load_recipe(path, overrides)
    need(recipe, "sft")
    screen = Screen()
    interrupts = Interrupts(screen.print)
    with _processes(recipe, engines=False) as ahead:
        from cispo.run import Run, load_task

        task = load_task(recipe)
        with no_run_above(Path(recipe.output_dir)), create_run_folder(recipe.output_dir, recipe.name) as folder:
            run = Run(recipe, task, folder, screen, interrupts, ahead=ahead)
            run.announce()

            async def warm_up() -> None:
                checkpoints.append(await run.sft())
                print(f"policy: {checkpoints[0]}")

            checkpoints: list[Path] = []
            interrupts.run(warm_up())
            return checkpoints[0]
