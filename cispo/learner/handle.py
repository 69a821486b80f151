"""Typed calls of remote learner and critic ranks: one method for each that the driver uses, over a runtime's handle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cispo.algorithms.objective import Objective
from cispo.learner.critic import CriticResult
from cispo.learner.learner import UpdateResult
from cispo.runtime.actors import Handle
from cispo.types import MicroBatch
from cispo.weights.buckets import BucketMessage, Transport


@dataclass(frozen=True, slots=True)
class RankHandle:
    """The calls that learner and critic ranks share."""

    remote: Handle

    async def start_save(self, folder: str, *, full: bool = True) -> None:
        """Starts writing the rank's state into a checkpoint's folder, without the optimizer if that is not `full`."""
        await self.remote.call("start_save", folder, full=full)

    async def saved(self, *, wait: bool) -> bool:
        """Whether the files of `start_save` are complete. Raises RunError where the disk refused them."""
        return await self.remote.call("saved", wait=wait)

    async def restore(self, checkpoint: str, *, full: bool = True) -> None:
        """Reads the rank's state from a checkpoint, without the optimizer if that is not `full`."""
        await self.remote.call("restore", checkpoint, full=full)

    async def waiting_in(self) -> str:
        """The step with collectives in which the rank is, answered while it is in it; "" without one."""
        return str(await self.remote.look("waiting_in"))

    async def release_memory(self) -> None:
        """Returns cached memory to the device."""
        await self.remote.call("release_memory")


class LearnerHandle(RankHandle):
    """A remote `Learner`."""

    __slots__ = ()

    async def update(self, micro_batches: Sequence[MicroBatch], objective: Objective, *, lr: float) -> UpdateResult:
        """One optimizer step, which every rank must take."""
        return await self.remote.call("update", micro_batches, objective, lr=lr)

    async def logprobs(self, micro_batches: Sequence[MicroBatch], *, reference: bool = False) -> list[Tensor]:
        """Log-probability of every trained token, [T] a micro-batch."""
        return await self.remote.call("logprobs", micro_batches, reference=reference)

    async def freeze_reference(self) -> None:
        """Copies the current policy as the reference."""
        await self.remote.call("freeze_reference")

    async def load_reference(self, folder: str) -> None:
        """Reads the reference policy from a folder."""
        await self.remote.call("load_reference", folder)

    async def reset_optimizer(self) -> None:
        """Drops the optimizer's moments."""
        await self.remote.call("reset_optimizer")

    async def publish(self, folder: str, version: int) -> str:
        """Writes the weights to a file that engines read; its path."""
        return await self.remote.call("publish", folder, version)

    async def num_buckets(self) -> int:
        """Buckets of one transfer of the weights."""
        return await self.remote.call("num_buckets")

    async def stage_bucket(self, number: int, transport: Transport, *, check: bool) -> BucketMessage:
        """Fills the buffer with a bucket."""
        return await self.remote.call("stage_bucket", number, transport, check=check)

    async def open_weight_group(self, world: int) -> str:
        """Opens the process group of learner and engines; its address."""
        return await self.remote.call("open_weight_group", world)

    async def join_weight_group(self) -> None:
        """Waits in the group until all engines are there."""
        await self.remote.call("join_weight_group")

    async def broadcast_bucket(self, number: int) -> None:
        """Sends the staged bucket to all engines."""
        await self.remote.call("broadcast_bucket", number)

    async def save(self, folder: str) -> None:
        """Writes the policy in Hugging Face form."""
        await self.remote.call("save", folder)


class CriticHandle(RankHandle):
    """A remote `Critic`."""

    __slots__ = ()

    async def update(self, micro_batches: Sequence[MicroBatch], *, lr: float) -> CriticResult:
        """One optimizer step, which every rank must take."""
        return await self.remote.call("update", micro_batches, lr=lr)

    async def values(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The critic's value before every trained token, [T] a micro-batch."""
        return await self.remote.call("values", micro_batches)

    async def load_backbone(self, path: str) -> None:
        """Takes published weights as the backbone."""
        await self.remote.call("load_backbone", path)
