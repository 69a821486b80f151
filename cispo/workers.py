"""Learner ranks, critic ranks and engines, with the verbs of the training loop.

A dead engine is started again with the current weights, and its unfinished calls are made again.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from torch import Tensor

from cispo.algorithms.objective import Objective
from cispo.engines.handle import EngineHandle
from cispo.errors import Diverged, ProcessDied, RunError, UserError
from cispo.learner.critic import CriticResult
from cispo.learner.handle import CriticHandle, LearnerHandle, RankHandle
from cispo.learner.learner import UpdateResult
from cispo.recipe.seeds import seed_of
from cispo.runtime.start_parts import Parts
from cispo.runtime.together import together
from cispo.runtime.watchdog import Activity
from cispo.types import Completion, Home, MicroBatch, OnUpdate, RankBatches, Sampling
from cispo.weights.buckets import Transport, merged

T = TypeVar("T")
RankT = TypeVar("RankT", bound=RankHandle)

# Seconds within which a dead process is reported after an error that its end may have caused in another.
_DEATH_NOTICE = 10.0

# Seconds that a busy rank gets to name its step.
_ANSWER = 3.0

# Bad input and numbers that are not finite would repeat in a new engine.
_REPEATS_ANEW = (UserError, Diverged)


@dataclass(slots=True, kw_only=True)
class Workers:
    """Learner ranks, critic ranks and engines, with the verbs of the training loop."""

    learners: list[LearnerHandle]
    critics: list[CriticHandle]
    """As many ranks as the learner, or none."""
    engines: list[EngineHandle]
    start_engine: Callable[[int], Awaitable[EngineHandle]]
    """Starts the engine of a number, at the start or in place of a dead one."""
    weights_folder: str
    group_size: int
    transport: Transport | Literal["shared_memory"] = "shared_memory"
    """Transport of the weights to the engines."""
    verify: bool = False
    """Whether engines compare a checksum of each bucket."""
    sharded: bool = False
    """Whether each learner rank holds a share of the policy, so that all take part where weights leave them."""
    sleeps: bool = False
    """Whether engines give their memory back while learners work."""
    tensor_parallel: int = 1
    on_update: OnUpdate = "wait"
    max_restarts: int = 0
    """Engine deaths that the run survives."""
    say: Callable[[str], None] = print
    asleep: bool = False
    joined: bool = False
    """Whether learner and engines are in one broadcast group."""
    version: int = 0
    """Version of the engines' weights; 0 before the first update."""
    restarts: int = 0
    lost_tokens: int = 0
    """Sampled tokens that `on_update: abort` discarded."""
    _load: Counter[int] = field(default_factory=Counter)
    """Engine -> completions in progress."""
    _weights: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the learner's weights change or travel."""
    _published: str = ""
    _buckets: int = 0
    """Buckets of one transfer of the weights; 0 until the first."""
    sync_parts: Parts = field(default_factory=Parts)
    """Seconds of the last `sync_weights` by its parts: wake, gather, drain, join, install and finish. The checksums
    of `verify` belong to gather and install."""

    async def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Splits the prompts over the engines, groups whole, so that prefix caching can share a group's prompt.

        A single group goes to the least loaded engine.
        """
        groups = math.ceil(len(prompts) / self.group_size)
        if groups == 1:
            engine = self._least_loaded()
            return await self._sample(engine, prompts, sampling, seed_of(seed, 0))
        share = math.ceil(groups / len(self.engines)) * self.group_size
        parts = [prompts[i : i + share] for i in range(0, len(prompts), share)]
        answers = await asyncio.gather(
            *(self._sample(number, part, sampling, seed_of(seed, number)) for number, part in enumerate(parts))
        )
        return [completion for answer in answers for completion in answer]

    def _least_loaded(self) -> int:
        return min(range(len(self.engines)), key=lambda number: (self._load[number], number))

    async def generate_at(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, homes: Sequence[Home]
    ) -> list[Completion]:
        """Samples each prompt at the engine of its home, where the home's earlier prompts were sampled.

        New homes are dealt out as `generate` deals out groups. Of a call's prompts, those of one engine and one cache
        are sampled together.
        """
        new = [home for home in dict.fromkeys(homes) if home.engine is None]
        share = math.ceil(len(new) / len(self.engines))
        for number, home in enumerate(new):
            home.engine = self._least_loaded() if len(new) == 1 else number // share
        parts: dict[tuple[int, str], list[int]] = {}
        for index, home in enumerate(homes):
            assert home.engine is not None
            parts.setdefault((home.engine, home.cache), []).append(index)
        calls = [
            self._sample(engine, [prompts[i] for i in index], sampling, seed_of(seed, engine), cache)
            for (engine, cache), index in parts.items()
        ]
        # Without a task of its own, so that a single call counts as load before the next one looks.
        answers = [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)
        found = {
            i: c
            for index, answer in zip(parts.values(), answers, strict=True)
            for i, c in zip(index, answer, strict=True)
        }
        return [found[i] for i in range(len(prompts))]

    async def _sample(
        self, number: int, prompts: list[list[int]], sampling: Sampling, seed: int, cache: str = ""
    ) -> list[Completion]:
        self._load[number] += len(prompts)
        try:
            while True:
                engine = self.engines[number]
                try:
                    return await engine.generate(prompts, sampling, seed, cache=cache)
                except _REPEATS_ANEW:
                    raise
                # Any other failure: restart the engine.
                except Exception as error:
                    await self._replace(number, engine, error)
        finally:
            self._load[number] -= len(prompts)

    async def _replace(self, number: int, dead: EngineHandle, error: Exception) -> None:
        """Restarts an engine with the current weights; the first of several callers that lost it does so."""
        async with self._weights:
            if self.engines[number] is not dead:
                return
            await self._start_again(number, error)
            if self.version:
                await self._deliver([number])

    async def start_engines(self, count: int) -> None:
        """Starts the engines side by side, again where a start fails."""
        self.engines = await together(*map(self._started, range(count)))

    async def _started(self, number: int) -> EngineHandle:
        while True:
            try:
                return await self.start_engine(number)
            except _REPEATS_ANEW:
                raise
            # Any other failure: restart the engine.
            except Exception as error:
                self._count_restart(number, error)

    def _count_restart(self, number: int, error: Exception) -> None:
        if self.restarts >= self.max_restarts:
            if not isinstance(error, ProcessDied):
                raise error
            raise RunError(f"{error}; control.max_restarts {self.max_restarts} allows no further restart")
        self.restarts += 1
        reason = error if isinstance(error, ProcessDied) else f"engine-{number}: {type(error).__name__}: {error}"
        self.say(f"{reason}: starting it again (restart {self.restarts} of at most {self.max_restarts})")

    async def _start_again(self, number: int, error: Exception) -> None:
        self._count_restart(number, error)
        self.engines[number].kill()
        self.engines[number] = await self._started(number)
        self.joined = False

    def start_parts(self) -> dict[str, list[Mapping[str, float]]]:
        """Kind -> the seconds of each process's start by its parts, of those that run now."""
        kinds = {"learner": self.learners, "critic": self.critics, "engine": self.engines}
        return {kind: [one.remote.parts for one in processes] for kind, processes in kinds.items() if processes}

    async def report_progress(self, activity: Activity, *, every: float) -> None:
        """Reports sampled tokens as activity to the watchdog; never returns."""
        known: list[int] = []
        while True:
            await asyncio.sleep(every)
            if not self._load.total():
                continue
            answers = await asyncio.gather(*(engine.progress() for engine in self.engines), return_exceptions=True)
            now = [answer for answer in answers if isinstance(answer, int)]  # a failed engine makes no progress
            if now != known:
                activity.moved()
            known = now

    async def update(self, batches: RankBatches, objective: Objective, lr: float) -> list[UpdateResult]:
        """One optimizer step: rank r trains on batches[r]."""
        return await _each(self.learners, batches, lambda rank, own: rank.update(own, objective, lr=lr))

    async def logprobs(self, batches: RankBatches, *, reference: bool = False) -> list[list[Tensor]]:
        """[ranks][micro-batches] log-probabilities [T] by the policy or the reference."""
        return await _each(self.learners, batches, lambda rank, own: rank.logprobs(own, reference=reference))

    async def update_critic(self, batches: RankBatches, lr: float) -> list[CriticResult]:
        """One optimizer step of the critic: rank r trains on batches[r]."""
        return await _each(self.critics, batches, lambda rank, own: rank.update(own, lr=lr))

    async def values(self, batches: RankBatches) -> list[list[Tensor]]:
        """[ranks][micro-batches] values [T]."""
        return await _each(self.critics, batches, lambda rank, own: rank.values(own))

    async def freeze_reference(self) -> None:
        await _together(learner.freeze_reference() for learner in self.learners)

    async def load_reference(self, folder: Path) -> None:
        await _together(learner.load_reference(str(folder.absolute())) for learner in self.learners)

    async def reset_optimizer(self) -> None:
        await asyncio.gather(*(learner.reset_optimizer() for learner in self.learners))

    async def rest_engines(self) -> None:
        """Between sampling and learning: sleeping engines give their memory back."""
        if self.sleeps and not self.asleep:
            await asyncio.gather(*(engine.sleep() for engine in self.engines))
            self.asleep = True

    def learning(self) -> asyncio.Lock:
        """Lock to hold while the learner's weights change: no restarted engine receives them meanwhile."""
        return self._weights

    async def sync_weights(self, version: int) -> None:
        """Copies the learner's weights into every engine, under the lock of `learning`; returns when all have them."""
        self.version = version
        self.sync_parts.clear()
        if self.asleep:
            with self.sync_parts.timed("wake"):
                await asyncio.gather(*(rank.release_memory() for rank in self._ranks))
                await asyncio.gather(*(engine.wake() for engine in self.engines))
            self.asleep = False
        if self.transport == "shared_memory":
            with self.sync_parts.timed("gather"):
                self._published = await self.publish(version)
        await self._deliver(range(len(self.engines)))

    async def _deliver(self, numbers: Sequence[int]) -> None:
        """Sends the weights of `version` to engines; restarts those that fail, and repeats the delivery."""
        while True:
            if self.transport == "broadcast" and not self.joined:
                numbers = range(len(self.engines))  # a new group, and a broadcast reaches all of it
            try:
                return await self._send([self.engines[number] for number in numbers])
            except _REPEATS_ANEW:
                raise
            # Any other failure: restart the dead engines. With all alive a learner or the update itself failed.
            except Exception as error:
                failed = [number for number in numbers if not await _is_alive(self.engines[number])]
                if not failed:
                    raise
                for number in failed:
                    await self._start_again(number, error)

    async def _send(self, engines: Sequence[EngineHandle]) -> None:
        with self.sync_parts.timed("drain"):
            self.lost_tokens += sum(await _all(engine.begin_update(self.on_update) for engine in engines))
        if self.transport == "shared_memory":
            with self.sync_parts.timed("install"):
                await _all(engine.load_weights(self._published) for engine in engines)
        else:
            await self._send_buckets(self.transport, engines)
        with self.sync_parts.timed("finish"):
            await _all(engine.finish_update(self.version) for engine in engines)

    async def _send_buckets(self, transport: Transport, engines: Sequence[EngineHandle]) -> None:
        """One bucket after another: staged, copied by every engine, and only then overwritten."""
        if transport == "broadcast" and not self.joined:
            with self.sync_parts.timed("join"):
                await self._join()
        # By broadcast rank 0 sends; otherwise each rank offers its own GPU's copy to the engines there. A bucket is
        # gathered by all ranks before any sends it: collectives of two groups at once could wait for each other.
        senders = self._exporters if transport == "broadcast" else self.learners
        if not self._buckets:
            self._buckets = await self.learners[0].num_buckets()
        for number in range(self._buckets):
            with self.sync_parts.timed("gather"):
                staged = await _together(s.stage_bucket(number, transport, check=self.verify) for s in senders)
            receive = [engine.receive_weights(merged(staged)) for engine in engines]
            if transport == "broadcast":
                receive.append(self.learners[0].broadcast_bucket(number))
            with self.sync_parts.timed("install"):
                await _all(receive)

    async def _join(self) -> None:
        world = 1 + len(self.engines) * self.tensor_parallel
        address = await self.learners[0].open_weight_group(world)
        joins = [self.learners[0].join_weight_group()]
        for number, engine in enumerate(self.engines):
            joins.append(engine.join_broadcast(address, 1 + number * self.tensor_parallel, world))
        await _all(joins)
        self.joined = True

    async def publish(self, version: int) -> str:
        """Writes the learner's weights to a file of `weights_folder`; returns its path."""
        paths = await _together(learner.publish(self.weights_folder, version) for learner in self._exporters)
        return paths[0]

    async def start_critic(self, version: int) -> None:
        """Starts the critic from the policy's weights."""
        path = await self.publish(version)
        await _together(critic.load_backbone(path) for critic in self.critics)

    async def save(self, folder: Path) -> None:
        """Writes the policy in Hugging Face form."""
        await _together(learner.save(str(folder.absolute())) for learner in self._exporters)

    async def start_save(self, folder: Path, *, full: bool) -> None:
        """Copies policy, critic and, of a `full` checkpoint, optimizers and starts writing them; of ranks that hold the
        same, rank 0 does.
        """
        await _together(rank.start_save(str(folder.absolute()), full=full) for rank in self._ranks)

    async def saved(self, *, wait: bool) -> bool:
        """Whether the files of `start_save` are on the disk."""
        return all(await _together(rank.saved(wait=wait) for rank in self._ranks))

    async def restore(self, checkpoint: Path, *, full: bool) -> None:
        """Reads critic and, of a `full` checkpoint, optimizers; its policy was loaded at the start."""
        await _together(rank.restore(str(checkpoint.absolute()), full=full) for rank in self._ranks)

    async def waiting_in(self) -> str:
        """The steps with collectives in which ranks are, as a clause: a rank without one is missing in them."""
        named = {f"learner-{n}": rank for n, rank in enumerate(self.learners)}
        named |= {f"critic-{n}": rank for n, rank in enumerate(self.critics)}
        steps = await asyncio.gather(*map(_step_of, named.values()))
        return ", ".join(f"{name} {step}" for name, step in zip(named, steps, strict=True) if step)

    @property
    def _ranks(self) -> list[RankHandle]:
        return [*self.learners, *self.critics]

    @property
    def _exporters(self) -> list[LearnerHandle]:
        """The learner ranks that have to be called for the policy's weights."""
        return self.learners if self.sharded else self.learners[:1]


