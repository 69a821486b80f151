"""`cispo train` and `cispo sft`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from cispo.output.checkpoint import CheckpointFolder, step_of
from cispo.output.folder import create_run_folder, last_run_folder
from cispo.output.screen import Screen
from cispo.recipe.load import load_recipe, need
from cispo.recipe.resume import check_same_run
from cispo.run import Run, load_task
from cispo.runtime.interrupts import Interrupts


def train(path: Path, overrides: Sequence[str], *, resume: bool) -> None:
    """`cispo train`: everything a recipe names is checked first, then a run folder is made and filled.

    With `resume` the last run of that name goes on from its newest whole checkpoint, or from its start.
    """
    recipe = load_recipe(path, overrides)
    need(recipe, "data", "reward")
    screen = Screen()
    interrupts = Interrupts(screen.print)
    if resume:
        folder = last_run_folder(recipe.output_dir, recipe.name)
        check_same_run(recipe, folder)
        checkpoint = CheckpointFolder(folder, recipe.train.keep).last()
        if checkpoint is not None and step_of(checkpoint) >= recipe.train.steps:
            screen.print(f"{folder} has all its {recipe.train.steps} steps: a larger train.steps goes on from there")
            return
        task = load_task(recipe)
    else:
        task = load_task(recipe)
        folder, checkpoint = create_run_folder(recipe.output_dir, recipe.name), None
    run = Run(recipe, task, folder, screen, interrupts, checkpoint=checkpoint)
    run.announce()
    interrupts.run(run.train())


def sft(path: Path, overrides: Sequence[str]) -> None:
    """`cispo sft`: the warm-up alone, saved as a checkpoint."""
    recipe = load_recipe(path, overrides)
    need(recipe, "sft")
    screen = Screen()
    task = load_task(recipe)
    run = Run(recipe, task, create_run_folder(recipe.output_dir, recipe.name), screen, Interrupts(screen.print))
    run.announce()
    print(f"policy: {asyncio.run(run.sft())}")
