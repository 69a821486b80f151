"""Low-rank adapters in a policy (LoRA, arXiv 2106.09685): W x + s B A x with s = alpha / rank, W frozen.

    policy --adapt--> peft's layers in the place of linear ones --train--> A [rank, in], B [out, rank]
                      to_hf         W + s B A under the names on disk, computed when they are read -> engines
                      as_frozen     the policy at the start: the adapter off, or as it was then     -> KL reference
                      adapter       A and B under peft's names                                      -> checkpoints

Stacked experts take no adapter, nor does a weight that the policy reads as a matrix (the LM head).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cispo.errors import UserError
from cispo.policies.policy import Place, Policy, trunk_modules
from cispo.recipe.schema import Lora

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as AdaptedLinear

PREFIX = "base_model.model."
"""Of peft's names on disk."""
_NAME = "default"  # of the adapter inside peft's layers
_TARGETS = "policy.lora.targets"


@dataclass(slots=True)
class Adapter:
    """The adapter of a policy: its layers and the state that is no tensor of the policy."""

    config: LoraConfig
    layers: Mapping[str, AdaptedLinear]
    """Name of the module on disk -> layer."""
    renamed: Mapping[str, str]
    """Parameter of the policy without adapter -> the same parameter with it."""
    places: Sequence[tuple[str, Place]]
    """`Policy.disk_places`."""
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    """The reference's adapter, by peft's names; empty where it is off."""


