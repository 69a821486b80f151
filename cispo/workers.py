"""The learner ranks, the critic's and the engines, with the verbs of the training loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cispo.actors import Handle
from cispo.algorithms.objective import Objective
from cispo.learner.critic import CriticResult
from cispo.learner.learner import UpdateResult
from cispo.seeds import seed_of
from cispo.types import Completion, MicroBatch, Sampling
from cispo.weight_buckets import Transport, merged

Columns = Sequence[Sequence[MicroBatch]]
"""[ranks][micro-batches] of one pass or update."""


@dataclass(slots=True, kw_only=True)
class Workers:
    """The learner ranks, the critic's and the engines, with the verbs of the training loop."""

    learners: list[Handle]
    critics: list[Handle]
    """As many ranks as the learner, or none."""
    engines: list[Handle]
    weights_folder: str
    group_size: int
    transport: Transport | Literal["shared_memory"] = "shared_memory"
    """How weights reach the engines."""
    verify: bool = False
    """Whether engines compare a checksum of each bucket."""
    sleeps: bool = False
    """Whether engines give their memory back while learners work."""
    tensor_parallel: int = 1
    asleep: bool = False
    joined: bool = False
    """Whether learner and engines have met in a broadcast group."""

    async def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Shares the prompts over the engines; a group stays together, where prefix caching can share its prompt."""
        groups = math.ceil(len(prompts) / self.group_size)
        share = math.ceil(groups / len(self.engines)) * self.group_size
        parts = [prompts[i : i + share] for i in range(0, len(prompts), share)]
        answers = await asyncio.gather(
            *(
                engine.call("generate", part, sampling, seed_of(seed, number))
                for number, (engine, part) in enumerate(zip(self.engines, parts, strict=False))
            )
        )
        return [completion for answer in answers for completion in answer]

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

    async def reset_optimizer(self) -> None:
        await asyncio.gather(*(learner.call("reset_optimizer") for learner in self.learners))

    async def rest_engines(self) -> None:
        """Between sampling and learning: engines that sleep give their memory back."""
        if self.sleeps and not self.asleep:
            await asyncio.gather(*(engine.call("sleep") for engine in self.engines))
            self.asleep = True

    async def sync_weights(self, version: int) -> None:
        """Puts the learner's weights into every engine; returns when they sample with them."""
        if self.asleep:
            await asyncio.gather(*(learner.call("release_memory") for learner in self.learners + self.critics))
            await asyncio.gather(*(engine.call("wake") for engine in self.engines))
            self.asleep = False
        if self.transport == "shared_memory":
            path = await self.publish(version)
            await asyncio.gather(*(engine.call("update_weights", path, version) for engine in self.engines))
        else:
            await self._send_buckets(self.transport)
            await asyncio.gather(*(engine.call("finish_update", version) for engine in self.engines))

    async def _send_buckets(self, transport: Transport) -> None:
        """One bucket after another: staged, taken by every engine, and only then overwritten."""
        if transport == "broadcast" and not self.joined:
            await self._join()
        # By broadcast rank 0 sends; otherwise each rank offers its own GPU's copy to the engines there.
        senders = self.learners[:1] if transport == "broadcast" else self.learners
        for number in range(await self.learners[0].call("num_buckets")):
            staged = await asyncio.gather(
                *(sender.call("stage_bucket", number, transport, check=self.verify) for sender in senders)
            )
            receive = [engine.call("receive_weights", merged(staged)) for engine in self.engines]
            if transport == "broadcast":
                receive.append(self.learners[0].call("broadcast_bucket", number))
            await asyncio.gather(*receive)

    async def _join(self) -> None:
        world = 1 + len(self.engines) * self.tensor_parallel
        address = await self.learners[0].call("open_weight_group", world)
        await asyncio.gather(
            self.learners[0].call("join_weight_group"),
            *(
                engine.call("join_broadcast", address, 1 + number * self.tensor_parallel, world)
                for number, engine in enumerate(self.engines)
            ),
        )
        self.joined = True

    async def publish(self, version: int) -> str:
        return await self.learners[0].call("publish", self.weights_folder, version)

    async def start_critic(self, version: int) -> None:
        """Gives the critic the policy's weights to start from."""
        path = await self.publish(version)
        await asyncio.gather(*(critic.call("load_backbone", path) for critic in self.critics))

    async def save(self, folder: Path) -> None:
        await self.learners[0].call("save", str(folder.absolute()))


async def _each(ranks: Sequence[Handle], columns: Columns, method: str, *args: Any, **kwargs: Any) -> list[Any]:
    """One call a rank, each with its own column of the batch."""
    return await asyncio.gather(
        *(rank.call(method, column, *args, **kwargs) for rank, column in zip(ranks, columns, strict=True))
    )
