"""The loop. Every stage has the field's name and is one call.

    sample -> attach (logprobs, values) -> with_advantages -> minibatches -> update ... -> sync_weights

The driver holds prompts, rewards, advantages, packing and metrics; the learner ranks, the critic's and the engines are
elsewhere, behind `Workers`. One step waits for all its rollouts: the engines sample with exactly the weights that are
trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from cispo.algorithms import Algorithm
from cispo.algorithms.losses import negative_log_likelihood
from cispo.algorithms.objective import Objective
from cispo.assemble import Workers, overlong_buffer_of, pack_for, seed_of, updates_per_batch
from cispo.batch import informative, minibatches, with_advantages
from cispo.config import Recipe
from cispo.dropped_tokens import DroppedTokens, would_drop
from cispo.evaluate import evaluate
from cispo.learner.critic import CriticResult
from cispo.learner.learner import UpdateResult
from cispo.learner.optim import learning_rate
from cispo.learner.sft import demonstration_batches
from cispo.metrics import group_metrics, importance_metrics, mismatch_metrics, rollout_metrics, value_metrics
from cispo.packing import to_samples, unpack
from cispo.rollout.prompts import PromptSource
from cispo.rollout.renderer import Renderer
from cispo.rollout.rewards import RewardRunner
from cispo.rollout.rollout import Rollouts, roll_out
from cispo.runfolder import RunLog, save_checkpoint
from cispo.screen import Screen
from cispo.types import Diverged, Prompt, Sample, Sampling, TrajectoryGroup, UserError

# A run whose gradients stay non-finite this many updates in a row will not recover.
_MAX_SKIPPED = 10

# Truncation above this precedes instability (ScaleRL, arXiv 2510.13786).
_TRUNCATION_ALARM = 0.10

_SFT = Objective(loss=negative_log_likelihood)

# What the learner reports of every token; further columns are the objective's own.
_TOKEN_COLUMNS = frozenset(
    ("targets", "logprobs", "old_logprobs", "rollout_logprobs", "advantages", "ratio", "weight", "entropy")
)


@dataclass(slots=True, kw_only=True)
class Updates:
    """What the optimizer steps of one batch did: [updates][ranks]."""

    policy: list[list[UpdateResult]] = field(default_factory=list)
    critic: list[list[CriticResult]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Totals:
    """What a run has used since its first step."""

    prompts: int = 0
    completions: int = 0
    tokens: int = 0
    updates: int = 0
    seconds: float = 0.0
    """In training steps; evaluations are not counted."""

    def metrics(self) -> dict[str, float]:
        return {f"total/{name}": getattr(self, name) for name in self.__slots__}


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
    totals: Totals = field(default_factory=Totals)
    dropped_tokens: DroppedTokens = field(default_factory=DroppedTokens)
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
        if self.workers.critics:
            await self.workers.start_critic(self.version)
        if self.algorithm.needs_reference:
            await self.workers.freeze_reference()
        await self.sync_weights()
        self.log.metrics(0, self.totals.metrics() | await self.evaluate(0))
        self.screen.phase("train", keys.steps)
        for step in range(1, keys.steps + 1):
            before = self.totals.prompts
            metrics = await self.step(step)
            last = step == keys.steps or self._prompts_left() == 0
            if last or self._evaluation_due(before):
                metrics |= await self.evaluate(step)
            self.log.metrics(step, metrics)
            self.finished = step
            self._show(step, metrics)
            if last or (keys.save_every and step % keys.save_every == 0):
                await self.save(step)
            if last:
                break
        self.screen.done()

    def _evaluation_due(self, before: int) -> bool:
        """Whether `eval_every` steps' worth of prompts were completed: in steps that sample more, sooner."""
        every = self.recipe.train.eval_every * self.recipe.rollout.prompts_per_step
        return every > 0 and self.totals.prompts // every > before // every

    async def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and its updates."""
        started = time.perf_counter()
        position = self.totals.prompts / self.recipe.rollout.prompts_per_step
        rollouts = await self.sample(step)
        sampled = time.perf_counter()
        await self.workers.rest_engines()
        groups = self.kept(rollouts)
        samples = await self.attach([s for group in groups for s in to_samples(group)])
        samples = with_advantages(groups, samples, self.algorithm)
        updates = await self.learn(samples, step, position)
        learned = time.perf_counter()
        metrics = self.metrics(rollouts, samples, updates)
        await self.sync_weights()
        synced = time.perf_counter()
        self.log.samples(step, rollouts.groups)
        self.totals.seconds += synced - started
        return (
            metrics
            | self.totals.metrics()
            | {
                "time/rollout": sampled - started,
                "time/reward": rollouts.seconds_scoring,
                "time/learn": learned - sampled,
                "time/sync": synced - learned,
                "time/step": synced - started,
                "rollout/tokens_per_s": rollouts.tokens / (synced - started),
            }
        )

    async def sample(self, step: int) -> Rollouts:
        """Rollouts of P prompts; with dynamic sampling, of further ones until P groups have something to compare."""
        wanted = self.recipe.rollout.prompts_per_step
        rollouts = await self.roll_out(min(wanted, self._prompts_left()), seed_of(self.recipe.seed, "rollout", step))
        for number in range(1, self.algorithm.dynamic_sampling + 1):
            useful = sum(map(informative, rollouts.groups))
            left = self._prompts_left()
            if useful >= wanted or left == 0:
                break
            # As many prompts as should do at the share seen so far, so that few rounds are needed.
            share = max(useful, 1) / len(rollouts.groups) if rollouts.groups else 1.0
            more = min(math.ceil((wanted - useful) / share), wanted, left)
            rollouts += await self.roll_out(more, seed_of(self.recipe.seed, "rollout", step, number))
        return rollouts

    async def roll_out(self, prompts: int, seed: int) -> Rollouts:
        rollouts = await roll_out(
            self.train_prompts.take(prompts),
            group_size=self.recipe.rollout.group_size,
            generate=self.workers.generate,
            renderer=self.renderer,
            rewards=self.rewards,
            sampling=self.sampling,
            seed=seed,
            overlong_buffer=overlong_buffer_of(self.recipe, self.algorithm),
            overlong_factor=self.recipe.algorithm.overlong_penalty,
        )
        self.totals.prompts += prompts
        self.totals.completions += prompts * self.recipe.rollout.group_size
        self.totals.tokens += rollouts.tokens
        return rollouts

    def _prompts_left(self) -> int:
        bound = self.recipe.train.max_prompts
        return max(bound - self.totals.prompts, 0) if bound else self.recipe.rollout.prompts_per_step

    def kept(self, rollouts: Rollouts) -> list[TrajectoryGroup]:
        """The groups that are trained on."""
        if self.algorithm.zero_variance == "keep":
            return rollouts.groups
        return [group for group in rollouts.groups if informative(group)][: self.recipe.rollout.prompts_per_step]

    async def attach(self, samples: list[Sample]) -> list[Sample]:
        """Adds what the algorithm needs of the learner, the reference and the critic before the first update."""
        needed = self.algorithm.anchor == "old" or self.algorithm.needs_reference or self.algorithm.critic
        if not samples or not needed:
            return samples
        columns = pack_for(self.recipe, samples, "token")
        passes = {}
        if self.algorithm.anchor == "old":
            passes["old_logprobs"] = await self.workers.logprobs(columns)
        if self.algorithm.needs_reference:
            passes["ref_logprobs"] = await self.workers.logprobs(columns, reference=True)
        if self.algorithm.critic:
            passes["values"] = await self.workers.values(columns)
        for name, values in passes.items():
            rows = unpack(columns, values, len(samples))
            samples = [replace(sample, **{name: row}) for sample, row in zip(samples, rows, strict=True)]
        return samples

    async def learn(self, samples: Sequence[Sample], step: int, position: float) -> Updates:
        """The optimizer steps of one batch; `position` is how many batches' worth of prompts came before it."""
        keys, updates = self.recipe.algorithm, Updates()
        shares = [
            share
            for epoch in range(keys.epochs)
            for share in minibatches(
                samples, keys.updates_per_batch, seed=seed_of(self.recipe.seed, "minibatches", step, epoch)
            )
        ]
        each = updates_per_batch(self.recipe)
        for number, share in enumerate(shares):
            if self.algorithm.critic:
                lr = self._lr(position * each + number, self.recipe.critic.lr)
                updates.critic.append(await self.workers.update_critic(pack_for(self.recipe, share, "token"), lr))
            if not self.algorithm.critic or step > self.recipe.critic.warmup_steps:
                self.lr = self._lr(position * each + number, self.recipe.learner.lr)
                columns = pack_for(self.recipe, share, self.algorithm.reduction)
                results = await self.workers.update(columns, self.algorithm.objective, self.lr)
                self.totals.updates += 1
                self._watch(results)
                updates.policy.append(results)
        return updates

    def _lr(self, number: float, peak: float) -> float:
        keys, train = self.recipe.learner, self.recipe.train
        steps = min(train.steps, train.max_prompts / self.recipe.rollout.prompts_per_step or math.inf)
        return learning_rate(
            number,
            steps=round(steps * updates_per_batch(self.recipe)),
            peak=peak,
            warmup=keys.warmup_steps,
            schedule=keys.schedule,
            final_ratio=keys.final_lr_ratio,
        )

    def _watch(self, results: Sequence[UpdateResult]) -> None:
        self.skipped_in_a_row = 0 if results[0].taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == _MAX_SKIPPED:
            raise Diverged(
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
        facts = {"version": self.version, "updates": self.totals.updates, "recipe": self.recipe.name}
        return save_checkpoint(
            self.log.folder, step, facts, draft, self.renderer.tokenizer.save_pretrained, self.recipe.train.keep
        )

    def metrics(self, rollouts: Rollouts, samples: Sequence[Sample], updates: Updates) -> dict[str, float]:
        metrics = rollout_metrics(rollouts.groups, version=self.version) | group_metrics(rollouts.groups)
        metrics["reward/dropped_groups"] = rollouts.dropped
        metrics["reward/errors"] = self.rewards.errors
        metrics["reward/timeouts"] = self.rewards.timeouts
        metrics["rollout/rounds"] = rollouts.rounds
        metrics["learner/updates"] = len(updates.policy)
        metrics["learner/skipped"] = sum(not r[0].taken for r in updates.policy)
        metrics |= _critic_metrics(samples, updates.critic)
        # A skipped update says nothing but that it was skipped: its values need not be finite.
        taken = [r for r in updates.policy if r[0].taken]
        if not taken:
            return metrics
        tokens = _merged(taken)
        others = would_drop(tokens["ratio"], tokens["advantages"])
        self.dropped_tokens.add(tokens)
        # Before the first update the learner is the policy that sampled, so what differs there is the mismatch.
        mismatch = tokens if "old_logprobs" in tokens else _merged(taken[:1])
        learner = mismatch.get("old_logprobs", mismatch["logprobs"])
        metrics |= importance_metrics(tokens, others) | mismatch_metrics(learner, mismatch["rollout_logprobs"])
        metrics |= {name: float(tokens[name].double().mean()) for name in tokens if name not in _TOKEN_COLUMNS}
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
        if metrics["learner/updates"] == 0 and "critic/loss" not in metrics:
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
        columns = pack_for(recipe, next(batches), "token")
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


def _critic_metrics(samples: Sequence[Sample], updates: Sequence[Sequence[CriticResult]]) -> dict[str, float]:
    """The critic's losses, and how well its values before this batch's updates predicted the returns."""
    if not updates:
        return {}
    values, returns = (torch.cat([getattr(s, name)[s.loss_mask] for s in samples]) for name in ("values", "returns"))
    return value_metrics(values, returns) | {
        "critic/loss": sum(r.loss for r in updates[-1]),
        "critic/grad_norm": sum(u[0].grad_norm for u in updates) / len(updates),
        "critic/skipped": sum(not u[0].taken for u in updates),
    }
