"""Names of a hybrid policy's weights: on disk, and in the policy.

    model.layers.3.block_sparse_moe.experts.5.w1.weight  <->  Place(layers.3.mlp.experts.gate_up_proj, 5, gate)

Parameters have transformers' module names without the prefix `model.`. A family's `Names` says the rest: the weights of
an expert, modules that are called otherwise on disk, tensors that are skipped or kept aside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cispo.policies.policy import Place

ExpertWeights: TypeAlias = Mapping[str, tuple[str, Literal["gate", "up"] | None]]
"""An expert's weights on disk: the fused parameter of each, and the half of it."""

PROJECTIONS: ExpertWeights = {
    "gate_proj": ("gate_up_proj", "gate"),
    "up_proj": ("gate_up_proj", "up"),
    "down_proj": ("down_proj", None),
}
W123: ExpertWeights = {
    "w1": ("gate_up_proj", "gate"),
    "w3": ("gate_up_proj", "up"),
    "w2": ("down_proj", None),
}

_EXPERT = re.compile(r"(layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
_FUSED = re.compile(r"(layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_LAYER = re.compile(r"layers\.(\d+)\.")
_HEAD = re.compile(r"predictors\.(\d+)\.")
_HEAD_WEIGHTS = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "shared_head.norm.weight": "norm.weight",
}
"""Weights of a head beside its layer's: on disk -> the policy's."""
_SECOND_NAMES = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
"""Of embedding and LM head, inside a head on disk: read past, and written for readers that ask for them (vLLM)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """One family's naming. Patterns are regular expressions over the names on disk, matched from their start."""

    experts: ExpertWeights = field(default_factory=lambda: PROJECTIONS)
    moe: str = "mlp"
    """The module of a layer's mixture of experts on disk; a dense MLP is "mlp"."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of names: the policy's -> the ones on disk."""
    read_as: Mapping[str, str] = field(default_factory=dict)
    """Further parts of names on disk, as in older checkpoints -> the policy's."""
    prefixes: tuple[str, ...] = ("model.",)
    """Beginnings of names on disk that the policy's lack; the first is written, except before lm_head."""
    skipped: str | None = r".*\.inv_freq$"
    """Tensors that are neither loaded nor kept."""
    kept: str | None = None
    """Tensors that are not run, but written back: `Policy.kept`."""
    first_head: int | None = None
    """Number of the layer that is the first head of multi-token prediction on disk; None where none is run."""

    def keeps(self, name: str) -> bool:
        return self.kept is not None and re.match(self.kept, name) is not None

    def place_of(self, name: str) -> Place | None:
        """Destination of the tensor `name` of a checkpoint; None where it is not copied."""
        if self.skipped is not None and re.match(self.skipped, name):
            return None
        for prefix in sorted(self.prefixes, key=len, reverse=True):
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        if self.moe != "mlp":
            name = name.replace(f".{self.moe}.", ".mlp.")
        for ours, theirs in self.renamed.items():
            name = name.replace(theirs, ours)
        for theirs, ours in self.read_as.items():
            name = name.replace(theirs, ours)
        match = _EXPERT.fullmatch(name)
        if match and match[3] in self.experts:
            fused, half = self.experts[match[3]]
            return self._in_head(Place(f"{match[1]}.{fused}", int(match[2]), half))
        return self._in_head(Place(name))

    def _in_head(self, place: Place) -> Place | None:
        """The place among the heads' parameters of one in a layer behind the trunk's; None for a second name."""
        layer = _LAYER.match(place.parameter)
        if self.first_head is None or layer is None or int(layer[1]) < self.first_head:
            return place
        weight = place.parameter[layer.end() :]
        if weight in _SECOND_NAMES:
            return None
        own = _HEAD_WEIGHTS.get(weight, f"layer.{weight}")
        return place._replace(parameter=f"predictors.{int(layer[1]) - self.first_head}.{own}")

    def _of_head(self, name: str) -> str:
        """A head's parameter as one of a layer behind the trunk's; other names as they are."""
        head = _HEAD.match(name)
        if head is None or self.first_head is None:
            return name
        own = name[head.end() :]
        weight = next((theirs for theirs, ours in _HEAD_WEIGHTS.items() if ours == own), own.removeprefix("layer."))
        return f"layers.{int(head[1]) + self.first_head}.{weight}"

    def second_names(self, heads: int, *, tied: bool) -> dict[str, list[str]]:
        """First name on disk of embedding and LM head -> their second names in each of the heads."""
        found: dict[str, list[str]] = {}
        for number in range(heads):
            assert self.first_head is not None
            for inside, parameter in _SECOND_NAMES.items():
                first = self._on_disk("embed_tokens.weight" if tied else parameter, False)
                second = self._on_disk(f"layers.{self.first_head + number}.{inside}", False)
                found.setdefault(first, []).append(second)
        return found

    def disk_places(self, name: str, experts_of: Mapping[int, int]) -> Iterator[tuple[str, Place]]:
        """The names under which the parameter or buffer `name` is written; `experts_of` each MoE layer, by its number
        on disk.

        The inverse of `place_of`.
        """
        ours, name = name, self._of_head(name)
        layer = _LAYER.match(name)
        experts = experts_of.get(int(layer[1])) if layer else None
        if (fused := _FUSED.fullmatch(name)) and experts:
            for expert in range(experts):
                for weight, (parameter, half) in self.experts.items():
                    if parameter == fused[2]:
                        yield self._on_disk(f"{fused[1]}.{expert}.{weight}.weight", True), Place(ours, expert, half)
        else:
            yield self._on_disk(name, experts is not None), Place(ours)

    def _on_disk(self, name: str, in_moe_layer: bool) -> str:
        for ours, theirs in self.renamed.items():
            name = name.replace(ours, theirs)
        if in_moe_layer and self.moe != "mlp":
            name = name.replace(".mlp.", f".{self.moe}.")
        return name if name.startswith("lm_head.") else self.prefixes[0] + name


def layers_after(layers: int, more: int) -> str | None:
    """A pattern of the names of `more` layers behind the first `layers`: multi-token prediction; None without any."""
    numbers = "|".join(str(layers + number) for number in range(more))
    return rf"model\.layers\.({numbers})\." if numbers else None