class AdaptedPolicy(Policy):
    """A policy with an adapter: `adapt` makes a policy's class one of these.

    Parameters of the base are frozen; `load_hf` reads the base.
    """

    _adapter: Adapter

    def to_hf(self) -> Mapping[str, Tensor]:
        return MergedWeights(super().to_hf(), self.adapted)

    def place_of(self, name: str) -> Place | None:
        place = super().place_of(name)  # pyright: ignore[reportAbstractUsage]
        return None if place is None else self._moved(place)

    def disk_places(self) -> Iterator[tuple[str, Place]]:
        return ((name, self._moved(place)) for name, place in self._adapter.places)

    def _moved(self, place: Place) -> Place:
        return place._replace(parameter=self._adapter.renamed.get(place.parameter, place.parameter))

    @property
    def adapted(self) -> Mapping[str, AdaptedLinear]:
        """Name of a matrix on disk -> its layer."""
        return {f"{name}.weight": layer for name, layer in self._adapter.layers.items()}

    @property
    def adapter_config(self) -> LoraConfig:
        """peft's adapter_config.json."""
        return self._adapter.config

    def adapter(self) -> dict[str, Tensor]:
        """A and B of every layer under the names of peft's adapter_model.safetensors."""
        return {
            f"{PREFIX}{name}.lora_{letter}.weight": half.weight
            for name, layer in self._adapter.layers.items()
            for letter, half in zip("AB", _halves(layer), strict=True)
        }

    def new_adapter(self, seed: int) -> dict[str, Tensor]:
        """A as peft draws it, U(-1/sqrt(in), 1/sqrt(in)), from the seed alone; B zero: the policy is its base."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, weight in self.adapter().items():
            bound = 1 / math.sqrt(weight.shape[1])
            # Always drawn in float32: a bfloat16 adapter is the float32 one, rounded.
            drawn = torch.empty(weight.shape, device="cpu").uniform_(-bound, bound, generator=generator)
            tensors[name] = torch.zeros_like(drawn) if name.endswith("lora_B.weight") else drawn
        return tensors

    @torch.no_grad()
    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies whole A and B in, by peft's names. Raises UserError where a name or a shape is another adapter's."""
        own = self.adapter()
        _check_same(own, tensors)
        for name, weight in own.items():
            _local(weight).copy_(_part(tensors[name], weight))

    @torch.no_grad()
    def freeze(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes the policy with the adapter `tensors`, whole and by peft's names, the reference."""
        own = self.adapter()
        _check_same(own, tensors)
        off = not any(bool(values.any()) for name, values in tensors.items() if name.endswith("lora_B.weight"))
        frozen = {n: torch.empty_like(_local(w)).copy_(_part(tensors[n], w)) for n, w in own.items()}
        self._adapter.frozen = {} if off else frozen

    @contextmanager
    def as_frozen(self) -> Iterator[None]:
        """A block without gradient in which the policy is the reference."""
        if self._adapter.frozen:
            trained = {name: _local(weight).clone() for name, weight in self.adapter().items()}
            self._set(self._adapter.frozen)
            try:
                yield
            finally:
                self._set(trained)
            return
        layers = self._adapter.layers.values()
        # peft's `enable_adapters` sets requires_grad too, which a sharded parameter remembers from its first pass.
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.adapter().items():
            _local(weight).copy_(values[name])


def _local(weight: Tensor) -> Tensor:
    """The values on this rank: all, or the rows of a sharded weight."""
    local = getattr(weight, "to_local", None)
    return weight.detach() if local is None else weight.detach().to_local()  # type: ignore[attr-defined]


def _part(whole: Tensor, weight: Tensor) -> Tensor:
    """The rows of `whole` that are on this rank, cut as FSDP cuts `weight`."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return whole
    parts, rank = whole.chunk(mesh.size()), mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]


def whole(weight: Tensor) -> Tensor:
    """The weight without gradient; of a sharded one gathered, in which all ranks take part."""
    gather = getattr(weight, "full_tensor", None)
    return weight.detach() if gather is None else gather().detach()


class MergedWeights(Mapping[str, Tensor]):
    """Weights under their names on disk; an adapted matrix is W + s B A, computed anew whenever it is read.

    So no second copy of the policy exists, and a reader gets the weights of its moment.
    """

    def __init__(self, base: Mapping[str, Tensor], layers: Mapping[str, AdaptedLinear]) -> None:
        self._base, self._layers = base, layers

    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers.get(name)
        return self._base[name] if layer is None else merged_weight(layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


@torch.no_grad()
def merged_weight(layer: AdaptedLinear, weight: Tensor | None = None) -> Tensor:
    """W + s B A of one layer, in the dtype of W; `weight` is W where that is at hand, whole and as engines get it.

    All ranks take part where the layer is sharded.
    """
    weight = whole(layer.weight) if weight is None else weight
    a, b = (whole(half.weight).to(weight.dtype) for half in _halves(layer))
    return merged(weight, a, b, layer.scaling[_NAME])


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight [out, in] + scale b a with a [rank, in] and b [out, rank], computed in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)


def _halves(layer: AdaptedLinear) -> tuple[nn.Linear, nn.Linear]:
    """The maps A [in -> rank] and B [rank -> out]."""
    a, b = layer.lora_A[_NAME], layer.lora_B[_NAME]
    assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
    return a, b


def adapt(policy: Policy, lora: Lora, dtype: torch.dtype | None = None) -> AdaptedPolicy:
    """Freezes the policy and puts an adapter with undefined values into it, in place.

    `dtype` is the adapter's, the policy's without it. The policy may be on the meta device. Raises UserError where a
    target is no linear layer of it.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    chosen = adapted_layers(policy, lora)
    places, short = tuple(policy.disk_places()), _short_names(policy, chosen)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        target_modules=list(chosen),
        task_type="CAUSAL_LM",
    )
    # Without memory at first: peft would draw A from torch's random stream.
    inject_adapter_in_model(config, policy, _NAME, low_cpu_mem_usage=True)
    config.target_modules = short
    layers: dict[str, AdaptedLinear] = {}
    for path, name in chosen.items():
        layer = policy.get_submodule(path)
        assert isinstance(layer, Linear)
        for half in _halves(layer):
            half.weight = nn.Parameter(layer.weight.new_empty(half.weight.shape, dtype=dtype))
        layers[name] = layer
    renamed = {f"{path}.{kind}": f"{path}.base_layer.{kind}" for path in chosen for kind in ("weight", "bias")}
    policy.__class__ = type(f"Adapted{type(policy).__name__}", (AdaptedPolicy, type(policy)), {"__module__": __name__})
    assert isinstance(policy, AdaptedPolicy)
    policy._adapter = Adapter(config, layers, renamed, places)
    return policy


