"""The commands that run something: train, sft, evaluate, generate, export."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import torch
from rich.table import Table

from cispo.algorithms import Algorithm
from cispo.algorithms.words import warnings
from cispo.assemble import (
    Workers,
    algorithm_of,
    check_same_shape,
    demonstrations_of,
    policy_folder,
    prompts_of,
    renderer_of,
    rewards_of,
    running_workers,
    sampling_of,
    seed_of,
    updates_per_batch,
)
from cispo.config import Recipe, dump_yaml, load_recipe, need
from cispo.controller import Controller, warm_up
from cispo.evaluate import evaluate
from cispo.policies.base import load_policy, local_folder, save_policy
from cispo.report import learning_curve, summary
from cispo.rollout.prompts import PromptSource
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.rollout.rollout import roll_out
from cispo.runfolder import RunLog, check_checkpoint, create_run_folder, save_checkpoint
from cispo.screen import Screen
from cispo.types import Prompt, Sample, UserError


def train(path: Path, overrides: Sequence[str]) -> None:
    """`cispo train`: everything a recipe names is checked first, then a run folder is made and filled."""
    recipe = load_recipe(path, overrides)
    need(recipe, "data", "reward")
    run = _Run(recipe)
    run.check()
    run.open()
    asyncio.run(run.train())


def sft(path: Path, overrides: Sequence[str]) -> None:
    """`cispo sft`: the warm-up alone, saved as a checkpoint."""
    recipe = load_recipe(path, overrides)
    need(recipe, "sft")
    run = _Run(recipe)
    run.check()
    run.open()
    asyncio.run(run.sft())


class _Run:
    """One train or sft command, from the recipe to the summary."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.screen = Screen()
        self.started = time.perf_counter()

    def check(self) -> None:
        """Loads what the recipe names; raises UserError before anything is written or started."""
        recipe = self.recipe
        if recipe.policy.model is not None:
            _chosen_policy(recipe, None)
        self.algorithm: Algorithm = algorithm_of(recipe)
        self.renderer: Renderer = renderer_of(recipe)
        self.demonstrations: list[Sample] = (
            demonstrations_of(recipe.sft.data, self.renderer, recipe) if recipe.sft else []
        )
        self.prompts = prompts_of(recipe.data, "data", self.renderer, recipe) if recipe.data else []
        self.held_out = prompts_of(recipe.eval, "eval", self.renderer, recipe) if recipe.eval else []
        self.rewards = rewards_of(recipe, self.prompts) if recipe.reward and self.prompts else None

    def open(self) -> None:
        """Makes the run folder and the first policy."""
        recipe = self.recipe
        self.folder = create_run_folder(recipe.output_dir, recipe.name)
        (self.folder / "recipe.yaml").write_text(dump_yaml(recipe))
        self.policy = policy_folder(recipe, self.renderer, self.folder / "checkpoints" / "initial")
        self.screen.print(f"[bold]{recipe.name}[/]: {self.algorithm.name}, run folder {self.folder}")
        for sentence in warnings(self.algorithm, updates_per_batch=updates_per_batch(recipe)):
            self.screen.print(f"[yellow]warning:[/] {sentence}")

    async def train(self) -> None:
        recipe = self.recipe
        assert self.rewards is not None
        log = RunLog(self.folder)
        with self.screen, contextlib.closing(log), contextlib.closing(self.rewards):
            async with running_workers(recipe, self.policy, critic=self.algorithm.critic) as (workers, engines):
                # Together: an engine that cannot start ends the warm-up at once.
                workers.engines, _ = await asyncio.gather(engines, self._warm_up(workers))
                controller = Controller(
                    recipe=recipe,
                    algorithm=self.algorithm,
                    workers=workers,
                    renderer=self.renderer,
                    sampling=sampling_of(recipe, self.renderer),
                    rewards=self.rewards,
                    train_prompts=PromptSource(self.prompts, seed_of(recipe.seed, "prompts")),
                    eval_prompts=self.held_out,
                    log=log,
                    screen=self.screen,
                )
                try:
                    await controller.train()
                except asyncio.CancelledError:
                    self.screen.print("interrupted: saving the policy (once more Ctrl-C to skip that)")
                    await controller.save(controller.finished)
                    raise
                finally:
                    self._finish(log, controller)

    async def sft(self) -> None:
        recipe = self.recipe
        with self.screen:
            async with running_workers(recipe, self.policy, engines=False) as (workers, _):
                await self._warm_up(workers)
                draft = self.folder / ".policy"
                await workers.save(draft)
                checkpoint = save_checkpoint(
                    self.folder,
                    recipe.sft.steps if recipe.sft else 0,
                    {"recipe": recipe.name},
                    draft,
                    self.renderer.tokenizer.save_pretrained,
                    1,
                )
        self.screen.print(f"policy: {checkpoint}")

    async def _warm_up(self, workers: Workers) -> None:
        if self.recipe.sft is None:
            return
        with contextlib.closing(RunLog(self.folder, name="sft")) as log:
            await warm_up(self.recipe, workers, self.demonstrations, log, self.screen)

    def _finish(self, log: RunLog, controller: Controller) -> None:
        """The summary and the picture, also of a run that was interrupted."""
        if len(log.history) < 2:
            return
        log.dropped_tokens(controller.dropped_tokens.rows(lambda token: self.renderer.decode((token,))))
        picture = self.folder / "learning_curve.png"
        title = f"{self.recipe.name}: {self.algorithm.name}, seed {self.recipe.seed}"
        learning_curve(log.history, picture, title=title)
        self.screen.console.print(summary(log.history, seconds=time.perf_counter() - self.started))
        self.screen.print(f"learning curve: {picture}")
        saved = sorted((self.folder / "checkpoints").glob("step_*"))
        if saved:
            self.screen.print(f"checkpoint:     {saved[-1]}")


