"""`cispo evaluate` and `cispo generate`: a checkpoint measured and sampled from."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from rich.table import Table

from cispo.agents.episodes import episodes_of
from cispo.errors import UserError
from cispo.evaluate import evaluate, gaps
from cispo.output.screen import new_console, visible
from cispo.recipe.load import load_recipe, need
from cispo.recipe.schema import Recipe
from cispo.rollout.prompts import prompt_ids, prompts_of, warn
from cispo.rollout.renderer import renderer_of
from cispo.rollout.rewards import rewards_of
from cispo.rollout.rollout import RolloutSetup, sample, sampling_of, score
from cispo.runtime.watchdog import Activity
from cispo.seeds import seed_of
from cispo.start import check_vocabulary, chosen_policy, merged_folder, running_workers
from cispo.types import Prompt
from cispo.workers import Workers


def evaluate_checkpoint(path: Path, overrides: Sequence[str], checkpoint: str | None) -> None:
    """`cispo evaluate`: sampling accuracy of one policy on the held-out prompts, as one JSON line."""
    recipe = load_recipe(path, overrides)
    need(recipe, "eval", "reward")
    policy = chosen_policy(recipe, checkpoint)
    renderer = renderer_of(recipe)
    assert recipe.eval is not None
    prompts = prompts_of(recipe.eval, "eval", renderer, recipe)
    check_vocabulary(policy, renderer)
    rewards = rewards_of(recipe, {"eval": prompts})
    episodes = episodes_of(recipe, renderer, {"eval": prompts})
    play = None if episodes is None else episodes.play

    async def run() -> dict[str, float]:
        async with _engines_only(recipe, policy) as workers:
            metrics, _ = await evaluate(
                prompts,
                RolloutSetup(generate=workers.generate, renderer=renderer, rewards=rewards, play=play),
                samples=recipe.train.eval_samples,
                sampling=sampling_of(recipe, renderer),
                seed=seed_of(recipe.seed, "eval"),
            )
            return metrics

    with contextlib.closing(rewards), contextlib.closing(episodes) if episodes else contextlib.nullcontext():
        metrics = asyncio.run(run())
    if sentence := gaps(metrics, rewards):
        warn(sentence)
    print(json.dumps({"policy": policy, "prompts": len(prompts), **metrics}))


@contextlib.asynccontextmanager
async def _engines_only(recipe: Recipe, policy: str) -> AsyncIterator[Workers]:
    with merged_folder(policy, recipe.policy.dtype) as whole:
        async with running_workers(recipe, whole, activity=Activity(), learners=False) as (workers, engines):
            await engines
            yield workers


def generate(
    path: Path, overrides: Sequence[str], *, prompt: str, checkpoint: str | None, number: int, columns: Sequence[str]
) -> None:
    """`cispo generate`: completions of one prompt with their logprobs, and rewards where the columns are given."""
    if not prompt:
        raise UserError("generate needs --prompt TEXT")
    recipe = load_recipe(path, overrides)
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

    async def run() -> None:
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

    try:
        asyncio.run(run())
    finally:
        if rewards is not None:
            rewards.close()
