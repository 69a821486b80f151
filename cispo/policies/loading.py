"""Loading, initialising and saving of policies.

    config.json + *.safetensors --load_policy--> Policy --save_policy--> config.json + model.safetensors
    config, seed                --init_policy-->

The config picks the family (`families.family_of`).
"""

from __future__ import annotations

import math
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

# Names that config.json's have for the number of positions (those of vLLM 0.32, _get_and_verify_max_len).
_POSITION_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"
)  # fmt: skip

# Number formats of weights, as safetensors names them. Others are quantised, and mean nothing without their scales.
_FLOATS = ("BF16", "F16", "F32", "F64")

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
        policy = _build(config, folder, dtype)
        policy.load_hf(_read_weights(files))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: a weight file is broken or cut short: {error}") from None
    return policy


def init_policy(config: HFConfig, seed: int, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy with random weights from a config.json's content; they depend on the config and the seed alone.

    Matrices are normal with the config's initializer_range, norms one, biases zero.
    """
    policy = _build(config, None, dtype)
    std = initial_std(policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim > 1:
                # Always drawn in float32: a bfloat16 policy is the float32 one, rounded.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return policy


def initial_std(policy: Policy) -> float:
    """The config's initializer_range, 0.02 without one. Raises UserError where it is no standard deviation."""
    std = policy.hf_config().get("initializer_range", 0.02)
    if not isinstance(std, int | float) or not 0 <= std < math.inf:
        raise UserError(f"policy.config.initializer_range {std!r} is not a standard deviation")
    return std


def count_parameters(source: str | None, config: HFConfig | None) -> int:
    """Parameters of the policy that a folder's or hub id's config.json, or `config`, describes; allocates nothing."""
    if config is None:
        assert source is not None
        config = read_json(local_folder(source) / "config.json")
    return sum(p.numel() for p in shape_of(config).parameters())


def shape_of(config: HFConfig) -> Policy:
    """The policy of a config.json's content without memory for its weights."""
    with torch.device("meta"):
        return _build(config, None, torch.float32)


def _build(config: HFConfig, folder: Path | None, dtype: torch.dtype) -> Policy:
    """A policy with undefined weights. Raises UserError for values that no policy can have, whatever they break."""
    try:
        return family_of(config).build(config, folder, dtype)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"no policy can be built from the config: {reason:.300}") from None


def max_positions_of(config: HFConfig) -> int | None:
    """The longest sequence, in tokens, that a config.json's policy is made for; None where it says nothing."""
    text = config.get("text_config")
    values = [part.get(key) for part in (config, text) if isinstance(part, dict) for key in _POSITION_KEYS]
    return min((value for value in values if isinstance(value, int) and value > 0), default=None)


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

    wanted = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
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
        foreign = [name for name in names.values() if not isinstance(name, str) or Path(name).name != name]
        if foreign:
            raise UserError(f"{index} names {foreign[0]!r}, which is not the name of a file in its folder")
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


def check_weights(folder: Path) -> None:
    """Raises UserError where config.json and the headers of the weight files do not go together; reads no weights."""
    from safetensors import SafetensorError

    try:
        with torch.device("meta"):
            policy = _build(read_json(folder / "config.json"), folder, torch.float32)
            policy.load_hf(_read_weights(weight_files(folder), headers=True))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: a weight file is broken or cut short: {error}") from None
    except UserError as error:
        raise UserError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None


def _read_weights(files: Iterable[Path], *, headers: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight; of `headers` alone the tensors have shapes and no values."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                header = weights.get_slice(name)
                if header.get_dtype() not in _FLOATS:
                    raise UserError(
                        f"weight {name!r} is stored as {header.get_dtype()}: a policy is trained from {_FLOATS[0]}, "
                        f"{', '.join(_FLOATS[1:-1])} or {_FLOATS[-1]}"
                    )
                shape = header.get_shape()
                yield name, torch.empty(shape, device="meta") if headers else weights.get_tensor(name)
