"""Loading, initialising and saving of policies.

    config.json + *.safetensors --load_policy--> Policy --save_policy--> config.json + model.safetensors
    config, seed                --init_policy-->

The config picks the family (`families.family_of`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cispo.errors import UserError
from cispo.files import read_json, write_json
from cispo.policies.dense.shapes import Shapes
from cispo.policies.families import family_of
from cispo.policies.policy import HFConfig, Policy

# Names that config.json's have for the number of positions (those of vLLM 0.32, _get_and_verify_max_len).
_POSITION_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"
)  # fmt: skip

# Number formats of weights, as safetensors names them. Others are quantised, and mean nothing without their scales.
_FLOATS = ("BF16", "F16", "F32", "F64")

_CPU = torch.device("cpu")

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""peft's name for the file of an adapter."""

# Files of pickled weights, as torch and others write them.
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_policy(source: str | Path, dtype: torch.dtype = torch.float32, *, heads: bool = False) -> Policy:
    """Loads a folder with config.json and safetensors weights (one file or several), or a Hugging Face hub id.

    With `heads` its heads of multi-token prediction are modules (`families.Build`), here and below.

    Raises UserError naming the folder where it is no policy: no or a broken config.json, no weights, weights that do
    not fit the config.
    """
    from safetensors import SafetensorError

    folder = local_folder(source)
    config = _config_of(folder)
    files = weight_files(folder)
    try:
        policy = _build(config, folder, dtype, heads)
        policy.load_hf(_read_weights(files))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: a weight file is broken or cut short: {error}") from None
    return policy


def policy_without_weights(folder: Path, dtype: torch.dtype, *, heads: bool = False) -> Policy:
    """The policy of a folder on the meta device, with real values in the buffers that follow from the config alone.

    Raises UserError as `load_policy` does; config.json and the headers of the weight files are read, no weights.
    """
    config = _config_of(folder)
    check_weights(folder, heads=heads)
    return policy_on_meta(config, folder, dtype, heads=heads)


def policy_on_meta(config: HFConfig, folder: Path | None, dtype: torch.dtype, *, heads: bool = False) -> Policy:
    """`shape_of` a config in a number format, with real values in the buffers that follow from the config alone."""
    with torch.device("meta"):
        policy = _build(config, folder, dtype, heads)
    computed = set(dict(policy.named_buffers())) - set(policy.state_dict())
    if computed:
        # A twin whose undefined weights are never touched: the system gives it addresses, and no memory.
        twin = dict(_build(config, folder, dtype, heads).named_buffers())
        for name in computed:
            module, _, own = name.rpartition(".")
            policy.get_submodule(module)._buffers[own] = twin[name].clone()
    return policy


def _config_of(folder: Path) -> HFConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no policy: config.json is missing")
    return read_json(folder / "config.json")


def init_policy(
    config: HFConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
    *,
    heads: bool = False,
) -> Policy:
    """A policy with random weights from a config.json's content; they depend on the config, the seed and the kind of
    device alone: a GPU draws other numbers than a CPU.

    `Policy.initial_weight` draws them: matrices are normal with the config's initializer_range, norms neutral, biases
    zero.
    """
    with device:
        policy = _build(config, None, dtype, heads)
    std = initial_std(policy)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        # Always drawn in float32: a bfloat16 policy is the float32 one, rounded.
        for name, weight in policy.named_weights().items():
            weight.copy_(policy.initial_weight(name, weight.shape, std, generator))
    return policy


def initial_std(policy: Policy) -> float:
    """The config's initializer_range, 0.02 without one. Raises UserError where it is no standard deviation."""
    std = policy.hf_config().get("initializer_range", 0.02)
    if not isinstance(std, int | float) or not 0 <= std < math.inf:
        raise UserError(f"policy.config.initializer_range {std!r} is not a standard deviation")
    return std


def count_parameters(source: str | None, config: HFConfig | None, *, heads: bool = False) -> int:
    """Parameters of the policy that a folder's or hub id's config.json, or `config`, describes; allocates nothing."""
    if config is None:
        assert source is not None
        config = config_of(source)
    return sum(p.numel() for p in shape_of(config, heads=heads).parameters())


def shape_of(config: HFConfig, *, heads: bool = False) -> Policy:
    """The policy of a config.json's content without memory for its weights."""
    with torch.device("meta"):
        return _build(config, None, torch.float32, heads)


