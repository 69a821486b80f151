"""The loop. Every stage has the field's name and is one call.

    prompts.take(P) -> roll_out -> estimate_advantages -> pack -> attach_logprobs -> update (k times) -> sync_weights

The driver holds prompts, rewards, advantages, packing and metrics; the learner ranks and the engines are elsewhere,
behind `Workers`. One step waits for all its rollouts: the engines sample with exactly the weights that are trained.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cispo.algorithms import Algorithm
from cispo.algorithms.advantages import is_constant
from cispo.algorithms.losses import negative_log_likelihood
from cispo.assemble import Workers, pack_for, seed_of
from cispo.config import Recipe
from cispo.evaluate import evaluate
from cispo.learner.learner import UpdateResult
from cispo.learner.optim import learning_rate
from cispo.learner.sft import demonstration_batches
from cispo.metrics import group_metrics, importance_metrics, mismatch_metrics, rollout_metrics
from cispo.packing import to_samples, with_old_logprobs
from cispo.rollout.prompts import PromptSource
from cispo.rollout.renderer import Renderer
from cispo.rollout.rewards import RewardRunner
from cispo.rollout.rollout import Rollouts, roll_out
from cispo.runfolder import RunLog, save_checkpoint
from cispo.screen import Screen
from cispo.types import MicroBatch, Prompt, RunError, Sample, Sampling, TrajectoryGroup, UserError

# A run whose gradients stay non-finite this many updates in a row will not recover.
_MAX_SKIPPED = 10

# Truncation above this precedes instability (ScaleRL, arXiv 2510.13786).
_TRUNCATION_ALARM = 0.10

Columns = list[list[MicroBatch]]
"""[ranks][micro-batches] of one update."""

_SFT = Algorithm(name="sft", loss=negative_log_likelihood)


@dataclass(slots=True, kw_only=True)
class Controller:
    """One training run: the parts, and where it stands."""

    recipe: Recipe
    algorithm: Algorithm
    workers: Workers
    renderer: Renderer
    sampling: Sampling
    rewards: RewardRunner
    train_prompts: PromptSource
    eval_prompts: Sequence[Prompt]
    log: RunLog
    screen: Screen
    version: int = 0
    """How many times the engines have received weights."""
    updates: int = 0
    skipped_in_a_row: int = 0
    finished: int = 0
    """Steps that are done."""
    accuracy: float | None = None
    warned: set[str] = field(default_factory=set)
    """Kinds of warnings that were given."""
    lr: float = 0.0
    """Learning rate of the last update."""

    async def train(self) -> None:
        """Evaluates, then trains `train.steps` steps with evaluations and checkpoints in between."""
        keys = self.recipe.train
        await self.sync_weights()
        first = await self.evaluate(0)
        self.log.metrics(0, first)
        self.screen.phase("train", keys.steps)
        for step in range(1, keys.steps + 1):
            metrics = await self.step(step)
            last = step == keys.steps
            if last or (keys.eval_every and step % keys.eval_every == 0):
                metrics |= await self.evaluate(step)
            self.log.metrics(step, metrics)
            self.finished = step
            self._show(step, metrics)
            if last or (keys.save_every and step % keys.save_every == 0):
                await self.save(step)
        self.screen.done()

    async def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and its updates."""
        started = time.perf_counter()
        prompts = self.train_prompts.take(self.recipe.rollout.prompts_per_step)
        rollouts = await self.roll_out(prompts, step)
        sampled = time.perf_counter()
        batches = self.minibatches(rollouts.groups)
        columns = [pack_for(self.recipe, batch, self.algorithm.reduction) for batch in batches if batch]
        if self.algorithm.anchor == "old":
            columns = [await self.attach_logprobs(c) for c in columns]
        results = [await self.update(c) for c in columns]
        learned = time.perf_counter()
        metrics = self.metrics(rollouts, results)
        await self.sync_weights()
        synced = time.perf_counter()
        self.log.samples(step, rollouts.groups)
        return metrics | {
            "time/rollout": sampled - started,
            "time/reward": rollouts.seconds_scoring,
            "time/learn": learned - sampled,
            "time/sync": synced - learned,
            "time/step": synced - started,
            "rollout/tokens_per_s": rollouts.tokens / (synced - started),
        }

    async def roll_out(self, prompts: Sequence[Prompt], step: int) -> Rollouts:
        keys = self.recipe.algorithm
        return await roll_out(
            prompts,
            group_size=self.recipe.rollout.group_size,
            generate=self.workers.generate,
            renderer=self.renderer,
            rewards=self.rewards,
            sampling=self.sampling,
            seed=seed_of(self.recipe.seed, "rollout", step),
            overlong_buffer=keys.overlong_buffer,
            overlong_factor=keys.overlong_penalty,
        )

    def minibatches(self, groups: Sequence[TrajectoryGroup]) -> list[list[Sample]]:
        """Samples with their advantages, in `updates_per_batch` shares of whole groups."""
        rewards = [torch.tensor([t.reward for t in g.trajectories], dtype=torch.float64) for g in groups]
        advantages = self.algorithm.advantage(rewards)
        drop = self.recipe.algorithm.zero_variance == "drop"
        kept = [
            to_samples(group, advantage)
            for group, reward, advantage in zip(groups, rewards, advantages, strict=True)
            if not (drop and is_constant(reward))
        ]
        k = self.recipe.algorithm.updates_per_batch
        return [[sample for group in kept[i::k] for sample in group] for i in range(k)]

    async def attach_logprobs(self, columns: Columns) -> Columns:
        """Adds the learner's logprobs from before the first update on this batch."""
        old = await self.workers.logprobs(columns)
        return [with_old_logprobs(column, values) for column, values in zip(columns, old, strict=True)]

    async def update(self, columns: Columns) -> list[UpdateResult]:
        keys = self.recipe.learner
        lr = learning_rate(
            self.updates,
            steps=self.recipe.train.steps * self.recipe.algorithm.updates_per_batch,
            peak=keys.lr,
            warmup=keys.warmup_steps,
            schedule=keys.schedule,
            final_ratio=keys.final_lr_ratio,
        )
        results = await self.workers.update(columns, self.algorithm, lr)
        self.updates += 1
        self.lr = lr
        self._watch(results)
        return results

    def _watch(self, results: Sequence[UpdateResult]) -> None:
        self.skipped_in_a_row = 0 if results[0].taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == _MAX_SKIPPED:
            raise RunError(
                f"the last {_MAX_SKIPPED} updates had gradients that are not finite: learner.lr is too high?"
            )

    async def sync_weights(self) -> None:
        self.version += 1
        await self.workers.sync_weights(self.version)

    async def evaluate(self, step: int) -> dict[str, float]:
        if not self.eval_prompts:
            return {}
        metrics, groups = await evaluate(
            self.eval_prompts,
            samples=self.recipe.train.eval_samples,
            generate=self.workers.generate,
            renderer=self.renderer,
            rewards=self.rewards,
            sampling=self.sampling,
            seed=seed_of(self.recipe.seed, "eval"),
        )
        self.log.samples(step, groups, kind="eval")
        self.accuracy = metrics.get("eval/accuracy")
        return metrics

    async def save(self, step: int) -> Path:
        """Writes a checkpoint in Hugging Face form, tokenizer included."""
        draft = self.log.folder / ".policy"
        await self.workers.save(draft)
        facts = {"version": self.version, "updates": self.updates, "recipe": self.recipe.name}
        return save_checkpoint(
            self.log.folder, step, facts, draft, self.renderer.tokenizer.save_pretrained, self.recipe.train.keep
        )

    def metrics(self, rollouts: Rollouts, results: Sequence[Sequence[UpdateResult]]) -> dict[str, float]:
        metrics = rollout_metrics(rollouts.groups, version=self.version) | group_metrics(rollouts.groups)
        metrics["reward/dropped_groups"] = rollouts.dropped
        metrics["reward/errors"] = self.rewards.errors
        metrics["reward/timeouts"] = self.rewards.timeouts
        metrics["learner/updates"] = len(results)
        metrics["learner/skipped"] = sum(not r[0].taken for r in results)
        # A skipped update says nothing but that it was skipped: its values need not be finite.
        taken = [r for r in results if r[0].taken]
        if not taken:
            return metrics
        tokens = _merged(taken)
        # Before the first update the learner is the policy that sampled, so what differs there is the mismatch.
        mismatch = tokens if self.algorithm.anchor == "old" else _merged(taken[:1])
        learner = mismatch["old_logprobs" if self.algorithm.anchor == "old" else "logprobs"]
        metrics |= importance_metrics(tokens) | mismatch_metrics(learner, mismatch["rollout_logprobs"])
        metrics |= {
            "adv/std": float(tokens["advantages"].double().std(correction=0)),
            "grad_norm": sum(r[0].grad_norm for r in taken) / len(taken),
            "tokens_in_loss": len(tokens["advantages"]),
            "learner/lr": self.lr,
            "learner/loss": sum(r.batch.loss for r in taken[-1]),
        }
        if self.recipe.learner.router_aux_coef > 0:
            metrics["learner/router_aux_loss"] = sum(r.batch.aux_loss for r in taken[-1])
        return metrics

    def _warn(self, kind: str, sentence: str) -> None:
        """Says one sentence of each kind a run."""
        if kind not in self.warned:
            self.warned.add(kind)
            self.screen.print(f"[yellow]warning:[/] {sentence}")

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        truncated = metrics.get("truncation_frac", 0.0)
        if truncated > _TRUNCATION_ALARM:
            self._warn(
                "truncation",
                f"{truncated:.0%} of the completions of step {step} were cut at rollout.max_tokens; "
                "runs that truncate more than 10 % tend to become unstable",
            )
        if metrics["learner/updates"] == 0:
            self._warn("constant", f"every group of step {step} had equal rewards: there was nothing to learn from")
        numbers = {"reward": f"{metrics.get('reward/mean', 0):.3f}"}
        if self.accuracy is not None:
            numbers["accuracy"] = f"{self.accuracy:.3f}"
        numbers["tokens/s"] = f"{metrics['rollout/tokens_per_s']:,.0f}"
        self.screen.step(step, numbers)


