"""One run, from a recipe to a filled run folder, for `cispo train`, `cispo sft` and each arm of `cispo compare`.

load_task(recipe) -> Task (prompts, demonstrations ...)      read and checked before anything is written
with create_run_folder(...) as folder:                       locked, from before the first write to the end
    Run(recipe, task, folder, screen, interrupts).train()
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from cispo.agents.episodes import episodes_of
from cispo.algorithms.choice import algorithm_of
from cispo.algorithms.describe import warnings
from cispo.controller import Controller
from cispo.engines.choice import settled
from cispo.errors import Diverged, MissingPackage, RunError, UserError
from cispo.evaluate import HeldOut, held_out_sets
from cispo.files import disk_errors, read_json, write_text
from cispo.output.checkpoint import CheckpointFolder, CheckpointWriter, step_of
from cispo.output.folder import RunLog
from cispo.output.run_folder import RunFolder
from cispo.output.screen import Screen
from cispo.output.summary import learning_curve, summary
from cispo.output.trackers import TENSORBOARD, Trackers, check_trackers, flat
from cispo.policies.loading import check_weights, shape_of
from cispo.recipe.drafts import asks_heads
from cispo.recipe.held_out import best_metric
from cispo.recipe.load import dump_yaml, stored_values
from cispo.recipe.schema import Recipe
from cispo.rollout.prompt_source import check_same_prompts, prompt_source_of
from cispo.rollout.prompts import prompts_of
from cispo.rollout.renderer import Renderer, renderer_of
from cispo.rollout.rewards import rewards_of
from cispo.rollout.rollout import sampling_of
from cispo.runtime.ahead import Ahead
from cispo.runtime.cluster import check_settings
from cispo.runtime.garbage import no_collections
from cispo.runtime.interrupts import Interrupts
from cispo.runtime.ship_code import check_output_dir
from cispo.runtime.start_parts import StartParts
from cispo.runtime.together import together
from cispo.runtime.watchdog import Activity, guarded
from cispo.start import (
    asks_of_layers,
    check_adapter,
    check_experts,
    check_new_policy,
    check_vocabulary,
    chosen_policy,
    policy_folder,
    running_workers,
    whole_policy,
)
from cispo.types import Prompt, Sample
from cispo.warmup import demonstrations_of, warm_up
from cispo.workers import Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The inputs of a recipe: tokenizer, prompts and demonstrations. Runs on the same task share them."""

    renderer: Renderer
    demonstrations: Sequence[Sample]
    prompts: Sequence[Prompt]
    held_out: Sequence[HeldOut]

    @property
    def sections(self) -> dict[str, Sequence[Prompt]]:
        """The prompts by their recipe key."""
        return {"data": self.prompts, **{one.key: one.prompts for one in self.held_out}}


def load_task(recipe: Recipe) -> Task:
    """Loads and checks every input of the recipe. Raises UserError; nothing is written or started yet."""
    check_output_dir(recipe.output_dir)
    check_trackers(recipe.logging)
    if recipe.runtime == "ray":
        check_settings()
    elif recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but there is no GPU here")
    with no_collections():
        policy = None if recipe.policy.model is None else chosen_policy(recipe, None)
        if policy is not None:
            check_weights(Path(whole_policy(policy)), heads=asks_heads(recipe.rollout.engine_args))
            check_adapter(recipe, policy)
            if asks_of_layers(recipe):
                check_experts(recipe, shape_of(read_json(Path(policy) / "config.json")))
        algorithm_of(recipe)
        renderer = renderer_of(recipe)
        task = Task(
            renderer=renderer,
            demonstrations=demonstrations_of(recipe.sft.data, renderer, recipe) if recipe.sft else [],
            prompts=prompts_of(recipe.data, "data", renderer, recipe) if recipe.data else [],
            held_out=held_out_sets(recipe, renderer),
        )
    if policy is None:
        check_new_policy(recipe, renderer)
    else:
        check_vocabulary(policy, renderer)
    if recipe.reward and task.prompts:
        rewards_of(recipe, task.sections).close()
    if episodes := episodes_of(recipe, renderer, task.sections):
        episodes.close()
    return task