async def _step_of(rank: RankHandle) -> str:
    try:
        step = await asyncio.wait_for(rank.waiting_in(), _ANSWER)
    except Exception:
        return "does not answer"
    return f"is in {step}" if step else ""


async def _is_alive(engine: EngineHandle) -> bool:
    try:
        await engine.progress()
    except Exception:
        return False
    return True


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Waits for every call, failed ones included; the results, or the first error."""
    results: list[T] = []
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results


async def _each(
    ranks: Sequence[RankT], batches: RankBatches, call: Callable[[RankT, Sequence[MicroBatch]], Awaitable[T]]
) -> list[T]:
    """One call a rank, each with its own micro-batches."""
    return await _together(call(rank, own) for rank, own in zip(ranks, batches, strict=True))


async def _together(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results of calls of ranks that meet in collectives, or the first error.

    Where a rank has died, that is the error: the others may report a lost connection before it, or wait for ever.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    if not tasks:
        return []
    try:
        done, open_calls = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        errors = [error for task in done if (error := task.exception()) is not None]
        if errors and open_calls and not any(isinstance(error, UserError | RunError) for error in errors):
            done, _ = await asyncio.wait(open_calls, timeout=_DEATH_NOTICE)
            errors += [error for task in done if (error := task.exception()) is not None]
    finally:
        for task in tasks:
            task.cancel()
    if errors:
        raise next((error for error in errors if isinstance(error, ProcessDied)), errors[0])
    return [task.result() for task in tasks]
