"""`cispo compare`: recipes x algorithms x updates per batch x seeds on one task, and a report of what differed.

    runs/NAME-compare/
      warm/seed_0/                  the warm-up of a seed, shared by its arms
      arms/ARM/seed_0/              a run folder each, with outcome.json once it ended
      report.html  results.json  *.png

Every arm gets the same prompts in the same order, the same start and the same number of completions. Arms that ended
are never run again: the same command continues an interrupted comparison, or adds arms and seeds to a finished one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cispo.algorithms.choice import algorithm_of
from cispo.algorithms.describe import describe
from cispo.compare.comparison import ArmResult, Comparison, RunResult, assert_equal, require_metric
from cispo.compare.overview import write_overview
from cispo.compare.plan import Arm, Plan, make_plan
from cispo.compare.report import summary_lines, write_report
from cispo.errors import Diverged, RunError, UserError
from cispo.files import write_json
from cispo.output.checkpoint import CheckpointFolder
from cispo.output.folder import read_metrics
from cispo.output.screen import Screen, progress_bars
from cispo.recipe.load import dump_yaml
from cispo.recipe.schema import Recipe
from cispo.run import Run, Task, load_task
from cispo.runtime.interrupts import Interrupts
from cispo.runtime.placement import gpus_of
from cispo.runtime.watchdog import Activity
from cispo.start import make_runtime, num_processes


def compare(
    items: Sequence[str],
    *,
    algorithms: str | None,
    seeds: int,
    metric: str,
    updates: str | None,
    parallel: int | None,
    name: str | None,
    plot_only: bool,
    fit: bool,
    equal: Path | None,
) -> None:
    """Runs what is not yet run, and reports."""
    stored = _stored(equal)
    plan = make_plan(items, algorithms=algorithms, seeds=seeds, metric=metric, updates=updates, name=name)
    console = Console(highlight=False)
    if not plot_only:
        interrupts = Interrupts(console.print)
        interrupts.run(run_arms(plan, parallel or _parallel(plan), console, interrupts))
    elif not plan.folder.is_dir():
        raise UserError(f"--plot-only: there is no comparison in {plan.folder} yet")
    found = report(plan, console, fit=fit)
    if stored is not None:
        differences = [line for setting in found for line in assert_equal(found[setting], _setting(stored, setting))]
        if differences:
            raise RunError(f"--assert-equal {equal}: {len(differences)} differences, the first: {differences[0]}")
        console.print(f"equal to {equal} in every value")


def _parallel(plan: Plan) -> int:
    """Arms side by side that keep the machine busy: a run samples or learns at a time, never both."""
    recipe = plan.arms[0].recipe
    if recipe.runtime == "local":
        return 1
    gpus = max(gpus_of(arm.recipe, critic=algorithm_of(arm.recipe).critic) for arm in plan.arms)
    if gpus:
        return max(1, torch.cuda.device_count() // gpus)
    busy = max(max(arm.recipe.learner.ranks, arm.recipe.rollout.engines) for arm in plan.arms)
    return max(1, (os.cpu_count() or 1) // busy)


async def run_arms(plan: Plan, parallel: int, console: Console, interrupts: Interrupts) -> None:
    """Runs all arms that have not ended yet, `parallel` at a time, seed after seed; an interrupt ends them in order."""
    first = plan.arms[0].recipe
    todo = [(arm, index) for index in range(plan.seeds) for arm in plan.arms if not _ended(plan, arm, index)]
    total = len(plan.arms) * plan.seeds
    console.print(
        f"[bold]{plan.folder}[/]: {len(plan.arms)} arms x {plan.seeds} seeds, {total - len(todo)} of {total} runs "
        f"ended, {parallel} side by side"
    )
    if not todo:
        return
    task = load_task(first)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{plan.folder} cannot be written: {error.strerror}") from None
    needed = max(num_processes(arm.recipe, critic=algorithm_of(arm.recipe).critic) for arm in plan.arms)
    cluster = make_runtime(first, needed * parallel, Activity())
    slots, bars = asyncio.Semaphore(parallel), progress_bars(console)
    warm: dict[int, asyncio.Task[str]] = {}

    def start_of(arm: Arm, index: int) -> asyncio.Task[str]:
        seed = arm.recipe.seed + index
        if seed not in warm:
            screen = Screen(console, bars=bars, label=f"seed {seed}")
            warm[seed] = asyncio.create_task(_warm_up(plan, seed, task, slots, screen, interrupts))
        return warm[seed]

    async def one(arm: Arm, index: int) -> None:
        start = await start_of(arm, index) if arm.recipe.sft else None
        async with slots:
            if interrupts.requested:
                return
            label = f"{arm.folder_name} seed {arm.recipe.seed + index}"
            await _run_arm(plan, arm, index, start, task, Screen(console, bars=bars, label=label), interrupts)

    tasks = [asyncio.create_task(one(arm, index)) for arm, index in todo]
    try:
        with bars:
            await asyncio.gather(*tasks)
    finally:
        if interrupts.requested:
            console.print("runs that ended are kept, others go on from their checkpoints: give the same command again")
        for running in (*tasks, *warm.values()):
            running.cancel()
        await asyncio.gather(*tasks, *warm.values(), return_exceptions=True)
        cluster.close()


def run_folder(plan: Plan, arm: Arm, index: int) -> Path:
    return plan.folder / "arms" / arm.folder_name / f"seed_{arm.recipe.seed + index}"


def _with_seed(plan: Plan, arm: Arm, index: int) -> Recipe:
    """The recipe of one run, but for the warm start."""
    return arm.recipe.model_copy(
        update={"seed": arm.recipe.seed + index, "name": arm.folder_name[:80], "output_dir": str(plan.folder / "arms")}
    )


def _identity(recipe: Recipe) -> str:
    """What makes two runs the same: the whole recipe but for where it is written."""
    return dump_yaml(recipe.model_copy(update={"output_dir": ""}))


def _ended(plan: Plan, arm: Arm, index: int) -> bool:
    """Whether a run has its outcome; UserError where its folder belongs to another recipe."""
    folder = run_folder(plan, arm, index)
    outcome = _outcome(folder)
    if outcome is None:
        return False
    if outcome["identity"] != _identity(_with_seed(plan, arm, index)):
        raise UserError(
            f"{folder} holds a run of another recipe: choose another --name, or delete the folder to run it again"
        )
    # What ended by itself ends so again; an engine that was killed or ran out of memory need not.
    return outcome["status"] in ("done", "diverged")


def _outcome(folder: Path) -> dict[str, Any] | None:
    file = folder / "outcome.json"
    return json.loads(file.read_text()) if file.exists() else None


async def _warm_up(
    plan: Plan, seed: int, task: Task, slots: asyncio.Semaphore, screen: Screen, interrupts: Interrupts
) -> str:
    """The policy after the supervised warm-up of a seed, made once: the first arm's, without its algorithm."""
    folder = plan.folder / "warm" / f"seed_{seed}"
    first = plan.arms[0].recipe.model_dump()
    neutral = Recipe.model_validate({**first, "seed": seed, "name": "warm", "algorithm": {}})
    done = CheckpointFolder(folder, 1).whole()
    if done and _holds(folder, neutral):
        return str(done[-1])
    async with slots:
        _empty(folder)
        return str(await Run(neutral, task, folder, screen, interrupts, alone=False).sft())