def _check_model(model: str) -> None:
    """A folder must hold a policy; anything else is taken for a hub id."""
    if Path(model).exists():
        check_checkpoint(model)


def _chosen_policy(recipe: Recipe, checkpoint: str | None) -> str:
    """The folder that a command without training works with."""
    if checkpoint is None:
        if recipe.policy.model is None:
            raise UserError("the recipe starts from random weights: name a policy with --checkpoint DIR")
        _check_model(recipe.policy.model)
        return str(local_folder(recipe.policy.model))
    folder = check_checkpoint(checkpoint)
    check_same_shape(recipe, folder)
    return str(folder)


def evaluate_checkpoint(path: Path, overrides: Sequence[str], checkpoint: str | None) -> None:
    """`cispo evaluate`: sampling accuracy of one policy on the held-out prompts, as a table and one JSON line."""
    recipe = load_recipe(path, overrides)
    need(recipe, "eval", "reward")
    policy = _chosen_policy(recipe, checkpoint)
    renderer = renderer_of(recipe)
    assert recipe.eval is not None
    prompts = prompts_of(recipe.eval, "eval", renderer, recipe)
    rewards = rewards_of(recipe, prompts)

    async def run() -> dict[str, float]:
        async with _engines_only(recipe, policy) as workers:
            metrics, _ = await evaluate(
                prompts,
                samples=recipe.train.eval_samples,
                generate=workers.generate,
                renderer=renderer,
                rewards=rewards,
                sampling=sampling_of(recipe, renderer),
                seed=seed_of(recipe.seed, "eval"),
            )
            return metrics

    with contextlib.closing(rewards):
        metrics = asyncio.run(run())
    print(json.dumps({"policy": policy, "prompts": len(prompts), **metrics}))


@contextlib.asynccontextmanager
async def _engines_only(recipe: Recipe, policy: str) -> AsyncIterator[Workers]:
    async with running_workers(recipe, policy, learners=False) as (workers, engines):
        workers.engines = await engines
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
    policy = _chosen_policy(recipe, checkpoint)
    renderer = renderer_of(recipe)
    row = dict(c.split("=", 1) for c in columns)
    asked = Prompt(id=0, messages=({"role": "user", "content": prompt},), columns=row)
    rewards = rewards_of(recipe, [asked]) if recipe.reward and row else None

    async def run() -> None:
        async with _engines_only(recipe, policy) as workers:
            rollouts = await roll_out(
                [asked],
                group_size=number,
                generate=workers.generate,
                renderer=renderer,
                rewards=rewards,
                sampling=sampling_of(recipe, renderer),
                seed=seed_of(recipe.seed, "generate"),
            )
        table = Table(show_lines=True)
        for heading in ("#", "completion", "tokens", "finish", "logprob", *(["reward"] if row else [])):
            table.add_column(heading)
        for t in rollouts.groups[0].trajectories:
            completion = t.turns[0].completion
            cells = [str(t.index), t.text, str(t.length), t.finish_reason.value, f"{sum(completion.logprobs):.3f}"]
            table.add_row(*cells, *([f"{t.reward:g}"] if row else []))
        Screen().console.print(table)

    try:
        asyncio.run(run())
    finally:
        if rewards is not None:
            rewards.close()


def export(checkpoint: Path, to: Path, dtype: str) -> None:
    """`cispo export`: a checkpoint as a model folder that transformers and vLLM load, checked by reading it back."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype!r} is unknown; there are float32 and bfloat16")
    check_checkpoint(str(checkpoint))
    if to.exists() and any(to.iterdir()):
        raise UserError(f"--to {to} is not empty")
    policy = load_policy(str(checkpoint), dtype=getattr(torch, dtype))
    save_policy(policy, to)
    with contextlib.suppress(UserError):
        load_tokenizer(str(checkpoint)).save_pretrained(str(to))
    written, again = policy.to_hf(), load_policy(str(to), dtype=getattr(torch, dtype)).to_hf()
    assert written.keys() == again.keys() and all(torch.equal(written[k], again[k]) for k in written)
    parameters = sum(t.numel() for t in written.values())
    print(f"{to}: {parameters:,} parameters, {dtype}")
