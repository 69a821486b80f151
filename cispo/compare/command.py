"""`cispo compare`: recipes x algorithms x updates per batch x seeds on one task, and a report of the differences.

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
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from typing_extensions import TypedDict

from cispo.algorithms.choice import algorithm_of
from cispo.algorithms.describe import describe
from cispo.compare.comparison import ArmResult, Comparison, RunResult, require_metric
from cispo.compare.overview import write_overview
from cispo.compare.plan import Arm, Plan, make_plan
from cispo.compare.report import summary_lines, write_report
from cispo.compare.results import OverviewResults, Results, assert_equal
from cispo.errors import Diverged, RunError, UserError
from cispo.files import disk_errors, read_json, write_json
from cispo.output.checkpoint import CheckpointFolder
from cispo.output.drawing import new_figure
from cispo.output.folder import logged_steps, read_metrics
from cispo.output.integrity import damage
from cispo.output.run_folder import RunFolder, no_run_above, only_user_of
from cispo.output.screen import Screen, new_console, progress_bars
from cispo.recipe.load import changed, dump_yaml, read_stored, stored_recipe
from cispo.recipe.resume import difference
from cispo.recipe.schema import Recipe
from cispo.run import Run, Task, load_task
from cispo.runtime.interrupts import Interrupts
from cispo.runtime.placement import gpus_of
from cispo.runtime.watchdog import Activity
from cispo.start import make_runtime, num_processes

Status = Literal["done", "diverged", "failed"]


@dataclass(frozen=True, slots=True)
class _Setup:
    """A comparison under way."""

    plan: Plan
    task: Task
    parallel: int
    """Runs side by side."""
    interrupts: Interrupts


class Outcome(TypedDict):
    """outcome.json of a run that ended."""

    status: Status
    identity: str
    """The recipe of the run: see `_identity`."""
    seconds: float
    sentence: NotRequired[str]
    """The reason of a run that diverged or failed."""


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
) -> dict[str, Results]:
    """Runs the arms that have not ended, and reports; returns setting -> results."""
    new_figure("cispo compare")
    stored = _stored(equal)
    plan = make_plan(items, algorithms=algorithms, seeds=seeds, metric=metric, updates=updates, name=name)
    console = new_console()
    if plot_only and not plan.folder.is_dir():
        raise UserError(f"--plot-only: there is no comparison in {plan.folder} yet")
    # A new folder is made once the task is known to be sound.
    task = None if plan.folder.is_dir() else load_task(plan.arms[0].recipe)
    with no_run_above(plan.folder.parent), _made(plan.folder):
        if not plot_only:
            interrupts = Interrupts(console.print)
            interrupts.run(run_arms(plan, parallel or _parallel(plan), console, interrupts, task))
        with disk_errors(plan.folder):
            found = report(plan, console, fit=fit)
    if stored is not None:
        missing = [setting for setting in found if setting not in stored]
        if missing:
            raise UserError(f"--assert-equal: the stored results have no setting {missing[0]!r}")
        differences = [line for setting in found for line in assert_equal(found[setting], stored[setting])]
        if differences:
            raise RunError(f"--assert-equal {equal}: {len(differences)} differences, the first: {differences[0]}")
        console.print(f"equal to {equal} in every value")
    return found


def _parallel(plan: Plan) -> int:
    """Arms side by side that keep the machine busy: a run either samples or learns, never both at once."""
    recipe = plan.arms[0].recipe
    if recipe.runtime == "local":
        return 1
    gpus = max(gpus_of(arm.recipe, critic=algorithm_of(arm.recipe).critic) for arm in plan.arms)
    if gpus:
        return max(1, torch.cuda.device_count() // gpus)
    busy = max(max(arm.recipe.learner.ranks, arm.recipe.rollout.engines) for arm in plan.arms)
    return max(1, (os.cpu_count() or 1) // busy)


async def run_arms(plan: Plan, parallel: int, console: Console, interrupts: Interrupts, task: Task | None) -> None:
    """Runs all arms that have not ended yet, `parallel` at a time, seed after seed; an interrupt ends them in order.

    Loads the task where it is not given.
    """
    first = plan.arms[0].recipe
    todo = [(arm, index) for index in range(plan.seeds) for arm in plan.arms if not _ended(plan, arm, index)]
    total = len(plan.arms) * plan.seeds
    Screen(console).print(
        f": {len(plan.arms)} arms x {plan.seeds} seeds, {total - len(todo)} of {total} runs "
        f"ended, {parallel} side by side",
        title=str(plan.folder),
    )
    if not todo:
        return
    setup = _Setup(plan, task or load_task(first), parallel, interrupts)
    needed = max(num_processes(arm.recipe, critic=algorithm_of(arm.recipe).critic) for arm in plan.arms)
    activity = Activity()
    cluster = make_runtime(first, needed * parallel, activity)
    slots, bars = asyncio.Semaphore(parallel), progress_bars(console)
    warm: dict[int, asyncio.Task[str]] = {}

    def start_of(arm: Arm, index: int) -> asyncio.Task[str]:
        seed = arm.recipe.seed + index
        if seed not in warm:
            screen = Screen(console, bars=bars, label=f"seed {seed}")
            warm[seed] = asyncio.create_task(_warm_up(setup, seed, slots, screen))
        return warm[seed]

    async def one(arm: Arm, index: int) -> None:
        start = await start_of(arm, index) if arm.recipe.sft else None
        async with slots:
            if interrupts.requested:
                return
            label = f"{arm.folder_name} seed {arm.recipe.seed + index}"
            await _run_arm(setup, arm, index, start, Screen(console, bars=bars, label=label))
            # Without their cluster the other runs would fail one after the other.
            activity.check()

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
    """The identity of a run: the whole recipe without the folder that it writes to."""
    return dump_yaml(recipe.model_copy(update={"output_dir": ""}))


def _ended(plan: Plan, arm: Arm, index: int) -> bool:
    """Whether a run has its outcome; UserError where its folder belongs to another recipe."""
    folder = run_folder(plan, arm, index)
    outcome = _outcome(folder)
    if outcome is None:
        return False
    stored = stored_recipe(outcome["identity"], where=f"{folder / 'outcome.json'} identity")
    found = difference(stored, _with_seed(plan, arm, index))
    if found is not None:
        key, old, new = found
        raise UserError(
            f"{folder} holds a run of another recipe (its {key} is {old!r}, not {new!r}): choose another --name, or "
            "delete the folder to run it again"
        )
    # A finished or diverged run would end the same way again; a run that failed for want of memory need not.
    return outcome["status"] in ("done", "diverged")


def _outcome(folder: Path) -> Outcome | None:
    """None where a run has not ended. A damaged file is named, and the run goes on from its checkpoint."""
    file = folder / "outcome.json"
    if not file.exists():
        return None
    try:
        return TypeAdapter(Outcome).validate_python(read_json(file))
    except (UserError, ValidationError):
        print(f"cispo: warning: {file} is damaged, so its run counts as not ended", file=sys.stderr)
        return None


def _made(folder: Path) -> RunFolder:
    """Makes a folder where there is none, and locks it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    return only_user_of(folder)


