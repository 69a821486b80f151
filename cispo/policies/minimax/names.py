"""Names of the family's weights: on disk in three namings, in the policy, and in vLLM's model."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """Where a tensor of a checkpoint lives: a parameter, or one expert's share of a fused one."""

    parameter: str
    expert: int | None = None
    half: Literal["gate", "up"] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` that this place is."""
        view = parameter if self.expert is None else parameter[self.expert]
        if self.half is None:
            return view
        gate, up = view.chunk(2)
        return gate if self.half == "gate" else up


_EXPERT = re.compile(r"(layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")


_BUFFER = re.compile(r".*\.(slope_rate|query_decay|key_decay|diagonal_decay|inv_freq)")


_EXPERT_WEIGHTS: dict[str, tuple[str, Literal["gate", "up"] | None]] = {
    "w1": ("gate_up_proj", "gate"),
    "w3": ("gate_up_proj", "up"),
    "w2": ("down_proj", None),
}


def place_of(name: str) -> Place | None:
    """Where the checkpoint's tensor `name` goes, in any of the three namings; None for buffers that are recomputed."""
    if _BUFFER.fullmatch(name):
        return None
    name = name.removeprefix("model.")
    if match := _EXPERT.fullmatch(name):
        layer, expert, weight = match.groups()
        fused, half = _EXPERT_WEIGHTS[weight]
        return Place(f"{layer}.mlp.experts.{fused}", int(expert), half)
    return Place(name.replace(".block_sparse_moe.", ".mlp."))


def disk_names(parameter: str, num_experts: int) -> list[tuple[str, Place]]:
    """The inverse of `place_of`: the names under which a parameter is written, with the part that each holds."""
    prefix = "" if parameter.startswith("lm_head.") else "model."
    layer, _, fused = parameter.partition(".mlp.experts.")
    if not fused:
        return [(prefix + parameter.replace(".mlp.", ".block_sparse_moe."), Place(parameter))]
    return [
        (f"{prefix}{layer}.block_sparse_moe.experts.{expert}.{weight}.weight", Place(parameter, expert, half))
        for expert in range(num_experts)
        for weight, (name, half) in _EXPERT_WEIGHTS.items()
        if name == fused
    ]


_VLLM_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(w[123])\.weight")


_FUSED = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}


_SOFTMAX_PROJECTION = re.compile(r"(.*\.self_attn)\.([qkv])_proj\.weight")


def checkpoint_target(name: str) -> tuple[str, tuple[str | int, ...]]:
    """Where a checkpoint's tensor goes: the parameter's name here, and which part of it (empty: the whole).

    Takes the original names, Hugging Face's on disk (experts one by one) and in memory (experts fused).
    """
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if match := _VLLM_EXPERT.fullmatch(name):
        experts, index, matrix = match.groups()
        return f"{experts}.{_FUSED[matrix]}", (matrix, int(index))
    if match := _SOFTMAX_PROJECTION.fullmatch(name):
        return f"{match[1]}.qkv_proj.weight", (match[2],)
    return name, ()
