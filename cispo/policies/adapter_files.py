"""Folders of adapters, as peft reads them, and the policies that they belong to.

adapter_config.json  adapter_model.safetensors      peft's
config.json                                         of the policy with the adapter
base.json                                           the policy without it: id or folder, SHA-256 of its weight files

folder --adapter_in--> AdapterFolder --merged_policy--> Policy with W + s B A
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cispo.errors import UserError
from cispo.files import digest_of, form_errors, load_tensors, note_digest, read_json, write_json
from cispo.policies.loading import ADAPTER_WEIGHTS, load_policy, local_folder, weight_files
from cispo.policies.lora import PREFIX, merged
from cispo.policies.policy import HFConfig, Policy

if TYPE_CHECKING:
    from peft import LoraConfig

_CONFIG = "adapter_config.json"
_BASE = "base.json"

# Keys of adapter_config.json under which a layer is not W + (alpha / r) B A.
_OTHER_KINDS = ("use_dora", "use_rslora", "use_bdlora", "use_qalora", "rank_pattern", "alpha_pattern", "lora_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The policy under an adapter."""

    source: str
    """A hub id, or a folder, relative to the adapter's where both are of one run."""
    digests: Mapping[str, str]
    """Weight file -> SHA-256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """A folder with an adapter and without the policy's own weights."""

    folder: Path
    base: Base
    rank: int
    alpha: float

    def tensors(self) -> dict[str, Tensor]:
        """A and B under peft's names."""
        return load_tensors(self.folder / ADAPTER_WEIGHTS)

    def base_folder(self) -> Path:
        """The folder of the base's weights. Raises UserError where it is gone."""
        beside = self.folder / self.base.source
        try:
            return beside.resolve() if beside.is_dir() else local_folder(self.base.source)
        except UserError as error:
            raise UserError(f"{self.folder} holds an adapter of a policy that is gone: {error}") from None

    def own_base(self) -> Base:
        """The base by a name that does not depend on this folder."""
        beside = (self.folder / self.base.source).is_dir()
        return replace(self.base, source=str(self.base_folder())) if beside else self.base

    def check_base(self) -> Path:
        """`base_folder`, after every weight file was read. Raises UserError where one is not the adapter's."""
        folder = self.base_folder()
        files = {file.name: file for file in weight_files(folder)}
        if files.keys() != self.base.digests.keys():
            raise UserError(f"{folder} is not the policy that the adapter in {self.folder} was trained on")
        for name, file in files.items():
            if digest_of(file) != self.base.digests[name]:
                raise UserError(f"{file} is not the file that the adapter in {self.folder} was trained on")
        return folder


def adapter_in(folder: str | Path) -> AdapterFolder | None:
    """The adapter of a folder, None where it holds a whole policy. Raises UserError where base.json is missing."""
    folder = Path(folder)
    own = any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json"))
    if own or not (folder / ADAPTER_WEIGHTS).is_file() or not (folder / _CONFIG).is_file():
        return None
    config = read_json(folder / _CONFIG)
    if not (folder / _BASE).is_file():
        raise UserError(f"{folder} holds an adapter, but no {_BASE} that says of which policy")
    with form_errors(folder / _BASE):
        values = read_json(folder / _BASE)
        digests = {str(name): str(digest) for name, digest in values["sha256"].items()}
        base = Base(source=str(values["base"]), digests=digests)
    with form_errors(folder / _CONFIG):
        if config["peft_type"] != "LORA" or any(config.get(key) for key in _OTHER_KINDS):
            raise UserError(f"{folder / _CONFIG} is of another kind of adapter than plain LoRA")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1 or not 0 < alpha < math.inf:
            raise UserError(f"{folder / _CONFIG} has r {rank} and lora_alpha {alpha:g}")
    return AdapterFolder(folder=folder, base=base, rank=rank, alpha=alpha)


def base_of(folder: str | Path) -> Base:
    """The policy in a folder as a base of adapters; reads every weight file."""
    folder = Path(folder)
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+/?$", str(folder))
    source = f"{found[1]}/{found[2]}" if found else str(folder.absolute())
    return Base(source=source, digests={file.name: digest_of(file) for file in weight_files(folder)})


def write_adapter(
    tensors: Mapping[str, Tensor], adapter: LoraConfig, policy: HFConfig, base: Base, folder: str | Path
) -> None:
    """Writes a folder as `adapter_in` and peft read it: `tensors` on the CPU by peft's names."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"}
    )
    note_digest(folder / ADAPTER_WEIGHTS)
    adapter.base_model_name_or_path = base.source
    adapter.save_pretrained(str(folder))
    write_json(folder / "config.json", policy)
    write_json(folder / _BASE, {"base": _from(base.source, folder), "sha256": dict(base.digests)})


def copy_adapter(found: AdapterFolder, folder: str | Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Writes an adapter into another folder, in `dtype`; returns its tensors.

    Raises UserError where its base is gone.
    """
    from peft import LoraConfig

    tensors = {name: tensor.to(dtype) for name, tensor in found.tensors().items()}
    config = LoraConfig.from_pretrained(str(found.folder))
    assert isinstance(config, LoraConfig)
    write_adapter(tensors, config, read_json(found.folder / "config.json"), found.own_base(), folder)
    return tensors


def _from(source: str, folder: Path) -> str:
    """A base of the adapter's own run by its place beside the adapter: run folders can be moved."""
    near = os.path.isabs(source) and Path(source).parent == folder.absolute().parent
    return os.path.relpath(source, folder.absolute()) if near else source


@torch.no_grad()
def merged_policy(found: AdapterFolder, dtype: torch.dtype = torch.float32) -> Policy:
    """The base with the adapter in its weights: W + s B A in `dtype`. Raises UserError where they do not fit."""
    policy = load_policy(found.check_base(), dtype)
    places, weights, tensors = dict(policy.disk_places()), policy.named_weights(), found.tensors()
    for name in sorted({name.partition(".lora_")[0] for name in tensors}):
        place = places.get(f"{name.removeprefix(PREFIX)}.weight")
        a, b = (tensors.get(f"{name}.lora_{letter}.weight") for letter in "AB")
        if place is None or a is None or b is None:
            raise UserError(f"{found.folder}: the adapter of {name!r} has no place in the policy {found.base.source}")
        weight = place.of(weights[place.parameter])
        if weight.shape != (len(b), a.shape[1]) or b.shape[1] != len(a):
            raise UserError(f"{found.folder}: the adapter of {name!r} does not fit a weight of {list(weight.shape)}")
        weight.copy_(merged(weight, a.to(dtype), b.to(dtype), found.alpha / found.rank))
    return policy
