"""The learner ranks, the critic's and the engines, with the verbs of the training loop.

An engine that dies is started again with the current weights, and what it was sampling is sampled again.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cispo.algorithms.objective import Objective
from cispo.errors import Diverged, ProcessDied, RunError, UserError
from cispo.learner.critic import CriticResult
from cispo.learner.learner import UpdateResult
from cispo.runtime.actors import Handle
from cispo.runtime.watchdog import Activity
from cispo.seeds import seed_of
from cispo.types import Completion, MicroBatch, OnUpdate, Sampling
from cispo.weights.buckets import Transport, merged

Columns = Sequence[Sequence[MicroBatch]]
"""[ranks][micro-batches] of one pass or update."""

# Bad input, and numbers that are no longer finite, would be the same in a new engine.
_NO_BETTER_ANEW = (UserError, Diverged)


@dataclass(slots=True, kw_only=True)
class Workers:
    """The learner ranks, the critic's and the engines, with the verbs of the training loop."""

    learners: list[Handle]
    critics: list[Handle]
    """As many ranks as the learner, or none."""
    engines: list[Handle]
    start_engine: Callable[[int], Awaitable[Handle]]
    """Starts the engine of a number, also in place of one that died."""
    weights_folder: str
    group_size: int
    transport: Transport | Literal["shared_memory"] = "shared_memory"
    """How weights reach the engines."""
    verify: bool = False
    """Whether engines compare a checksum of each bucket."""
    sleeps: bool = False
    """Whether engines give their memory back while learners work."""
    tensor_parallel: int = 1
    on_update: OnUpdate = "wait"
    max_restarts: int = 0
    """Engines that may die during the run."""
    say: Callable[[str], None] = print
    asleep: bool = False
    joined: bool = False
    """Whether learner and engines have met in a broadcast group."""
    version: int = 0
    """Of the weights that the engines have; 0 before the learner sent any."""
    restarts: int = 0
    lost_tokens: int = 0
    """What `on_update: abort` has thrown away."""
    _load: Counter[int] = field(default_factory=Counter)
    """Engine -> completions that it is sampling."""
    _weights: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the learner's weights are changing or on their way."""
    _published: str = ""

    async def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Shares the prompts over the engines; a group stays together, where prefix caching can share its prompt.

        A single group goes to the engine that has least to do.
        """
        groups = math.ceil(len(prompts) / self.group_size)
        if groups == 1:
            engine = min(range(len(self.engines)), key=lambda number: (self._load[number], number))
            return await self._sample(engine, prompts, sampling, seed_of(seed, 0))
        share = math.ceil(groups / len(self.engines)) * self.group_size
        parts = [prompts[i : i + share] for i in range(0, len(prompts), share)]
        answers = await asyncio.gather(
            *(self._sample(number, part, sampling, seed_of(seed, number)) for number, part in enumerate(parts))
        )
        return [completion for answer in answers for completion in answer]

    async def _sample(self, number: int, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        self._load[number] += len(prompts)
        try:
            while True:
                engine = self.engines[number]
                try:
                    return await engine.call("generate", prompts, sampling, seed)
                except _NO_BETTER_ANEW:
                    raise
                # Whatever else an engine dies of.
                except Exception as error:
                    await self._replace(number, engine, error)
        finally:
            self._load[number] -= len(prompts)

    async def _replace(self, number: int, dead: Handle, error: Exception) -> None:
        """Starts an engine anew with the current weights; of several callers that lost it, the first does so."""
        async with self._weights:
            if self.engines[number] is not dead:
                return
            await self._start_again(number, error)
            if self.version:
                await self._deliver([number])

    async def start_engines(self, count: int) -> None:
        """Starts the engines side by side; one that dies of it is started again."""
        self.engines = await asyncio.gather(*map(self._started, range(count)))

    async def _started(self, number: int) -> Handle:
        while True:
            try:
                return await self.start_engine(number)
            except _NO_BETTER_ANEW:
                raise
            # Whatever else an engine dies of.
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

    async def report_progress(self, activity: Activity, *, every: float) -> None:
        """Tells a watchdog while long completions get on; returns never."""
        known: list[Any] = []
        while True:
            await asyncio.sleep(every)
            if not self._load.total():
                continue
            answers = await asyncio.gather(*(engine.ask("progress") for engine in self.engines), return_exceptions=True)
            now = [answer for answer in answers if isinstance(answer, int)]  # an engine that fails does not move
            if now != known:
                activity.moved()
            known = now

    async def update(self, columns: Columns, objective: Objective, lr: float) -> list[UpdateResult]:
        """One optimizer step: rank r trains on columns[r]."""
        return await _each(self.learners, columns, "update", objective, lr=lr)

    async def logprobs(self, columns: Columns, *, reference: bool = False) -> list[list[Tensor]]:
        return await _each(self.learners, columns, "logprobs", reference=reference)

    async def update_critic(self, columns: Columns, lr: float) -> list[CriticResult]:
        return await _each(self.critics, columns, "update", lr=lr)

    async def values(self, columns: Columns) -> list[list[Tensor]]:
        return await _each(self.critics, columns, "values")

    async def freeze_reference(self) -> None:
        await asyncio.gather(*(learner.call("freeze_reference") for learner in self.learners))

    async def load_reference(self, folder: Path) -> None:
        await asyncio.gather(*(learner.call("load_reference", str(folder.absolute())) for learner in self.learners))

    async def reset_optimizer(self) -> None:
        await asyncio.gather(*(learner.call("reset_optimizer") for learner in self.learners))

    async def rest_engines(self) -> None:
        """Between sampling and learning: engines that sleep give their memory back."""
        if self.sleeps and not self.asleep:
            await asyncio.gather(*(engine.call("sleep") for engine in self.engines))
            self.asleep = True

    def learning(self) -> asyncio.Lock:
        """Held while the learner's weights change: until it is released, no engine can be given them from outside."""
        return self._weights

    async def sync_weights(self, version: int) -> None:
        """Puts the learner's weights into every engine, under the lock of `learning`; returns when all have them."""
        self.version = version
        if self.asleep:
            await asyncio.gather(*(learner.call("release_memory") for learner in self.learners + self.critics))
            await asyncio.gather(*(engine.call("wake") for engine in self.engines))
            self.asleep = False
        if self.transport == "shared_memory":
            self._published = await self.publish(version)
        await self._deliver(range(len(self.engines)))

    async def _deliver(self, numbers: Sequence[int]) -> None:
        """Gives engines the weights of `version`; those that fail on the way are started again, and all told anew."""
        while True:
            if self.transport == "broadcast" and not self.joined:
                numbers = range(len(self.engines))  # they meet anew, and a broadcast reaches all of them
            try:
                return await self._send([self.engines[number] for number in numbers])
            except _NO_BETTER_ANEW:
                raise
            # Whatever else an engine dies of; where all are well it was a learner, or the update itself.
            except Exception as error:
                failed = [number for number in numbers if not await _is_well(self.engines[number])]
                if not failed:
                    raise
                for number in failed:
                    await self._start_again(number, error)

    async def _send(self, engines: Sequence[Handle]) -> None:
        self.lost_tokens += sum(await _all(engine.call("begin_update", self.on_update) for engine in engines))
        if self.transport == "shared_memory":
            await _all(engine.call("load_weights", self._published) for engine in engines)
        else:
            await self._send_buckets(self.transport, engines)
        await _all(engine.call("finish_update", self.version) for engine in engines)

    async def _send_buckets(self, transport: Transport, engines: Sequence[Handle]) -> None:
        """One bucket after another: staged, taken by every engine, and only then overwritten."""
        if transport == "broadcast" and not self.joined:
            await self._join()
        # By broadcast rank 0 sends; otherwise each rank offers its own GPU's copy to the engines there.
        senders = self.learners[:1] if transport == "broadcast" else self.learners
        for number in range(await self.learners[0].call("num_buckets")):
            staged = await asyncio.gather(
                *(sender.call("stage_bucket", number, transport, check=self.verify) for sender in senders)
            )
            receive = [engine.call("receive_weights", merged(staged)) for engine in engines]
            if transport == "broadcast":
                receive.append(self.learners[0].call("broadcast_bucket", number))
            await _all(receive)

    async def _join(self) -> None:
        world = 1 + len(self.engines) * self.tensor_parallel
        address = await self.learners[0].call("open_weight_group", world)
        joins = [self.learners[0].call("join_weight_group")]
        for number, engine in enumerate(self.engines):
            joins.append(engine.call("join_broadcast", address, 1 + number * self.tensor_parallel, world))
        await _all(joins)
        self.joined = True

    async def publish(self, version: int) -> str:
        return await self.learners[0].call("publish", self.weights_folder, version)

    async def start_critic(self, version: int) -> None:
        """Gives the critic the policy's weights to start from."""
        path = await self.publish(version)
        await asyncio.gather(*(critic.call("load_backbone", path) for critic in self.critics))

    async def save(self, folder: Path) -> None:
        """Writes the policy in Hugging Face form."""
        await self.learners[0].call("save", str(folder.absolute()))

    async def start_save(self, folder: Path) -> None:
        """Copies policy, critic and optimizers as they are now, and starts writing them; ranks hold the same."""
        savers = self.learners[:1] + self.critics[:1]
        await asyncio.gather(*(saver.call("start_save", str(folder.absolute())) for saver in savers))

    async def saved(self, *, wait: bool) -> bool:
        """Whether what `start_save` began is on the disk."""
        savers = self.learners[:1] + self.critics[:1]
        return all(await asyncio.gather(*(saver.call("saved", wait=wait) for saver in savers)))

    async def restore(self, checkpoint: Path) -> None:
        """Takes optimizers and critic from a checkpoint, whose policy was loaded at the start."""
        ranks = self.learners + self.critics
        await asyncio.gather(*(rank.call("restore", str(checkpoint.absolute())) for rank in ranks))


async def _is_well(engine: Handle) -> bool:
    try:
        await engine.ask("progress")
    except Exception:
        return False
    return True


async def _all(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Waits for all of them, also where one fails; the results, or the first error."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def _each(ranks: Sequence[Handle], columns: Columns, method: str, *args: Any, **kwargs: Any) -> list[Any]:
    """One call a rank, each with its own column of the batch."""
    return await asyncio.gather(
        *(rank.call(method, column, *args, **kwargs) for rank, column in zip(ranks, columns, strict=True))
    )
