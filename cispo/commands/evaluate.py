"""`cispo evaluate` and `cispo generate`: a checkpoint, or all of a run, measured; one sampled from."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table

from cispo.agents.episodes import Episodes, episodes_of
from cispo.engines.choice import settled
from cispo.errors import MissingPackage, UserError
from cispo.evaluate import HeldOut, evaluate_set, gaps, held_out_sets, measures
from cispo.output.checkpoint import CheckpointFolder, step_of
from cispo.output.estimates import Share
from cispo.output.evaluation import Measured, draw, evaluation_table, write_numbers
from cispo.output.screen import new_console, visible
from cispo.recipe.load import load_recipe, need
from cispo.recipe.schema import Recipe
from cispo.recipe.seeds import seed_of
from cispo.rollout.prompts import prompt_ids, warn
from cispo.rollout.renderer import Renderer, renderer_of
from cispo.rollout.rewards import RewardRunner, rewards_of
from cispo.rollout.rollout import RolloutSetup, sample, sampling_of, score
from cispo.runtime.watchdog import Activity
from cispo.start import check_vocabulary, chosen_policy, merged_folder, running_workers
from cispo.types import Prompt
from cispo.workers import Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """The held-out sets of a recipe and what scores them."""

    recipe: Recipe
    renderer: Renderer
    sets: Sequence[HeldOut]
    rewards: RewardRunner
    episodes: Episodes | None

    async def measure(self, policy: str) -> list[tuple[HeldOut, dict[str, float], dict[str, Share]]]:
        """Metrics and estimates of a policy folder on each set."""
        found = []
        async with _engines_only(self.recipe, policy) as workers:
            play = None
            if self.episodes is not None:
                play = partial(self.episodes.play, generate_at=workers.generate_at)
            setup = RolloutSetup(generate=workers.generate, renderer=self.renderer, rewards=self.rewards, play=play)
            training = sampling_of(self.recipe, self.renderer)
            for one in self.sets:
                metrics, groups = await evaluate_set(one, setup, training=training, seed=one.seed(self.recipe))
                if sentence := gaps(metrics, self.rewards, one.prefix):
                    warn(sentence)
                estimates = measures(groups, self.rewards, samples=one.samples, read=one.read)
                named = {f"avg@{one.samples}" if name == "avg@" else name: share for name, share in estimates.items()}
                found.append((one, metrics, named))
        return found


@contextlib.contextmanager
def _task_of(recipe: Recipe) -> Iterator[_Task]:
    """The task of a recipe, loaded and checked; its processes end with the block."""
    need(recipe, "eval", "reward")
    renderer = renderer_of(recipe)
    sets = held_out_sets(recipe, renderer)
    sections = {one.key: one.prompts for one in sets}
    with contextlib.closing(rewards_of(recipe, sections)) as rewards:
        episodes = episodes_of(recipe, renderer, sections)
        with contextlib.closing(episodes) if episodes else contextlib.nullcontext():
            yield _Task(recipe=recipe, renderer=renderer, sets=sets, rewards=rewards, episodes=episodes)


def evaluate_checkpoint(path: Path, overrides: Sequence[str], checkpoint: str | None) -> dict[str, float]:
    """`cispo evaluate`: a policy, or with a run folder each of its checkpoints, on the held-out sets.

    A policy's metrics are one JSON line, with the 95 % intervals; those of a run are a table and a picture in it.
    Returns the metrics of the policy, of a run's last checkpoint.
    """
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is no run folder: it holds no recipe.yaml")
        if checkpoint is None:
            return _evaluate_run(path, settled(load_recipe(path / "recipe.yaml", overrides)))
        path = path / "recipe.yaml"
    recipe = settled(load_recipe(path, overrides))
    need(recipe, "eval", "reward")
    policy = chosen_policy(recipe, checkpoint)
    with _task_of(recipe) as task:
        check_vocabulary(policy, task.renderer)
        found = asyncio.run(task.measure(policy))
    intervals = {
        one.prefix + name: [share.low, share.high]
        for one, _, estimates in found
        for name, share in estimates.items()
        if math.isfinite(share.low)
    }
    metrics = {name: value for _, own, _ in found for name, value in own.items()}
    size = sum(len(one.prompts) for one, _, _ in found)
    print(json.dumps({"policy": policy, "prompts": size, **metrics, "intervals": intervals}))
    return metrics


def _evaluate_run(folder: Path, recipe: Recipe) -> dict[str, float]:
    checkpoints = CheckpointFolder(folder, recipe.train.keep).whole()
    if not checkpoints:
        raise UserError(f"{folder} has no whole checkpoint to evaluate")
    rows: list[Measured] = []
    last: dict[str, float] = {}
    console = new_console()

    async def run(task: _Task) -> None:
        for number, checkpoint in enumerate(checkpoints, start=1):
            if not checkpoint.is_dir():
                warn(f"{checkpoint.name} was removed meanwhile: the run goes on")
                continue
            print(f"{checkpoint.name} ({number} of {len(checkpoints)})", file=sys.stderr)
            policy = chosen_policy(recipe, str(checkpoint))
            check_vocabulary(policy, task.renderer)
            last.clear()
            for one, metrics, estimates in await task.measure(policy):
                last.update(metrics)
                size = int(metrics[f"{one.prefix}prompts"])
                rows.append(Measured(step=step_of(checkpoint), name=one.name, prompts=size, estimates=estimates))

    with _task_of(recipe) as task:
        asyncio.run(run(task))
    for name in dict.fromkeys(row.name for row in rows):
        console.print(f"\n{name or 'held-out'}: mean over prompts, 95 % interval", style="bold")
        console.print(evaluation_table(rows, name))
    console.print(str(write_numbers(folder, rows)), soft_wrap=True)
    try:
        console.print(str(draw(folder, rows, title=folder.name)), soft_wrap=True)
    except MissingPackage as error:
        console.print(f"no picture: {error}", soft_wrap=True)
    return last


@contextlib.asynccontextmanager
async def _engines_only(recipe: Recipe, policy: str) -> AsyncIterator[Workers]:
    with merged_folder(policy, recipe.policy.number_format) as whole:
        async with running_workers(recipe, whole, activity=Activity(), learners=False) as (workers, engines):
            await engines
            yield workers


def generate(
    path: Path, overrides: Sequence[str], *, prompt: str, checkpoint: str | None, number: int, columns: Sequence[str]
) -> list[str]:
    """`cispo generate`: prints completions of one prompt with their logprobs, and rewards where the columns are given.

    Returns the completions.
    """
    if not prompt:
        raise UserError("generate needs --prompt TEXT")
    recipe = settled(load_recipe(path, overrides))
    recipe = recipe.model_copy(
        update={"rollout": recipe.rollout.model_copy(update={"prompts_per_step": 1, "group_size": number})}
    )
    wrong = [c for c in columns if "=" not in c]
    if wrong:
        raise UserError(f"--column {wrong[0]!r} is not of the form NAME=VALUE")
    policy = chosen_policy(recipe, checkpoint)
    renderer = renderer_of(recipe)
    row = dict(c.split("=", 1) for c in columns)
    asked = Prompt(id=0, messages=({"role": "user", "content": prompt},), columns=row)
    prompt_ids([asked], "--prompt", renderer, recipe, warn)
    check_vocabulary(policy, renderer)
    rewards = rewards_of(recipe, {"--column": [asked]}) if recipe.reward and row else None

    async def run() -> list[str]:
        async with _engines_only(recipe, policy) as workers:
            sampling, seed = sampling_of(recipe, renderer), seed_of(recipe.seed, "generate")
            sampled = await sample([asked], workers.generate, renderer, group_size=number, sampling=sampling, seed=seed)
            scored = await score(sampled, rewards) if rewards is not None else []
        if rewards is not None and rewards.problems:
            warn(f"the completions have no rewards: {rewards.last_problem}")
        given = {t.index: f"{t.reward:g}" for group in scored for t in group.trajectories}
        table = Table(show_lines=True)
        for heading in ("#", "completion", "tokens", "finish", "logprob", *(["reward"] if row else [])):
            table.add_column(heading)
        for t in sampled[0].trajectories:
            completion = t.turns[0].completion
            cells = [
                str(t.index),
                visible(t.text),
                str(t.length),
                t.finish_reason.value,
                f"{sum(completion.logprobs):.3f}",
            ]
            table.add_row(*cells, *([given.get(t.index, "none")] if row else []))
        new_console().print(table)
        return [t.text for t in sampled[0].trajectories]

    try:
        return asyncio.run(run())
    finally:
        if rewards is not None:
            rewards.close()
