"""The training loop. Every stage has the field's name and is one call.

    take -> attach (logprobs, values) -> with_advantages -> minibatches -> update ... -> sync_weights

The driver holds prompts, rewards, advantages, packing and metrics; learner ranks, critic ranks and engines run behind
`Workers`. The buffer decides how far sampling runs ahead of learning: with max_staleness 0 a step waits for all its
rollouts, and the engines sample with exactly the weights that are trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cispo.agents.episodes import Episodes
from cispo.algorithms import Algorithm
from cispo.algorithms.choice import overlong_buffer_of
from cispo.algorithms.dropped_tokens import DroppedTokens
from cispo.batch.packing import pack_for, unpack
from cispo.batch.samples import informative, minibatches, to_samples, with_advantages
from cispo.errors import Diverged
from cispo.evaluate import HeldOut, evaluate_set, gaps, num_judged, num_right
from cispo.files import disk_errors, form_errors, load_tensors, read_json
from cispo.learner.critic import CriticResult
from cispo.learner.learner import UpdateResult
from cispo.learner.optim import learning_rate
from cispo.metrics import Updates, alarms, sampling_metrics, update_metrics
from cispo.output.checkpoint import CheckpointWriter
from cispo.output.folder import RunLog
from cispo.output.integrity import check_sealed, seal
from cispo.output.screen import Screen
from cispo.output.token_values import TokenRecorder
from cispo.recipe.held_out import best_metric
from cispo.recipe.schema import Recipe
from cispo.recipe.seeds import seed_of
from cispo.rollout.buffer import Buffer
from cispo.rollout.curriculum import max_tokens_of
from cispo.rollout.prompt_source import PromptSource, fingerprint
from cispo.rollout.renderer import Renderer
from cispo.rollout.rewards import RewardRunner
from cispo.rollout.rollout import Rollouts, RolloutSetup, roll_out
from cispo.runtime.interrupts import Interrupts
from cispo.runtime.start_parts import StartParts
from cispo.types import Prompt, Sample, Sampling, TrajectoryGroup
from cispo.workers import Workers

# A run whose gradients stay non-finite this many updates in a row will not recover.
_MAX_SKIPPED = 10


@dataclass(slots=True, kw_only=True)
class Totals:
    """Prompts, completions, tokens, updates and seconds since the first step."""

    prompts: int = 0
    completions: int = 0
    tokens: int = 0
    updates: int = 0
    seconds: float = 0.0
    """Spent in training steps; evaluations excluded."""

    def metrics(self) -> dict[str, float]:
        return {f"total/{name}": getattr(self, name) for name in self.__slots__}


@dataclass(slots=True, kw_only=True)
class Controller:
    """One training run: its parts and its state."""

    recipe: Recipe
    algorithm: Algorithm
    workers: Workers
    renderer: Renderer
    sampling: Sampling
    rewards: RewardRunner
    train_prompts: PromptSource
    held_out: Sequence[HeldOut]
    log: RunLog
    screen: Screen
    checkpoints: CheckpointWriter
    interrupts: Interrupts
    episodes: Episodes | None = None
    """Tools or an environment, of a recipe that has one."""
    start: StartParts = field(default_factory=StartParts)
    """Seconds of the run's start so far; the first step's metrics have them all."""
    buffer: Buffer = field(init=False)
    recorder: TokenRecorder = field(init=False)
    totals: Totals = field(default_factory=Totals)
    dropped_tokens: DroppedTokens = field(default_factory=DroppedTokens)
    skipped_in_a_row: int = 0
    finished: int = 0
    """Completed steps."""
    accuracy: float | None = None
    warned: set[str] = field(default_factory=set)
    """Kinds of warnings already printed: one sentence a kind and run."""
    _of_start: dict[str, float] = field(default_factory=dict)
    """Metrics of the start, until the first step has them."""

    def __post_init__(self) -> None:
        control, batch = self.recipe.control, self.recipe.rollout.prompts_per_step
        self.recorder = TokenRecorder(self.recipe.train.token_samples)
        self.buffer = Buffer(
            produce=self.roll_out,
            next_prompts=self.train_prompts.take,
            batch=batch,
            max_staleness=control.max_staleness,
            window=math.floor(control.window * max(control.max_staleness - 1, 0) * batch),
        )

    async def train(self, checkpoint: Path | None) -> None:
        """Trains until `train.steps` with evaluations and checkpoints, from the start or from `checkpoint`.

        An interrupt ends it after the current step, with a checkpoint of that step.
        """
        if checkpoint is None:
            await self.begin()
        else:
            await self.resume(checkpoint)
        self._of_start = self.start.metrics(self.workers.start_parts())
        steps = self.recipe.train.steps
        self.screen.phase("train", steps, done=self.finished)
        try:
            with self.interrupts.in_steps():
                saves = self.interrupts.saves_asked
                while self.finished < steps and self.prompts_left > 0 and not self.interrupts.requested:
                    await self.next_step(self.finished + 1)
                    if saves != self.interrupts.saves_asked:
                        saves = self.interrupts.saves_asked
                        await self.save(self.finished)
                        # The machine may be taken away during the next step.
                        await self.checkpoints.settle(wait=True)
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
        """The start of a new run: critic and reference copied from the first policy, and its evaluation."""
        if self.workers.critics:
            await self.workers.start_critic(self.workers.version)
        if self.algorithm.needs_reference:
            await self.workers.freeze_reference()
            with disk_errors(self._reference):
                await self.workers.save(self._reference)
                self.renderer.save(self._reference)
                seal(self._reference, {})
        with self.start.timed("weights"):
            await self.sync_weights()
        with self.start.timed("eval"):
            self.log.metrics(0, self.totals.metrics() | await self.evaluate(0))
        if self.recipe.sft is not None and self.recipe.train.save_every:
            await self.save(0)

    async def next_step(self, step: int) -> None:
        """A step with its metrics, and the evaluation and checkpoint that are due."""
        keys, before = self.recipe.train, self.totals.prompts
        metrics = await self.step(step) | self._of_start
        self._of_start = {}
        last = step == keys.steps or self.prompts_left == 0
        if last or self._evaluation_due(before):
            metrics |= await self.evaluate(step)
        self.log.metrics(step, metrics)
        self.finished = step
        self._show(step, metrics)
        await self.checkpoints.settle(wait=False)
        if last or (keys.save_every and step % keys.save_every == 0):
            await self.save(step, metrics.get(best_metric(self.recipe)))

    def _evaluation_due(self, before: int) -> bool:
        """Whether another `eval_every` steps' worth of prompts is complete; dynamic sampling reaches it sooner."""
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
            self.recorder.begin(groups, samples)
            updates = await self.learn(groups, samples, step, position)
            learned, version = time.perf_counter(), self.workers.version
            await self.sync_weights()
        synced = time.perf_counter()
        # After the weights: engines that sample ahead go on meanwhile.
        metrics = self.metrics(rollouts, samples, updates, version=version)
        for kind, sentence in alarms(self.recipe, metrics, rollouts, self.rewards, step=step):
            self._warn(kind, sentence)
        ended = time.perf_counter()
        if self.episodes is not None:
            metrics["time/env"] = self.episodes.take_seconds()
        if self.recipe.curriculum.length_stages:
            metrics["curriculum/max_tokens"] = max_tokens_of(self.recipe, step)
        self.log.samples(step, rollouts.groups, tokens=self.recorder.rows(rollouts.groups))
        self.totals.seconds += ended - started
        return (
            metrics
            | self.train_prompts.metrics()
            | self.totals.metrics()
            | {
                "time/rollout": sampled - started,
                "time/reward": rollouts.seconds_scoring,
                "time/learn": learned - sampled,
                "time/sync": synced - learned,
                **{f"time/sync/{part}": seconds for part, seconds in self.workers.sync_parts.items()},
                "time/metrics": ended - synced,
                "time/step": ended - started,
                "rollout/tokens_per_s": rollouts.tokens / (ended - started),
            }
        )

    async def sample(self) -> Rollouts:
        """Rollouts of P prompts; with dynamic sampling, of further prompts until P groups have unequal rewards."""
        wanted = self.recipe.rollout.prompts_per_step
        rollouts = await self.take(wanted)
        for _ in range(self.algorithm.dynamic_sampling):
            useful = sum(map(informative, rollouts.groups))
            if useful >= wanted or self.prompts_left == 0:
                break
            # The number of prompts expected to suffice at the share seen so far: few rounds are needed.
            share = max(useful, 1) / len(rollouts.groups) if rollouts.groups else 1.0
            rollouts += await self.take(min(math.ceil((wanted - useful) / share), wanted))
        return rollouts

    async def take(self, prompts: int) -> Rollouts:
        """The groups of the next `prompts` prompts, or of all that are left, from the buffer; counted."""
        prompts = int(min(prompts, self.prompts_left))
        of_steps = (self.recipe.train.steps - self.finished) * self.recipe.rollout.prompts_per_step
        left = int(min(max(of_steps, prompts), self.prompts_left))
        rollouts = await self.buffer.take(prompts, version=self.workers.version, left=left)
        for group in rollouts.groups:
            judge = self.rewards.judge_of(group.prompt.source)
            if attempts := num_judged(group, judge):
                self.train_prompts.observe(group.prompt.id, right=num_right(group, judge), attempts=attempts)
        self.totals.prompts += prompts
        self.totals.completions += prompts * self.recipe.rollout.group_size
        self.totals.tokens += rollouts.tokens
        return rollouts

    async def roll_out(self, prompts: Sequence[Prompt], ticket: int) -> Rollouts:
        """Samples and scores the prompts of one ticket."""
        max_tokens = max_tokens_of(self.recipe, self.finished + 1)
        return await roll_out(
            prompts,
            self._setup,
            group_size=self.recipe.rollout.group_size,
            sampling=replace(self.sampling, max_tokens=max_tokens),
            seed=seed_of(self.recipe.seed, "rollout", ticket + 1),
            overlong_buffer=overlong_buffer_of(self.recipe, self.algorithm, max_tokens),
            overlong_factor=self.recipe.algorithm.overlong_penalty,
        )

    @property
    def _setup(self) -> RolloutSetup:
        play = None
        if self.episodes is not None:
            play = partial(self.episodes.play, generate_at=self.workers.generate_at)
        return RolloutSetup(
            generate=self.workers.generate,
            renderer=self.renderer,
            rewards=self.rewards,
            play=play,
            step=self.finished + 1,
            steps=self.recipe.train.steps,
        )

    @property
    def prompts_left(self) -> float:
        """Prompts that may still be taken: up to `train.max_prompts`; once all are dropped, those in the buffer."""
        if self.train_prompts.exhausted:
            return self.buffer.waiting
        bound = self.recipe.train.max_prompts
        return max(bound - self.totals.prompts, 0) if bound else math.inf

    def kept(self, rollouts: Rollouts) -> list[TrajectoryGroup]:
        """The groups that are trained on."""
        if self.algorithm.zero_variance == "keep":
            return rollouts.groups
        return [group for group in rollouts.groups if informative(group)][: self.recipe.rollout.prompts_per_step]

    async def attach(self, samples: list[Sample]) -> list[Sample]:
        """Adds the log-probabilities and values that the algorithm needs from before the first update."""
        needed = self.algorithm.ratio_anchor == "old" or self.algorithm.needs_reference or self.algorithm.critic
        if not samples or not needed:
            return samples
        batches = pack_for(self.recipe, samples, "token")
        passes = {}
        if self.algorithm.ratio_anchor == "old":
            passes["old_logprobs"] = await self.workers.logprobs(batches)
        if self.algorithm.needs_reference:
            passes["ref_logprobs"] = await self.workers.logprobs(batches, reference=True)
        if self.algorithm.critic:
            passes["values"] = await self.workers.values(batches)
        for name, values in passes.items():
            rows = unpack(batches, values, len(samples))
            samples = [replace(sample, **{name: row}) for sample, row in zip(samples, rows, strict=True)]
        return samples

    async def learn(
        self, groups: Sequence[TrajectoryGroup], samples: Sequence[Sample], step: int, position: float
    ) -> Updates:
        """The optimizer steps of one batch; `position` is the number of batches before it, by their prompts."""
        updates = Updates()
        for number, share in enumerate(self._shares(groups, samples, step)):
            progress = position * self.recipe.algorithm.steps_per_batch + number
            if self.algorithm.critic:
                updates.critic.append(await self._update_critic(share, progress))
            if not self.algorithm.critic or step > self.recipe.critic.warmup_steps:
                updates.lr = self._lr(progress, self.recipe.learner.lr)
                updates.policy.append(await self._update_policy(share, updates.lr))
        return updates

    def _shares(
        self, groups: Sequence[TrajectoryGroup], samples: Sequence[Sample], step: int
    ) -> Iterator[list[Sample]]:
        """The minibatches of all epochs, cut anew in each."""
        keys = self.recipe.algorithm
        for epoch in range(keys.epochs):
            seed = seed_of(self.recipe.seed, "minibatches", step, epoch)
            yield from minibatches(groups, samples, keys.updates_per_batch, seed=seed)

    async def _update_critic(self, share: Sequence[Sample], progress: float) -> list[CriticResult]:
        lr = self._lr(progress, self.recipe.critic.lr)
        return await self.workers.update_critic(pack_for(self.recipe, share, "token"), lr)

    async def _update_policy(self, share: Sequence[Sample], lr: float) -> list[UpdateResult]:
        batches = pack_for(self.recipe, share, self.algorithm.reduction)
        results = await self.workers.update(batches, self.algorithm.objective, lr)
        self.totals.updates += 1
        self.recorder.add(share, batches, [r.batch.tokens if r.taken else None for r in results])
        self._watch(results)
        return results

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
        """Metrics of all held-out sets."""
        metrics: dict[str, float] = {}
        for one in self.held_out:
            setup = replace(self._setup, step=step)
            own, groups = await evaluate_set(one, setup, training=self.sampling, seed=one.seed(self.recipe))
            sampled = TokenRecorder(self.recipe.train.token_samples).rows(groups)
            kind = f"eval-{one.name}" if one.name else "eval"
            self.log.samples(step, groups, kind=kind, tokens=sampled)
            if sentence := gaps(own, self.rewards, one.prefix):
                self._warn(f"held-out {one.name}" if one.name else "held-out", f"step {step}: {sentence}")
            metrics |= own
        if self.held_out:
            self.accuracy = metrics.get(best_metric(self.recipe))
        return metrics

    def metrics(
        self, rollouts: Rollouts, samples: Sequence[Sample], updates: Updates, *, version: int
    ) -> dict[str, float]:
        """Metrics of the updates of the policy `version`."""
        tokens = updates.tokens()
        if tokens is not None:
            self.dropped_tokens.add(tokens)
        balanced = self.recipe.learner.router_aux_coef > 0
        metrics = sampling_metrics(rollouts, self.rewards, version=version)
        metrics |= update_metrics(samples, updates, tokens, version=version, balanced=balanced)
        if self.recipe.control.on_update == "abort":
            metrics["rollout/aborted_tokens"] = self.workers.lost_tokens
        return metrics

    @property
    def _reference(self) -> Path:
        return self.checkpoints.folder.folder / "reference"

    async def save(self, step: int, score: float | None = None) -> None:
        """Begins a checkpoint of all state that a resumed run needs; a step is saved once."""
        if step > self.checkpoints.saved:
            facts = {"version": self.workers.version, "updates": self.totals.updates, "recipe": self.recipe.name}
            await self.checkpoints.begin(step, self.state(), self.dropped_tokens.counts, facts=facts, score=score)

    def state(self) -> dict[str, Any]:
        """The loop's state outside of tensors, as JSON values."""
        return {
            "version": self.workers.version,
            "totals": asdict(self.totals),
            "finished": self.finished,
            "skipped_in_a_row": self.skipped_in_a_row,
            "accuracy": self.accuracy,
            "warned": sorted(self.warned),
            "rewards": {"errors": self.rewards.errors, "timeouts": self.rewards.timeouts, "code": self.rewards.code},
            "held_out": fingerprint([prompt for one in self.held_out for prompt in one.prompts]),
            "renderer": self.renderer.fingerprint,
            "prompts": self.train_prompts.state_dict(),
            "buffer": self.buffer.state(),
            **({} if self.checkpoints.full else {"optimizers": False}),
        }

    async def resume(self, checkpoint: Path) -> None:
        """Restores the loop from a checkpoint, after learners and engines have loaded its policy.

        Raises UserError where the state is not one that `state` wrote, or of another task.
        """
        file = checkpoint / "training" / "driver.json"
        state = read_json(file)
        self.dropped_tokens.counts = load_tensors(checkpoint / "training" / "driver.safetensors")
        with form_errors(file):
            self.totals = Totals(**state["totals"])
            self.finished = self.checkpoints.saved = state["finished"]
            self.skipped_in_a_row, self.accuracy = state["skipped_in_a_row"], state["accuracy"]
            self.warned = set(state["warned"])
            self.rewards.errors, self.rewards.timeouts = state["rewards"]["errors"], state["rewards"]["timeouts"]
            self.rewards.compare(state["rewards"].get("code"), self.screen.warn)
            self.train_prompts.load_state_dict(state["prompts"])
            version, waiting = state["version"], state["buffer"]
        full = bool(state.get("optimizers", True))
        if not full:
            self.screen.warn(
                f"checkpoint {checkpoint.name} holds weights alone (train.checkpoint: weights): AdamW's moments start "
                "again from zero, so the steps to come are not those of an undisturbed run"
            )
        await self.workers.restore(checkpoint, full=full)
        if self.algorithm.needs_reference:
            check_sealed(self._reference, "reference policy")
            await self.workers.load_reference(self._reference)
        await self.workers.sync_weights(version)
        with form_errors(file):
            self.buffer.restore(waiting, prompts=self.train_prompts.prompts, version=version)

    def _warn(self, kind: str, sentence: str) -> None:
        """Prints the first sentence of each kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            self.screen.warn(sentence)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        numbers = {"reward": f"{metrics.get('reward/mean', 0):.3f}"}
        if self.accuracy is not None:
            numbers["accuracy"] = f"{self.accuracy:.3f}"
        numbers["tokens/s"] = f"{metrics['rollout/tokens_per_s']:,.0f}"
        self.screen.step(step, numbers)
