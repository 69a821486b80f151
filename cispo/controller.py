"""The loop. Every stage has the field's name and is one call.

    take -> attach (logprobs, values) -> with_advantages -> minibatches -> update ... -> sync_weights

The driver holds prompts, rewards, advantages, packing and metrics; the learner ranks, the critic's and the engines are
elsewhere, behind `Workers`. How far sampling runs ahead of learning is the buffer's business: with max_staleness 0 a
step waits for all its rollouts, and the engines sample with exactly the weights that are trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cispo.algorithms import Algorithm
from cispo.algorithms.choice import overlong_buffer_of
from cispo.algorithms.dropped_tokens import DroppedTokens
from cispo.batch import informative, minibatches, pack_for, to_samples, unpack, with_advantages
from cispo.buffer import Buffer
from cispo.errors import Diverged
from cispo.evaluate import evaluate, num_right
from cispo.files import load_tensors, read_json
from cispo.learner.learner import UpdateResult
from cispo.learner.optim import learning_rate
from cispo.metrics import Updates, sampling_metrics, update_metrics
from cispo.output.checkpoint import CheckpointWriter
from cispo.output.folder import RunLog
from cispo.output.screen import Screen
from cispo.recipe.schema import Recipe
from cispo.rollout.curriculum import max_tokens_of
from cispo.rollout.prompt_source import PromptSource
from cispo.rollout.renderer import Renderer
from cispo.rollout.rewards import RewardRunner
from cispo.rollout.rollout import Rollouts, roll_out
from cispo.runtime.interrupts import Interrupts
from cispo.seeds import seed_of
from cispo.types import Prompt, Sample, Sampling, TrajectoryGroup
from cispo.workers import Workers

# A run whose gradients stay non-finite this many updates in a row will not recover.
_MAX_SKIPPED = 10

# Truncation above this precedes instability (ScaleRL, arXiv 2510.13786).
_TRUNCATION_ALARM = 0.10


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
    checkpoints: CheckpointWriter
    interrupts: Interrupts
    buffer: Buffer = field(init=False)
    totals: Totals = field(default_factory=Totals)
    dropped_tokens: DroppedTokens = field(default_factory=DroppedTokens)
    skipped_in_a_row: int = 0
    finished: int = 0
    """Steps that are done."""
    accuracy: float | None = None
    warned: set[str] = field(default_factory=set)
    """Kinds of warnings that were given."""

    def __post_init__(self) -> None:
        control, batch = self.recipe.control, self.recipe.rollout.prompts_per_step
        self.buffer = Buffer(
            produce=self.roll_out,
            next_prompts=self.train_prompts.take,
            batch=batch,
            max_staleness=control.max_staleness,
            window=math.floor(control.window * max(control.max_staleness - 1, 0) * batch),
        )

    async def train(self, checkpoint: Path | None) -> None:
        """Trains until `train.steps`, with evaluations and checkpoints in between; from `checkpoint` on, if given.

        An interrupt ends it after the step that is under way, with a checkpoint of it.
        """
        if checkpoint is None:
            await self.begin()
        else:
            await self.resume(checkpoint)
        steps = self.recipe.train.steps
        self.screen.phase("train", steps, done=self.finished)
        try:
            with self.interrupts.in_steps():
                while self.finished < steps and self._prompts_left() > 0 and not self.interrupts.requested:
                    await self.next_step(self.finished + 1)
                await self.save(self.finished)
                await self.checkpoints.settle(wait=True)
        finally:
            await self.buffer.close()
        self.screen.done()
        if self.train_prompts.exhausted:
            self.screen.print(
                f"step {self.finished} ended the run: every prompt reached a pass rate of "
                f"{self.recipe.curriculum.drop_above} and is dropped (curriculum.drop_above)"
            )

    async def begin(self) -> None:
        """The start of a new run: what is frozen or copied from the first policy, and how good that is."""
        if self.workers.critics:
            await self.workers.start_critic(self.workers.version)
        if self.algorithm.needs_reference:
            await self.workers.freeze_reference()
            await self.workers.save(self._reference)
        await self.sync_weights()
        self.log.metrics(0, self.totals.metrics() | await self.evaluate(0))
        if self.recipe.sft is not None and self.recipe.train.save_every:
            await self.save(0)

    async def next_step(self, step: int) -> None:
        """A step with its evaluation, its metrics and its checkpoint, where they are due."""
        keys, before = self.recipe.train, self.totals.prompts
        metrics = await self.step(step)
        last = step == keys.steps or self._prompts_left() == 0
        if last or self._evaluation_due(before):
            metrics |= await self.evaluate(step)
        self.log.metrics(step, metrics)
        self.finished = step
        self._show(step, metrics)
        await self.checkpoints.settle(wait=False)
        if last or (keys.save_every and step % keys.save_every == 0):
            await self.save(step, metrics.get("eval/accuracy"))

    def _evaluation_due(self, before: int) -> bool:
        """Whether `eval_every` steps' worth of prompts were completed: in steps that sample more, sooner."""
        every = self.recipe.train.eval_every * self.recipe.rollout.prompts_per_step
        return every > 0 and self.totals.prompts // every > before // every

    async def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and its updates."""
        started = time.perf_counter()
        position = self.totals.prompts / self.recipe.rollout.prompts_per_step
        rollouts = await self.sample()
        sampled = time.perf_counter()
        await self.workers.rest_engines()
        async with self.workers.learning():
            groups = self.kept(rollouts)
            samples = await self.attach([s for group in groups for s in to_samples(group)])
            samples = with_advantages(groups, samples, self.algorithm)
            updates = await self.learn(samples, step, position)
            learned = time.perf_counter()
            metrics = self.metrics(rollouts, samples, updates)
            await self.sync_weights()
        synced = time.perf_counter()
        if self.recipe.curriculum.length_stages:
            metrics["curriculum/max_tokens"] = max_tokens_of(self.recipe, step)
        self.log.samples(step, rollouts.groups)
        self.totals.seconds += synced - started
        return (
            metrics
            | self.train_prompts.metrics()
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

    async def sample(self) -> Rollouts:
        """Rollouts of P prompts; with dynamic sampling, of further ones until P groups have something to compare."""
        wanted = self.recipe.rollout.prompts_per_step
        rollouts = await self.take(min(wanted, self._prompts_left()))
        for _ in range(self.algorithm.dynamic_sampling):
            useful = sum(map(informative, rollouts.groups))
            left = self._prompts_left()
            if useful >= wanted or left == 0:
                break
            # As many prompts as should do at the share seen so far, so that few rounds are needed.
            share = max(useful, 1) / len(rollouts.groups) if rollouts.groups else 1.0
            rollouts += await self.take(min(math.ceil((wanted - useful) / share), wanted, left))
        return rollouts

    async def take(self, prompts: int) -> Rollouts:
        """The next groups from the buffer, counted."""
        to_come = (self.recipe.train.steps - self.finished) * self.recipe.rollout.prompts_per_step
        bound = self.recipe.train.max_prompts
        left = min(max(to_come, prompts), bound - self.totals.prompts if bound else math.inf)
        rollouts = await self.buffer.take(prompts, version=self.workers.version, left=int(left))
        for group in rollouts.groups:
            right = num_right(group, self.rewards.names[0])
            self.train_prompts.observe(group.prompt.id, right=right, attempts=len(group.trajectories))
        self.totals.prompts += prompts
        self.totals.completions += prompts * self.recipe.rollout.group_size
        self.totals.tokens += rollouts.tokens
        return rollouts

    async def roll_out(self, prompts: Sequence[Prompt], ticket: int) -> Rollouts:
        """Samples and scores the prompts of one ticket."""
        max_tokens = max_tokens_of(self.recipe, self.finished + 1)
        return await roll_out(
            prompts,
            group_size=self.recipe.rollout.group_size,
            generate=self.workers.generate,
            renderer=self.renderer,
            rewards=self.rewards,
            sampling=replace(self.sampling, max_tokens=max_tokens),
            seed=seed_of(self.recipe.seed, "rollout", ticket + 1),
            overlong_buffer=overlong_buffer_of(self.recipe, self.algorithm, max_tokens),
            overlong_factor=self.recipe.algorithm.overlong_penalty,
        )

    def _prompts_left(self) -> int:
        """How many prompts the next step may ask for, at most."""
        if self.train_prompts.exhausted:
            return self.buffer.waiting
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
        each = self.recipe.algorithm.steps_per_batch
        for number, share in enumerate(shares):
            if self.algorithm.critic:
                lr = self._lr(position * each + number, self.recipe.critic.lr)
                updates.critic.append(await self.workers.update_critic(pack_for(self.recipe, share, "token"), lr))
            if not self.algorithm.critic or step > self.recipe.critic.warmup_steps:
                updates.lr = self._lr(position * each + number, self.recipe.learner.lr)
                columns = pack_for(self.recipe, share, self.algorithm.reduction)
                results = await self.workers.update(columns, self.algorithm.objective, updates.lr)
                self.totals.updates += 1
                self._watch(results)
                updates.policy.append(results)
        return updates

    def _lr(self, number: float, peak: float) -> float:
        keys, train = self.recipe.learner, self.recipe.train
        steps = min(train.steps, train.max_prompts / self.recipe.rollout.prompts_per_step or math.inf)
        return learning_rate(
            number,
            steps=round(steps * self.recipe.algorithm.steps_per_batch),
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
        await self.workers.sync_weights(self.workers.version + 1)

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

    def metrics(self, rollouts: Rollouts, samples: Sequence[Sample], updates: Updates) -> dict[str, float]:
        tokens = updates.tokens()
        if tokens:
            self.dropped_tokens.add(tokens)
        version, balanced = self.workers.version, self.recipe.learner.router_aux_coef > 0
        metrics = sampling_metrics(rollouts, self.rewards, version=version)
        metrics |= update_metrics(samples, updates, tokens, version=version, balanced=balanced)
        if self.recipe.control.on_update == "abort":
            metrics["rollout/aborted_tokens"] = self.workers.lost_tokens
        return metrics

    @property
    def _reference(self) -> Path:
        return self.checkpoints.folder.folder / "reference"

    async def save(self, step: int, score: float | None = None) -> None:
        """Begins a checkpoint with all that a resumed run needs; a step is saved once."""
        if step > self.checkpoints.saved:
            facts = {"version": self.workers.version, "updates": self.totals.updates, "recipe": self.recipe.name}
            await self.checkpoints.begin(step, self.state(), self.dropped_tokens.counts, facts=facts, score=score)

    def state(self) -> dict[str, Any]:
        """Where the loop stands, but for what tensors hold."""
        return {
            "version": self.workers.version,
            "totals": asdict(self.totals),
            "finished": self.finished,
            "skipped_in_a_row": self.skipped_in_a_row,
            "accuracy": self.accuracy,
            "warned": sorted(self.warned),
            "rewards": {"errors": self.rewards.errors, "timeouts": self.rewards.timeouts},
            "prompts": self.train_prompts.state_dict(),
            "buffer": self.buffer.state(),
        }

    async def resume(self, checkpoint: Path) -> None:
        """Goes on where a checkpoint was taken; learners and engines have loaded its policy already."""
        training = checkpoint / "training"
        state = read_json(training / "driver.json")
        self.dropped_tokens.counts = load_tensors(training / "driver.safetensors")
        self.totals = Totals(**state["totals"])
        self.finished = self.checkpoints.saved = state["finished"]
        self.skipped_in_a_row, self.accuracy = state["skipped_in_a_row"], state["accuracy"]
        self.warned = set(state["warned"])
        self.rewards.errors, self.rewards.timeouts = state["rewards"]["errors"], state["rewards"]["timeouts"]
        self.train_prompts.load_state_dict(state["prompts"])
        await self.workers.restore(checkpoint)
        if self.algorithm.needs_reference:
            await self.workers.load_reference(self._reference)
        await self.workers.sync_weights(state["version"])
        self.buffer.restore(state["buffer"], prompts=self.train_prompts.prompts, version=state["version"])

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
                f"{truncated:.0%} of the completions of step {step} were cut at "
                f"{max_tokens_of(self.recipe, step)} tokens; runs that truncate more than 10 % tend to become unstable",
            )
        if metrics["learner/updates"] == 0 and "critic/loss" not in metrics:
            self._warn("constant", f"every group of step {step} had equal rewards: there was nothing to learn from")
        numbers = {"reward": f"{metrics.get('reward/mean', 0):.3f}"}
        if self.accuracy is not None:
            numbers["accuracy"] = f"{self.accuracy:.3f}"
        numbers["tokens/s"] = f"{metrics['rollout/tokens_per_s']:,.0f}"
        self.screen.step(step, numbers)
