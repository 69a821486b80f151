"""Names of the family's weights: on disk in three namings, in the policy, and in vLLM's model."""

from __future__ import annotations

import re
from typing import Literal

from cispo.policies.policy import Place

_EXPERT = re.compile(r"(layers\.\d+\.mlp\.experts)\.(\d+)\.(w[123])\.weight")
_BUFFER = re.compile(r".*\.(slope_rate|query_decay|key_decay|diagonal_decay|inv_freq)")
_SOFTMAX_PROJECTION = re.compile(r"(.*\.self_attn)\.([qkv])_proj\.weight")
_LIGHTNING_PROJECTION = re.compile(r"(.*\.self_attn)\.(qkv_proj|output_gate)\.weight")

_EXPERT_WEIGHTS: dict[str, tuple[str, Literal["gate", "up"] | None]] = {
    "w1": ("gate_up_proj", "gate"),
    "w3": ("gate_up_proj", "up"),
    "w2": ("down_proj", None),
}


def place_of(name: str) -> Place | None:
    """Destination of the checkpoint's tensor `name`, in any of the three namings; None for buffers.

    Buffers are recomputed from the config: those of a checkpoint are rounded to its dtype.
    """
    if _BUFFER.fullmatch(name):
        return None
    name = name.removeprefix("model.").replace(".block_sparse_moe.", ".mlp.")
    if match := _EXPERT.fullmatch(name):
        experts, expert, weight = match.groups()
        fused, half = _EXPERT_WEIGHTS[weight]
        return Place(f"{experts}.{fused}", int(expert), half)
    return Place(name)


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


def vllm_target(place: Place) -> tuple[str, tuple[str | int | Place, ...]]:
    """The parameter of vLLM's model that corresponds to a place of the policy, and further arguments of its loader.

    Those are the letter of the projection where q, k and v are one parameter, the number of the part where a lightning
    layer's gate is one with them, the place for one expert's part, and none for a whole parameter.
    """
    name = place.parameter if place.parameter.startswith("lm_head.") else f"model.{place.parameter}"
    if match := _SOFTMAX_PROJECTION.fullmatch(name):
        return f"{match[1]}.qkv_proj.weight", (match[2],)
    if match := _LIGHTNING_PROJECTION.fullmatch(name):
        return f"{match[1]}.qkv_gate_proj.weight", (("qkv_proj", "output_gate").index(match[2]),)
    return name, () if place.expert is None else (place,)