class _Undefined(TorchFunctionMode):
    """A block whose new modules keep undefined weights. Those are read or drawn anyway; on the meta device torch would
    import its compiler for them, one second."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def _build(config: HFConfig, folder: Path | None, dtype: torch.dtype, heads: bool) -> Policy:
    """A policy with undefined weights. Raises UserError for values that no policy can have, whatever they break."""
    try:
        with _Undefined():
            return family_of(config).build(config, folder, dtype, heads=heads)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"no policy can be built from the config: {reason:.300}") from None


def max_positions_of(config: HFConfig) -> int | None:
    """The longest sequence, in tokens, that a config.json's policy is made for; None where it says nothing.

    A sliding window is a bound too: policies attend to all earlier tokens, which is the same up to its width.
    """
    text = config.get("text_config")
    parts = [part for part in (config, text) if isinstance(part, dict)]
    values = [part.get(key) for part in parts for key in _POSITION_KEYS]
    values += [part.get("sliding_window") for part in parts if _slides(part)]
    return min((value for value in values if isinstance(value, int) and value > 0), default=None)


def _slides(config: HFConfig) -> bool:
    kinds = config.get("layer_types")
    return "sliding_attention" in kinds if kinds else config.get("use_sliding_window") is not False


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Writes config.json and model.safetensors, each under a temporary name first."""
    write_policy(policy.checkpoint(), policy.hf_config(), folder)


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


def part_file(number: int, count: int) -> str:
    """File name of part `number` (from 0) of a model's weights in `count` files."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(parts: Sequence[Mapping[str, int]], folder: Path) -> None:
    """Writes the index of weights in several files, each name -> bytes, in the form of transformers."""
    names = {name: part_file(number, len(parts)) for number, part in enumerate(parts) for name in part}
    size = sum(sum(part.values()) for part in parts)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": names})


def config_of(source: str | Path) -> HFConfig:
    """The config.json of a folder or of a hub's model; no weights are fetched. Raises UserError as `local_folder`."""
    return read_json(local_folder(source, weights=False) / "config.json")


def local_folder(source: str | Path, *, weights: bool = True) -> Path:
    """The folder itself, or a copy of the hub's model of that name. Raises UserError where neither exists."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise UserError(f"{source} is not a folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["config.json", "generation_config.json"]
    wanted += ["*.safetensors", "*.safetensors.index.json"] if weights else []
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
        files = sorted(file for file in folder.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS)
    others = sorted(file.name for pattern in _OTHER_FORMATS for file in folder.glob(pattern))
    if not files and others:
        raise UserError(
            f"{folder} holds weights as {others[0]}, a format that can run code when it is loaded: convert them to "
            "safetensors"
        )
    if not files and (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder} holds an adapter alone: cispo export --merge writes it and its policy as one")
    if not files:
        raise UserError(f"{folder} holds no weights: there is no *.safetensors file in it")
    for file in files:
        if file.suffix != ".safetensors":
            raise UserError(f"{index} names {file.name}, which is not a safetensors file")
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}, which its index names")
    return files


def check_weights(folder: Path, *, heads: bool = False) -> None:
    """Raises UserError where config.json and the headers of the weight files do not go together; reads no weights."""
    from safetensors import SafetensorError

    try:
        config = read_json(folder / "config.json")
        shapes = _known_shapes(config)
        if not heads and shapes is not None and shapes == _shapes_in(weight_files(folder)):
            return
        with torch.device("meta"):
            policy = _build(config, folder, torch.float32, heads)
            policy.load_hf(_read_weights(weight_files(folder), headers=True))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: a weight file is broken or cut short: {error}") from None
    except UserError as error:
        raise UserError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None


def _known_shapes(config: HFConfig) -> Shapes | None:
    try:
        return family_of(config).known_shapes(config)
    # A config that means nothing is refused where its policy is built.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UserError):
        return None


def _shapes_in(files: Iterable[Path]) -> Shapes:
    return {name: tuple(weight.shape) for name, weight in _read_weights(files, headers=True)}


class WeightSlice(Protocol):
    """A tensor in a file, of which a slice is read."""

    def __getitem__(self, rows: slice | tuple[slice, ...]) -> Tensor: ...

    def get_shape(self) -> list[int]: ...


def weight_slices(folder: Path) -> Iterator[tuple[str, WeightSlice]]:
    """(name, tensor in a file) of every weight of a policy's folder. Raises UserError where a file is broken."""
    from safetensors import SafetensorError, safe_open

    try:
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():
                    yield name, weights.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: a weight file is broken or cut short: {error}") from None


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
