"""Engines turn prompts into completions, token in, token out, with the log-probability of every sampled token.

    make_engine(...) -> ServedEngine         what the rest of the project calls: overlapping calls, updates in flight
                          Engine             what it drives step by step: VLLMEngine or TorchEngine

`VLLMEngine` runs vLLM inside this process; `TorchEngine` the learner's policy with a cache, for small ones on a CPU.
When a completion ends: `drafts`. How weights arrive: `weight_sync`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cispo.engines.drafts import Draft
from cispo.errors import UserError
from cispo.policies.loading import weight_files
from cispo.weights.publish import WeightMessage

if TYPE_CHECKING:
    pass


class Engine(Protocol):
    """Extends drafts by a step at a time, each under the weights it has then."""

    @property
    def max_context(self) -> int:
        """The most tokens of prompt and completion together."""
        ...

    @property
    def max_sequences(self) -> int:
        """The most drafts that it has at a time."""
        ...

    @property
    def sampled(self) -> int:
        """Tokens since the start, those of dropped drafts included."""
        ...

    def submit(self, drafts: Sequence[Draft]) -> None:
        """Takes empty drafts; steps extend them until each has a reason to end."""
        ...

    def step(self) -> list[Draft]:
        """Samples a token for its drafts; returns those that are complete."""
        ...

    def settle(self) -> list[Draft]:
        """Waits for steps that are still on a device, so that every draft holds all that was sampled for it; returns
        those that are complete."""
        ...

    def drop(self, drafts: Sequence[Draft]) -> None:
        """Forgets drafts that are not complete."""
        ...

    def receive_weights(self, message: WeightMessage) -> None:
        """Takes a whole version or one of its buckets; `finish_update` follows the last. Nothing may be on a device."""
        ...

    def finish_update(self, *, recompute: bool) -> None:
        """Ends an update. With `recompute` what was computed before it is dropped and computed again where a draft
        needs it; without, running drafts keep it, and only they.

        Raises AssertionError where a parameter has not arrived.
        """
        ...

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        """Enters the group over which the learner sends weights; its workers take the ranks from the first."""
        ...

    def sleep(self) -> None:
        """Gives the device's memory back until `wake`; an engine on a CPU has none."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None:
        """Frees what the engine holds; nothing works afterwards."""
        ...


def check_model(model: str, max_context: int) -> None:
    """Raises UserError where `model` is no policy's folder, has no safetensors, or has fewer positions."""
    config = Path(model) / "config.json"
    if not config.is_file():
        raise UserError(f"{model} holds no policy: config.json is missing")
    positions = json.loads(config.read_text()).get("max_position_embeddings")
    if positions and max_context > positions:
        raise UserError(f"max_context {max_context} is above the {positions} positions that the policy in {model} has")
    weight_files(Path(model))
