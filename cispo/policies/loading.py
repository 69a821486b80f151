"""Loading, initialising and saving of policies.

    config.json + *.safetensors --load_policy--> Policy --save_policy--> config.json + model.safetensors
    config, seed                --init_policy-->

The config picks the family (`families.family_of`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cispo.errors import UserError
from cispo.files import read_json, write_json
from cispo.policies.families import family_of
from cispo.policies.policy import HFConfig, Policy

# Files of pickled weights, as torch and others write them.
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_policy(source: str | Path, dtype: torch.dtype = torch.float32) -> Policy:
    """Loads a folder with config.json and safetensors weights (one file or several), or a Hugging Face hub id.

    Raises UserError naming the folder where it is no policy: no or a broken config.json, no weights, weights that do
    not fit the config.
    """
    from safetensors import SafetensorError

    folder = local_folder(source)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no policy: config.json is missing")
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    try:
        policy = family_of(config).build(config, folder, dtype)
        policy.load_hf(_read_weights(files))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except SafetensorError as error:
        raise UserError(f"{folder}: a weight file is broken or cut short: {error}") from None
    return policy


def init_policy(config: HFConfig, seed: int, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy with random weights from a config.json's content; they depend on the config and the seed alone.

    Matrices are normal with the config's initializer_range, norms one, biases zero.
    """
    policy = family_of(config).build(config, None, dtype)
    std = policy.hf_config().get("initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim > 1:
                # Always drawn in float32: a bfloat16 policy is the float32 one, rounded.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return policy


def count_parameters(source: str | None, config: HFConfig | None) -> int:
    """Parameters of the policy that a folder's or hub id's config.json, or `config`, describes; allocates nothing."""
    if config is None:
        assert source is not None
        config = read_json(local_folder(source) / "config.json")
    with torch.device("meta"):
        return sum(p.numel() for p in family_of(config).build(config, None, torch.float32).parameters())


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Writes config.json and model.safetensors, each under a temporary name first."""
    write_policy(policy.to_hf(), policy.hf_config(), folder)


def write_policy(state: Mapping[str, Tensor], config: HFConfig, folder: str | Path) -> None:
    """`save_policy` of tensors in checkpoint format and a config.json's content."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    write_json(folder / "config.json", config)


def local_folder(source: str | Path) -> Path:
    """The folder itself, or a copy of the hub's model of that name. Raises UserError where neither exists."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise UserError(f"{source} is not a folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__
        raise UserError(f"{source} is neither a folder nor a model that the hub gives ({reason})") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a policy's folder; no other format is read, since most of them run code when loaded.

    Raises UserError where the folder has none, or lacks one that its index names.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index} has no weight_map")
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    others = sorted(file.name for pattern in _OTHER_FORMATS for file in folder.glob(pattern))
    if not files and others:
        raise UserError(
            f"{folder} holds weights as {others[0]}, a format that can run code when it is loaded: convert them to "
            "safetensors"
        )
    if not files:
        raise UserError(f"{folder} holds no weights: there is no *.safetensors file in it")
    for file in files:
        if file.suffix != ".safetensors":
            raise UserError(f"{index} names {file.name}, which is not a safetensors file")
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}, which its index names")
    return files


def _read_weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                yield name, weights.get_tensor(name)