def adapted_layers(policy: Policy, lora: Lora) -> dict[str, str]:
    """Linear layers that get an adapter: module of the policy -> its name on disk. The meta device will do.

    Raises UserError where a target is none of them, with the reason.
    """
    linear = linear_layers(policy)
    if not linear:
        raise UserError("policy.lora: the policy has no linear layer that takes an adapter")
    if lora.targets is None:
        return linear
    chosen: set[str] = set()
    for target in lora.targets:
        found = {path for path, name in linear.items() if _ends(path, target) or _ends(name, target)}
        if reason := _refusal(policy, target, found):
            raise UserError(f"{_TARGETS}: {target!r} {reason}")
        chosen |= found
    return {path: name for path, name in linear.items() if path in chosen}


def linear_layers(policy: Policy) -> dict[str, str]:
    """Every linear layer that can take an adapter: module of the policy -> its name on disk.

    A checkpoint has its weight as one tensor, it is trained, and the policy calls it instead of reading its weight.
    Heads of multi-token prediction stay as they are.
    """
    whole = {place.parameter: name for name, place in policy.disk_places() if place == Place(place.parameter)}
    head, found = policy.lm_head_weight, {}
    trunk = {*trunk_modules(policy)}
    for path, module in policy.named_modules():
        if module not in trunk:
            continue
        name = whole.get(f"{path}.weight", "")
        if not isinstance(module, nn.Linear) or module.weight is head or not module.weight.requires_grad:
            continue
        if name.endswith(".weight") and not _reads(policy, path):
            found[path] = name.removesuffix(".weight")
    return found


def _reads(policy: Policy, path: str) -> bool:
    """Whether the policy reads a module's weight as a matrix, so that an adapter would have no effect."""
    return path.rpartition(".")[2] in policy.read_as_matrices


def _refusal(policy: Policy, target: str, found: set[str]) -> str | None:
    """The reason why `target` is none, or more than `found`, in the words of an error; None where there is none."""
    weights = policy.named_weights()
    for name, place in policy.disk_places():
        places = (name, name.removesuffix(".weight"), place.parameter, place.parameter.rpartition(".")[0])
        if any(_ends(each, target) for each in places) and weights[place.parameter].dim() > 2:
            return "names stacked experts, which stay frozen: name the linear layers beside them"
    if found:
        return None
    modules = {path: module for path, module in policy.named_modules() if _ends(path, target)}
    if any(_reads(policy, path) for path in modules):
        return "is read as a matrix and not called as a layer, so it stays frozen"
    if any(isinstance(module, nn.Linear) and not module.weight.requires_grad for module in modules.values()):
        return "has no gradient in this policy"
    if any(getattr(module, "weight", None) is policy.lm_head_weight for module in modules.values()):
        return "is the output head or the embedding, which stay frozen"
    if modules or any(_ends(name, target) for name in weights):
        return "is no linear layer"
    kinds = sorted({path.rpartition(".")[2] for path in linear_layers(policy)})
    return f"names nothing in this policy; its linear layers are {', '.join(kinds)}"


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _short_names(policy: Policy, chosen: Mapping[str, str]) -> list[str]:
    """`target_modules` of adapter_config.json: last parts of names where they mean no other layer, else whole names."""
    short = {name.rpartition(".")[2] for name in chosen.values()}
    trunk = {*trunk_modules(policy)}
    others = {path for path, module in policy.named_modules() if hasattr(module, "weight") and module in trunk}
    others -= {*chosen}
    return sorted(short if not any(path.rpartition(".")[2] in short for path in others) else chosen.values())


def _check_same(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError naming the first difference in names or shapes."""
    for name in sorted(own.keys() ^ tensors.keys()):
        raise UserError(f"the adapter {'lacks' if name in own else 'has also'} {name}: is policy.lora another one?")
    for name, weight in own.items():
        if weight.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)}, policy.lora makes it {list(weight.shape)}"
            raise UserError(f"the adapter's {name} has shape {shapes}")


def adapter_size(policy: Policy, lora: Lora) -> int:
    """Numbers in the adapter: rank x (in + out) a layer. The policy may be on the meta device."""
    layers = (policy.get_submodule(path) for path in adapted_layers(policy, lora))
    return sum(lora.rank * sum(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear))