def _holds(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder is of a run of exactly this recipe."""
    file = folder / "recipe.yaml"
    return file.exists() and file.read_text() == dump_yaml(recipe)


async def _run_arm(
    plan: Plan, arm: Arm, index: int, start: str | None, task: Task, screen: Screen, interrupts: Interrupts
) -> None:
    """One run, or what is left of it, and its outcome: an arm that breaks must not end the others."""
    folder, recipe = run_folder(plan, arm, index), _with_seed(plan, arm, index)
    outcome: dict[str, Any] = {"status": "done", "identity": _identity(recipe)}
    if start is not None:
        policy = recipe.policy.model_copy(update={"model": start, "config": None})
        recipe = recipe.model_copy(update={"policy": policy, "sft": None})
    checkpoint = CheckpointFolder(folder, recipe.train.keep).last() if _holds(folder, recipe) else None
    if checkpoint is None:
        _empty(folder)
    started = time.perf_counter()
    try:
        await Run(recipe, task, folder, screen, interrupts, checkpoint=checkpoint, alone=False).train()
        if interrupts.requested:
            return
    except UserError:
        raise
    except Diverged as error:
        outcome |= {"status": "diverged", "sentence": str(error)}
    except Exception as error:
        # Whatever else it is: it is told in the report, with the traceback beside the run.
        (folder / "error.txt").write_text(traceback.format_exc())
        reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        outcome |= {"status": "failed", "sentence": " ".join(reason.split())[:300]}
    outcome["seconds"] = time.perf_counter() - started
    write_json(folder / "outcome.json", outcome)
    if outcome["status"] == "done":
        # At once, and not when all arms have run: the name may be misspelt.
        require_metric(_arm_result(plan, arm), plan.metric)
    values = [row[plan.metric] for row in read_metrics(folder / "metrics.jsonl") if plan.metric in row]
    said = outcome.get("sentence") or f"{plan.metric} {values[0]:.3f} -> {values[-1]:.3f}"
    screen.print(f"{said} ({outcome['seconds']:.0f} s)")


def _empty(folder: Path) -> None:
    """A new folder; what an interrupted run left there goes."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def report(plan: Plan, console: Console, *, fit: bool) -> dict[str, dict[str, Any]]:
    """Writes the pages of all settings, prints the summary, and returns what was found: setting -> results."""
    comparisons = _comparisons(plan)
    pages, found = {}, {}
    for setting, comparison in comparisons.items():
        files = write_report(comparison, plan.folder / setting.replace(" ", "_"), fit=fit)
        pages[setting], found[setting] = files.page, json.loads(files.results.read_text())
        if setting:
            console.print(f"\n[bold]{setting}[/]")
        for part in summary_lines(comparison):
            console.print(part)
    page = pages[""] if "" in pages else write_overview(comparisons, pages, found, plan.folder)
    console.print(f"report: {page}")
    return found


def _comparisons(plan: Plan) -> dict[str, Comparison]:
    """Setting -> what its arms measured; arms of which no run has ended are left out."""
    results = [(arm, _arm_result(plan, arm)) for arm in plan.arms]
    if not any(result.runs for _, result in results):
        raise UserError(f"no run in {plan.folder} has ended yet: there is nothing to report")
    missing = [f"{arm.name} {arm.setting}".strip() for arm, result in results if not result.runs]
    notes = _notes(plan) + ([f"Not run yet: {', '.join(missing)}."] if missing else [])
    return {
        setting: Comparison(
            name=f"{plan.folder.name} {setting}".strip(),
            metric=plan.metric,
            arms=[result for arm, result in results if arm.setting == setting and result.runs],
            seeds=[plan.arms[0].recipe.seed + index for index in range(plan.seeds)],
            command=plan.command,
            machine=_machine(plan.arms[0].recipe),
            notes=notes,
        )
        for setting in dict.fromkeys(arm.setting for arm, result in results if result.runs)
    }


def _arm_result(plan: Plan, arm: Arm) -> ArmResult:
    runs = []
    for index in range(plan.seeds):
        folder = run_folder(plan, arm, index)
        outcome = _outcome(folder)
        if outcome is None:
            continue
        table = folder / "dropped_tokens.json"
        runs.append(
            RunResult(
                # Pairs are the arms' first seeds, second seeds ..., which are equal unless recipes start from others.
                seed=plan.arms[0].recipe.seed + index,
                history=read_metrics(folder / "metrics.jsonl"),
                seconds=outcome["seconds"],
                failure=outcome.get("sentence"),
                dropped_tokens=json.loads(table.read_text()) if table.exists() else (),
            )
        )
    return ArmResult(name=arm.name, runs=runs, words=describe(algorithm_of(arm.recipe)))


def _machine(recipe: Recipe) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and recipe.device != "cpu" else "no GPU"
    return f"{platform.machine()}, {os.cpu_count()} cores, {device}, torch {torch.__version__}"


def _notes(plan: Plan) -> list[str]:
    recipe = plan.arms[0].recipe
    prompts = recipe.train.max_prompts
    notes = [
        f"Every run samples {recipe.rollout.group_size} completions of each of the same {prompts:,} prompts in the "
        "same order of its seed"
        + (", from the same warm start of its seed." if recipe.sft else ".")
        + " An algorithm that replaces groups of equal rewards makes fewer updates of them.",
        "Seconds are those of the training steps, measured while other runs may have shared the machine.",
    ]
    seeds = {arm.recipe.seed for arm in plan.arms}
    if len(seeds) > 1:
        notes.append(f"Arms start from different seeds ({', '.join(map(str, sorted(seeds)))}): pairs share nothing.")
    return notes


def _stored(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        stored = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"--assert-equal {file}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--assert-equal {file} is not JSON") from None
    if not isinstance(stored, dict) or not {"arms", "settings"} & stored.keys():
        raise UserError(f"--assert-equal {file} is not the results.json of a comparison")
    return stored


def _setting(stored: dict[str, Any], setting: str) -> dict[str, Any]:
    if not setting:
        return stored
    if setting not in stored.get("settings", {}):
        raise UserError(f"--assert-equal: the stored results have no setting {setting!r}")
    return stored["settings"][setting]
