"""Low-rank adapters of a learner or critic rank: their start, their way to the engines and into checkpoints.

folder --start_adapter--> A, B on every rank --AdapterSource--> buckets of merged weights --> engines
                                             --copy_adapter---> adapter folder
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cispo.errors import UserError
from cispo.files import disk_errors, load_tensors, save_tensors
from cispo.policies.adapter_files import Base, adapter_in, base_of, write_adapter
from cispo.policies.lora import AdaptedPolicy, merged_weight, whole
from cispo.policies.policy import HFConfig, Policy
from cispo.recipe.schema import Lora
from cispo.weights.buckets import Slot, Source

if TYPE_CHECKING:
    pass


_PUBLISHED = "adapter.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """The recipe's adapter, and the seed of its first values."""

    lora: Lora
    seed: int


def base_folder(folder: str) -> str:
    """The folder of a policy's own weights: itself, or that of the policy which its adapter belongs to."""
    found = adapter_in(folder)
    return folder if found is None else str(found.base_folder())


def start_adapter(policy: Policy, folder: str, adapters: Adapters) -> None:
    """Gives the adapter of a policy its first values: those in the folder, where it holds an adapter, or new ones."""
    assert isinstance(policy, AdaptedPolicy), "the policy has no adapter"
    found = adapter_in(folder)
    policy.load_adapter(policy.new_adapter(adapters.seed) if found is None else found.tensors())


def load_published(policy: AdaptedPolicy, weights: str) -> None:
    """Takes the adapter that was published with a file of weights."""
    policy.load_adapter(load_tensors(Path(weights).with_name(_PUBLISHED)))


def whole_adapter(policy: AdaptedPolicy) -> dict[str, Tensor]:
    """A and B by peft's names, gathered where they are sharded, in which all ranks take part."""
    return {name: whole(weight) for name, weight in policy.adapter().items()}


def freeze_adapter(policy: AdaptedPolicy, folder: str | None = None) -> None:
    """Makes the policy of this moment the reference, or that of an adapter's folder."""
    found = None if folder is None else adapter_in(folder)
    if folder is not None and found is None:
        raise UserError(f"{folder} holds no adapter")
    policy.freeze(whole_adapter(policy) if found is None else found.tensors())


class AdapterSource(Source):
    """Weights of which the adapted matrices are merged in the bucket itself; another source has the base's."""

    def __init__(self, policy: AdaptedPolicy, base: Source) -> None:
        self._base, self._layers = base, policy.adapted

    @property
    def device(self) -> torch.device:
        return self._base.device

    @property
    def shapes(self) -> Mapping[str, Tensor]:
        return self._base.shapes

    def fill(self, slots: Sequence[Slot], buffer: Tensor) -> None:
        """Writes the slots' weights, merged; every rank must call it with the same slots."""
        self._base.fill(slots, buffer)
        for slot in slots:
            if slot.name in self._layers:
                weight = slot.of(buffer)
                weight.copy_(merged_weight(self._layers[slot.name], weight))


class AdapterExport:
    """Exports of a policy's adapter."""

    def __init__(self, policy: AdaptedPolicy, folder: str, dtype: torch.dtype) -> None:
        """`folder` is the one that the policy was loaded from; adapters are written in `dtype`."""
        self.policy, self.dtype = policy, dtype
        found = adapter_in(folder)
        self._folder = folder if found is None else str(found.base_folder())
        self._base = None if found is None else found.own_base()

    def copy(self, config: HFConfig, *, write: bool) -> Callable[[Path], None]:
        """Copies the adapter to the host; the result writes it into a folder, or does nothing without `write`.

        Every rank of a sharded policy must call it. The writer raises RunError where the disk refuses.
        """
        tensors = {name: w.to("cpu", self.dtype, copy=True) for name, w in whole_adapter(self.policy).items()}

        def into(folder: Path) -> None:
            if write:
                with disk_errors(folder):
                    write_adapter(tensors, self.policy.adapter_config, config, self.base(), folder)

        return into

    def publish(self, folder: str, *, write: bool) -> None:
        """Writes the adapter beside published weights, for a critic that starts from it; a new one replaces it."""
        tensors = {name: w.to("cpu", self.dtype).contiguous() for name, w in whole_adapter(self.policy).items()}
        if write:
            save_tensors(tensors, Path(folder) / _PUBLISHED)

    def base(self) -> Base:
        """The policy under the adapter; its files are read the first time."""
        if self._base is None:
            self._base = base_of(self._folder)
        return self._base
