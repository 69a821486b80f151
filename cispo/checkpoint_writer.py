"""A run's checkpoints, written while it goes on: learner and critic write their tensors, the driver its own state.

begin: copies of everything ... steps go on ... settle: all is on the disk, the draft becomes the checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cispo.checkpoint import CheckpointFolder, save_tensors
from cispo.files import write_json
from cispo.workers import Workers


@dataclass(slots=True, kw_only=True)
class CheckpointWriter:
    """At most one checkpoint is being written at a time."""

    folder: CheckpointFolder
    workers: Workers
    save_tokenizer: Callable[[Path], object]
    saved: int = -1
    """The step of the last checkpoint that was begun, or that the run goes on from."""
    _pending: dict[str, Any] | None = None
    """What completes the one that is being written."""

    async def begin(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        facts: Mapping[str, Any],
        score: float | None,
    ) -> None:
        """Copies policy, critic and optimizers as they are; `state` and `tensors` are the driver's.

        Raises RunError where the disk refuses.
        """
        await self.settle(wait=True)
        with self.folder.writing() as draft:
            await self.workers.start_save(draft)
            self.save_tokenizer(draft)
            save_tensors(tensors, draft / "training" / "driver.safetensors")
            write_json(draft / "training" / "driver.json", state)
        self._pending = {"step": step, "facts": facts, "score": score}
        self.saved = step

    async def settle(self, *, wait: bool) -> None:
        """Completes the checkpoint that was begun once it is on the disk. Raises RunError where the disk refused."""
        if self._pending is None:
            return
        with self.folder.completing():
            if await self.workers.saved(wait=wait):
                self.folder.finish(**self._pending)
                self._pending = None