async def warm_up(recipe: Recipe, workers: Workers, samples: Sequence[Sample], log: RunLog, screen: Screen) -> None:
    """Supervised fine-tuning on demonstrations with the learner's own update, then a fresh optimizer."""
    assert recipe.sft is not None
    keys = recipe.sft
    batches = demonstration_batches(samples, batch_size=keys.batch_size, seed=seed_of(recipe.seed, "sft"))
    screen.phase("warm-up", keys.steps)
    for step in range(1, keys.steps + 1):
        columns = pack_for(recipe, next(batches), _SFT.reduction)
        lr = learning_rate(step - 1, steps=keys.steps, peak=keys.lr, warmup=keys.warmup_steps)
        started = time.perf_counter()
        results = await workers.update(columns, _SFT, lr)
        speed = sum(mb.tokens.numel() for column in columns for mb in column) / (time.perf_counter() - started)
        loss = sum(r.batch.loss for r in results)
        if not results[0].taken:
            raise UserError(f"sft: the gradient of step {step} is not finite; sft.lr {keys.lr} is too high")
        log.metrics(step, {"sft/loss": loss, "sft/grad_norm": results[0].grad_norm, "sft/tokens_per_s": speed})
        screen.step(step, {"loss": f"{loss:.3f}", "tokens/s": f"{speed:,.0f}"})
    screen.done()
    await workers.reset_optimizer()


def _merged(results: Sequence[Sequence[UpdateResult]]) -> dict[str, Tensor]:
    """Per-token values of all ranks and updates in one tensor a name."""
    parts = [result.batch.tokens for ranks in results for result in ranks if result.batch.tokens]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
