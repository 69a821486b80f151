"""Engines turn prompts into completions, token in, token out, with the log-probability of every sampled token.

    Engine.generate(prompts, sampling, seed) -> [Completion]        one a prompt, in order
    Engine.update_weights(path, version)                            what `publish_weights` wrote

`VLLMEngine` runs vLLM inside this process; `TorchEngine` the learner's policy with a cache, for small ones on a CPU.
When a completion ends: `drafts`. How weights arrive: `weight_sync`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from cispo.types import Completion, Sampling, UserError


class Engine(Protocol):
    """Samples completions from one version of the policy."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, limits: Sequence[int] | None = None
    ) -> list[Completion]:
        """Samples one completion a prompt, in order; the same batch and seed give the same tokens.

        `limits` is the most tokens of each completion, in place of the one number in `sampling`. Raises UserError on
        a prompt that leaves no room for a token, naming its index.
        """
        ...

    def update_weights(self, path: str, version: int) -> None:
        """Replaces the weights by a published version."""
        ...

    def sleep(self) -> None:
        """Gives the device's memory back until `wake`; an engine on a CPU has none."""
        ...

    def wake(self) -> None: ...

    @property
    def version(self) -> int:
        """Of the weights that the next completion is sampled from; 0 is the model folder's."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; nothing works afterwards."""
        ...


def check_context(model: str, max_context: int) -> None:
    """Raises UserError where `model` is no policy's folder or the policy has fewer positions."""
    config = Path(model) / "config.json"
    if not config.is_file():
        raise UserError(f"{model} holds no policy: config.json is missing")
    positions = json.loads(config.read_text()).get("max_position_embeddings")
    if positions and max_context > positions:
        raise UserError(f"max_context {max_context} is above the {positions} positions that the policy in {model} has")


def make_engine(
    kind: Literal["vllm", "torch"],
    model: str,
    *,
    dtype: str,
    max_context: int,
    max_sequences: int,
    tensor_parallel: int,
    memory: float,
    sleeps: bool,
    engine_args: Mapping[str, Any],
) -> Engine:
    """The engine that a recipe's rollout.engine names."""
    if kind == "torch":
        from cispo.rollout.torch_engine import TorchEngine

        return TorchEngine(model, dtype=dtype, max_context=max_context, max_sequences=max_sequences)
    from cispo.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(
        model,
        dtype=dtype,
        max_context=max_context,
        max_sequences=max_sequences,
        tensor_parallel=tensor_parallel,
        seed=0,  # every call of generate seeds for itself
        memory=memory,
        sleeps=sleeps,
        engine_args=engine_args,
    )