async def _warm_up(setup: _Setup, seed: int, slots: asyncio.Semaphore, screen: Screen) -> str:
    """The policy after the supervised warm-up of a seed, made once: the first arm's, without its algorithm."""
    folder = setup.plan.folder / "warm" / f"seed_{seed}"
    neutral = changed(setup.plan.arms[0].recipe, {"seed": seed, "name": "warm", "algorithm": {}}, where="the warm-up")
    done = CheckpointFolder(folder, 1).whole()
    if done and _holds(folder, neutral) and damage(done[-1], hashes=True) is None:
        return str(done[-1])
    async with slots:
        with _made(folder) as locked:
            locked.empty()
            return str(await _run(setup, neutral, locked, screen).sft())


def _holds(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder is of a run of exactly this recipe."""
    file = folder / "recipe.yaml"
    return file.exists() and difference(read_stored(file), recipe) is None


def _run(
    setup: _Setup, recipe: Recipe, locked: RunFolder, screen: Screen, *, checkpoint: Path | None = None, group: str = ""
) -> Run:
    return Run(
        recipe,
        setup.task,
        locked,
        screen,
        setup.interrupts,
        checkpoint=checkpoint,
        alone=False,
        group=group,
        side_by_side=setup.parallel,
    )


async def _run_arm(setup: _Setup, arm: Arm, index: int, start: str | None, screen: Screen) -> None:
    """Runs one arm with one seed, from its last checkpoint on, and writes its outcome.

    A run that breaks does not end the others. Raises UserError, which is the same for every arm.
    """
    with _made(run_folder(setup.plan, arm, index)) as locked:
        await _run_in(locked, setup, arm, index, start, screen)


async def _run_in(locked: RunFolder, setup: _Setup, arm: Arm, index: int, start: str | None, screen: Screen) -> None:
    plan, folder = setup.plan, locked.path
    recipe = _with_seed(plan, arm, index)
    identity = _identity(recipe)
    status: Status = "done"
    sentence: str | None = None
    if start is not None:
        policy = recipe.policy.model_copy(update={"model": start, "config": None})
        recipe = recipe.model_copy(update={"policy": policy, "sft": None})
    checkpoint = None
    if _holds(folder, recipe):
        checkpoint = CheckpointFolder(folder, recipe.train.keep).resume_point(logged_steps(folder), screen.warn)
    if checkpoint is None:
        locked.empty()
    started = time.perf_counter()
    try:
        run = _run(setup, recipe, locked, screen, checkpoint=checkpoint, group=plan.folder.name)
        await run.train()
        if setup.interrupts.requested:
            return
    except UserError:
        raise
    except Diverged as error:
        status, sentence = "diverged", str(error)
    except Exception as error:
        # The report shows the sentence; the traceback lies beside the run.
        with contextlib.suppress(OSError):
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        status, sentence = "failed", " ".join(reason.split())[:300]
    outcome: Outcome = {"status": status, "identity": identity, "seconds": time.perf_counter() - started}
    if sentence is not None:
        outcome["sentence"] = sentence
    with disk_errors(folder):
        write_json(folder / "outcome.json", outcome)
    if status == "done":
        # At once, and not when all arms have run: the name may be misspelt.
        require_metric(_arm_result(plan, arm), plan.metric)
    values = [row[plan.metric] for row in read_metrics(folder / "metrics.jsonl") if plan.metric in row]
    ending = sentence or f"{plan.metric} {values[0]:.3f} -> {values[-1]:.3f}"
    screen.print(f"{ending} ({outcome['seconds']:.0f} s)")


def report(plan: Plan, console: Console, *, fit: bool) -> dict[str, Results]:
    """Writes the pages of all settings, prints the summary, and returns setting -> results."""
    comparisons = _comparisons(plan)
    pages: dict[str, Path] = {}
    found: dict[str, Results] = {}
    for setting, comparison in comparisons.items():
        files = write_report(comparison, plan.folder / setting.replace(" ", "_"), fit=fit)
        pages[setting], found[setting] = files.page, json.loads(files.results.read_text())
        if setting:
            console.print(f"\n{setting}", style="bold")
        for part in summary_lines(comparison):
            console.print(part)
    page = pages[""] if "" in pages else write_overview(comparisons, pages, found, plan.folder)
    console.print(f"report: {page}")
    return found


def _comparisons(plan: Plan) -> dict[str, Comparison]:
    """Setting -> its comparison; arms of which no run has ended are left out."""
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
                # Runs are paired by position: first seeds, second seeds ..., also where the recipes' seeds differ.
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


def _stored(file: Path | None) -> Mapping[str, Results] | None:
    """Setting -> results of a stored results.json: of one comparison (setting "") or of an overview."""
    if file is None:
        return None
    try:
        stored: Results | OverviewResults = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"--assert-equal {file}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--assert-equal {file} is not JSON") from None
    if not isinstance(stored, dict) or not {"arms", "settings"} & stored.keys():
        raise UserError(f"--assert-equal {file} is not the results.json of a comparison")
    return stored["settings"] if "settings" in stored else {"": stored}
