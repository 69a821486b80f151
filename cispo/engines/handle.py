"""Typed calls of a remote engine: one method for each that the driver uses, over a runtime's handle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cispo.runtime.actors import Handle
from cispo.types import Completion, OnUpdate, Sampling
from cispo.weights.publish import WeightMessage


@dataclass(frozen=True, slots=True, eq=False)
class EngineHandle:
    """A remote `ServedEngine`."""

    remote: Handle

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        limits: Sequence[int] | None = None,
        cache: str = "",
    ) -> list[Completion]:
        """One completion a prompt, in order; calls of another `cache` share no block of the prefix cache with it."""
        return await self.remote.call("generate", prompts, sampling, seed, limits, cache)

    async def progress(self) -> int:
        """Tokens sampled since the start. Raises the error of a failed step."""
        progress = await self.remote.ask("progress")
        assert isinstance(progress, int)
        return progress

    async def begin_update(self, on_update: OnUpdate) -> int:
        """Stops stepping for an update of the weights; the number of discarded tokens."""
        return await self.remote.call("begin_update", on_update)

    async def load_weights(self, path: str) -> None:
        """Copies a published file."""
        await self.remote.call("load_weights", path)

    async def receive_weights(self, message: WeightMessage) -> None:
        """Copies a whole version or one of its buckets."""
        await self.remote.call("receive_weights", message)

    async def finish_update(self, version: int) -> None:
        """Ends the update; the next token is sampled from the new weights."""
        await self.remote.call("finish_update", version)

    async def weight_checksums(self) -> dict[str, int]:
        """Checksum of each of the engine's parameters, by its name there; {} of an engine without them."""
        return await self.remote.call("weight_checksums")

    async def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        """Enters the broadcast group of learner and engines."""
        await self.remote.call("join_broadcast", address, first_rank, world)

    async def sleep(self) -> None:
        """Gives the device's memory back until `wake`."""
        await self.remote.call("sleep")

    async def wake(self) -> None:
        """Takes the device's memory again."""
        await self.remote.call("wake")

    def kill(self) -> None:
        """Ends the engine's process at once."""
        self.remote.kill()