class Run:
    """One training or warm-up in a folder of its own, which its caller has locked."""

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        folder: RunFolder,
        screen: Screen,
        interrupts: Interrupts,
        *,
        checkpoint: Path | None = None,
        alone: bool = True,
        group: str = "",
        side_by_side: int = 1,
        ahead: Ahead | None = None,
        start: StartParts | None = None,
    ) -> None:
        """Writes the resolved recipe and, without a `checkpoint` to resume from, the first policy.

        A run that is not `alone` is an arm of a comparison: it ends without a summary. Trackers show the runs of a
        `group` together, and `side_by_side` runs divide the GPUs. `ahead` has the run's processes under way, `start`
        the seconds of its start so far.
        """
        recipe = settled(recipe)
        self.group, self.side_by_side = group, side_by_side
        self.recipe, self.task, self.screen = recipe, task, screen
        self._claim, self.folder = folder, folder.path
        self.interrupts, self.checkpoint, self.alone = interrupts, checkpoint, alone
        self.algorithm = algorithm_of(recipe)
        self._ahead, self.start = ahead, start or StartParts()
        self.activity = Activity() if ahead is None else ahead.activity
        self.activity.checks.append(folder.check)
        self.checkpoints = CheckpointFolder(self.folder, recipe.train.keep, best_metric(recipe))
        self.started = time.perf_counter()
        self.step = -1 if checkpoint is None else step_of(checkpoint)
        """The last completed step; -1 before the start."""
        if checkpoint is not None:
            held_out = [prompt for one in task.held_out for prompt in one.prompts]
            check_same_prompts(checkpoint, recipe, task.renderer, task.prompts, held_out)
        with disk_errors(self.folder):
            self.checkpoints.forget_after(self.step)
            # From another current directory as well, the file says where the run is.
            at_home = recipe.model_copy(update={"output_dir": os.path.abspath(recipe.output_dir)})
            write_text(self.folder / "recipe.yaml", dump_yaml(at_home))
            initial = self.checkpoints.folder / "initial"
            with self.start.timed("policy"):
                self.policy = str(checkpoint or policy_folder(recipe, task.renderer, initial))

    def announce(self) -> None:
        self.screen.print(f": {self.algorithm.name}, run folder {self.folder}", title=self.recipe.name)
        if self.checkpoint is not None:
            self.screen.print(f"going on after step {self.step}")
        updates, stale = self.recipe.algorithm.steps_per_batch, self.recipe.control.max_staleness
        for sentence in warnings(self.algorithm, updates_per_batch=updates, max_staleness=stale):
            self.screen.warn(sentence)

    async def train(self) -> None:
        """The warm-up, if the recipe has one, and the training, or their rest after a resume.

        An interrupt ends it after a step, with a checkpoint. Raises RunError, which names the step to resume from: an
        irreplaceable process died, the watchdog fired, the disk refused, or the folder was removed.
        """
        try:
            await self._guarded(self._train())
        except Diverged:
            raise
        except RunError as error:
            self._claim.check()
            last = self.checkpoints.last()
            hint = f"--resume goes on after step {step_of(last)}" if last else "it had no checkpoint yet"
            raise RunError(f"{error}; {hint} ({self.folder})") from None

    async def _train(self) -> None:
        recipe, task = self.recipe, self.task
        rewards = rewards_of(recipe, task.sections, self.activity)
        log = self._log()
        with self.screen, contextlib.closing(log), contextlib.closing(rewards), contextlib.ExitStack() as stack:
            episodes = episodes_of(recipe, task.renderer, task.sections)
            if episodes is not None:
                stack.callback(episodes.close)
            async with self._workers(critic=self.algorithm.critic) as (workers, engines):
                # Together: an engine that cannot start ends the warm-up at once.
                with self.start.timed("engines"):
                    await together(engines, self._warm_up(workers))
                controller = Controller(
                    recipe=recipe,
                    algorithm=self.algorithm,
                    workers=workers,
                    renderer=task.renderer,
                    sampling=sampling_of(recipe, task.renderer),
                    rewards=rewards,
                    train_prompts=prompt_source_of(recipe, task.prompts),
                    held_out=task.held_out,
                    log=log,
                    screen=self.screen,
                    checkpoints=CheckpointWriter(
                        folder=self.checkpoints,
                        workers=workers,
                        save_tokenizer=task.renderer.save,
                        full=recipe.train.checkpoint == "full",
                    ),
                    interrupts=self.interrupts,
                    episodes=episodes,
                    start=self.start,
                )
                try:
                    await controller.train(self.checkpoint)
                except BaseException:
                    # The disk that ended the run may refuse these too.
                    with contextlib.suppress(RunError):
                        self._finish(log, controller)
                    raise
                self._finish(log, controller)

    def _log(self) -> RunLog:
        names = [name for name in self.recipe.logging if name != TENSORBOARD]
        trackers = None
        if names:
            trackers = Trackers(
                names,
                self.folder,
                name=f"{self.folder.parent.name} {self.folder.name}" if self.group else self.folder.name,
                group=self.group,
                config=flat(stored_values(self.recipe)),
                say=self.screen.warn,
            )
        return RunLog(self.folder, after=self.step, board=TENSORBOARD in self.recipe.logging, trackers=trackers)

    async def sft(self) -> Path:
        """The warm-up alone; returns the checkpoint."""
        assert self.recipe.sft is not None
        await self._guarded(self._sft())
        return self.checkpoints.finish(self.recipe.sft.steps, {"recipe": self.recipe.name})

    async def _sft(self) -> None:
        with self.screen:
            async with self._workers(engines=False) as (workers, _):
                await self._warm_up(workers)
                with self.checkpoints.writing() as draft:
                    await workers.save(draft)
                    self.task.renderer.save(draft)

    async def _guarded(self, run: Awaitable[None]) -> None:
        await guarded(run, self.activity, silence=self.recipe.control.watchdog, say=self.screen.warn)

    def _workers(self, **which: bool) -> AbstractAsyncContextManager[tuple[Workers, asyncio.Task[None]]]:
        return running_workers(
            self.recipe,
            self.policy,
            activity=self.activity,
            say=self.screen.warn,
            ahead=self._ahead,
            parts=self.start,
            weights_follow=True,
            side_by_side=self.side_by_side,
            **which,
        )

    async def _warm_up(self, workers: Workers) -> None:
        if self.recipe.sft is None or self.checkpoint is not None:
            return
        board = TENSORBOARD in self.recipe.logging
        started = time.perf_counter()
        with contextlib.closing(RunLog(self.folder, name="sft", board=board)) as log:
            await warm_up(self.recipe, workers, self.task.demonstrations, log, self.screen)
        # Engines start meanwhile: their part is what is left of them after it.
        seconds = time.perf_counter() - started
        self.start["warm_up"] = seconds
        self.start["engines"] = -seconds

    def _finish(self, log: RunLog, controller: Controller) -> None:
        """The summary and the picture, of interrupted runs too."""
        if len(log.history) < 2:
            return
        # Special tokens included: a clip can drop the end-of-sequence token.
        dropped = controller.dropped_tokens.rows(lambda token: str(self.task.renderer.tokenizer.decode([token])))
        log.dropped_tokens(dropped)
        picture = self.folder / "learning_curve.png"
        title = f"{self.recipe.name}: {self.algorithm.name}, seed {self.recipe.seed}"
        found = f"learning curve: {picture}"
        try:
            with disk_errors(picture):
                learning_curve(log.history, picture, title=title)
        except MissingPackage as error:
            found = f"no picture: {error}"
        if not self.alone:
            return
        self.screen.console.print(summary(log.history, seconds=time.perf_counter() - self.started))
        if dropped:
            most = ", ".join(f"{row['token']!r} {row['ppo_dropped']}" for row in dropped[:5])
            self.screen.print(f"PPO's clip would have dropped, most often: {most}")
        self.screen.print(found)
        saved, best = self.checkpoints.last(), self.checkpoints.best()
        if saved is not None:
            better = f" (best: {best.name})" if best is not None and best != saved else ""
            self.screen.print(f"checkpoint:     {saved}{better}")
            if self.interrupts.requested:
                self.screen.print("                the same command with --resume goes on from it")
