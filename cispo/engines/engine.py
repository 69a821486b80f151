"""Engines turn prompts into completions, token in, token out, with the log-probability of every sampled token.

    EngineHandle -> ServedEngine -> Engine: VLLMEngine | TorchEngine
    the driver      overlapping     step by step
                    calls, updates

`VLLMEngine` runs vLLM inside this process; `TorchEngine` runs the learner's policy with a cache, for small policies.
`drafts` says when a completion ends, `serving.make_engine` builds an engine for a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from cispo.engines.drafts import Draft
from cispo.errors import UserError
from cispo.files import read_json
from cispo.policies.loading import max_positions_of, weight_files
from cispo.weights.publish import WeightMessage


class Engine(Protocol):
    """Extends drafts step by step; a step samples under the weights of its moment."""

    @property
    def max_context(self) -> int:
        """Maximum number of tokens of prompt and completion together."""
        ...

    @property
    def max_sequences(self) -> int:
        """Maximum number of drafts at a time."""
        ...

    @property
    def sampled(self) -> int:
        """Tokens sampled since the start, those of dropped drafts included."""
        ...

    def submit(self, drafts: Sequence[Draft]) -> None:
        """Takes drafts without tokens; steps extend each until it has a reason to end."""
        ...

    def step(self) -> list[Draft]:
        """Samples a token for its drafts; returns those that are complete."""
        ...

    def settle(self) -> list[Draft]:
        """Waits for steps in flight on a device, until drafts hold all their tokens; returns the complete ones."""
        ...

    def drop(self, drafts: Sequence[Draft]) -> None:
        """Forgets drafts that are not complete."""
        ...

    def receive_weights(self, message: WeightMessage) -> None:
        """Loads a whole version or one of its buckets; `finish_update` follows the last. No step may be in flight."""
        ...

    def finish_update(self, *, recompute: bool) -> None:
        """Ends an update. With `recompute` all cached keys, values and states are dropped and computed again for
        running drafts; without, running drafts keep theirs, and later drafts do not share them.

        Raises AssertionError where a parameter has not arrived.
        """
        ...

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        """Enters the group over which the learner sends weights; the engine's workers take the ranks from the first."""
        ...

    def sleep(self) -> None:
        """Gives the device's memory back until `wake`; does nothing on a CPU."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None:
        """Frees the engine's memory and processes; no other method works afterwards."""
        ...


@runtime_checkable
class Checked(Protocol):
    """An engine whose weights can be compared with the learner's."""

    def weight_checksums(self) -> dict[str, int]:
        """Checksum of each parameter under its own name, in the engine's number format."""
        ...


def check_model(model: str, max_context: int) -> None:
    """Raises UserError where `model` is no policy's folder, lacks safetensors, or has under `max_context` positions."""
    config = Path(model) / "config.json"
    if not config.is_file():
        raise UserError(f"{model} holds no policy: config.json is missing")
    positions = max_positions_of(read_json(config))
    if positions is not None and max_context > positions:
        raise UserError(
            f"rollout.max_context {max_context} is above the {positions} positions that the policy in {model} has"
        )
    weight_files(Path(model))
