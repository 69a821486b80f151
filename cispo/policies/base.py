"""What a policy is, and how one is loaded, initialised and saved.

    config.json + *.safetensors --load_policy--> Policy --save_policy--> config.json + model.safetensors
    config, seed                --init_policy-->

The config picks the family: MiniMax-01 models run on `lightning.LightningPolicy`, every other on `hf.HFPolicy`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cispo.errors import UserError
from cispo.files import read_json, write_json
from cispo.policies.attention import Attention
from cispo.policies.lightning_config import is_lightning_config, parse_config, read_config

# What torch and others pickle weights into.
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class RouterOutput(NamedTuple):
    """What the router of one MoE layer decided."""

    probs: Tensor
    """[T, E]: softmax over all experts, at least float32."""
    chosen: Tensor
    """[T, k] int64."""


class PolicyOutput(NamedTuple):
    """One forward pass over packed tokens."""

    hidden: Tensor
    """[T, d] after the final norm; the logits are hidden @ lm_head_weight.T."""
    router: tuple[RouterOutput, ...] = ()
    """One entry per MoE layer; empty for a dense policy."""


class Policy(Protocol):
    """A language model on packed tokens. Implementations are nn.Modules; these are the parts the project relies on."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each layer is recomputed in the backward pass instead of keeping its activations."""
        ...

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None: ...

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, d]; the embedding where they are tied."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """Longest sequence the policy is made for."""
        ...

    @property
    def router_shape(self) -> tuple[int, int]:
        """(MoE layers, experts of each); (0, 0) for a dense policy."""
        ...

    def forward(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int | None = None
    ) -> PolicyOutput:
        """tokens and positions [T] int64; cu_seqlens [S + 1] int32: where each document starts, then T.

        `longest` is the length of the longest document; without it, it is read from the device.
        """
        ...

    def attend(self, tokens: Tensor, positions: Tensor, attention: Attention) -> PolicyOutput:
        """`forward`, where `attention` says how tokens see one another: a sampler's cache takes this way."""
        ...

    def to_hf(self) -> dict[str, Tensor]:
        """The weights under the names that checkpoints use: views, detached, a tied lm_head left out."""
        ...

    def load_hf(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies a whole checkpoint in. Raises UserError for a missing, unexpected or misshapen weight."""
        ...

    def hf_config(self) -> dict[str, Any]:
        """The config.json that goes with `to_hf`."""
        ...

    def __call__(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int | None = None
    ) -> PolicyOutput: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def to(self, target: Any, /) -> Any: ...


def load_policy(source: str | Path, dtype: torch.dtype = torch.float32) -> Policy:
    """Loads a folder with config.json and safetensors weights (one file or several), or a Hugging Face hub id.

    Raises UserError naming the folder where it is not a policy: no or broken config.json, no weights, or weights that
    are not those of the config.
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
    except SafetensorError as error:
        raise UserError(f"{folder}: a weight file is broken or cut short: {error}") from None
    return policy


def init_policy(config: Mapping[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy with random weights from a config.json's content; the same for a seed whatever ran before.

    Matrices are normal with the config's initializer_range, norms one, biases zero.
    """
    policy = _build(config, None, dtype)
    std = policy.hf_config().get("initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim > 1:
                # Drawn in float32 whatever the policy's dtype: a bfloat16 policy is the float32 one, rounded.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return policy


def count_parameters(source: str | None, config: Mapping[str, Any] | None) -> int:
    """Parameters of the policy that a folder's or hub id's config.json, or `config`, describes; allocates nothing."""
    if config is None:
        assert source is not None
        config = read_json(local_folder(source) / "config.json")
    with torch.device("meta"):
        return sum(p.numel() for p in _undefined(config, None, torch.float32).parameters())


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Writes config.json and model.safetensors, each under a temporary name first."""
    write_policy(policy.to_hf(), policy.hf_config(), folder)


def write_policy(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: str | Path) -> None:
    """What `save_policy` writes, of tensors in checkpoint format and a config.json's content."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    write_json(folder / "config.json", config)


def _build(config: Mapping[str, Any], folder: Path | None, dtype: torch.dtype) -> Policy:
    """A policy in memory whose weights are yet to be set."""
    if not is_lightning_config(config):
        return _undefined(config, folder, dtype)
    with torch.device("meta"):
        policy = _undefined(config, folder, dtype)
    assert isinstance(policy, nn.Module)
    return policy.to_empty(device="cpu")


def _undefined(config: Mapping[str, Any], folder: Path | None, dtype: torch.dtype) -> Policy:
    """A policy with undefined weights on the device of the context."""
    if not is_lightning_config(config):
        from cispo.policies import hf

        return hf.build(config, dtype)
    from cispo.policies.lightning import LightningPolicy

    parsed = parse_config(config) if folder is None else read_config(folder)
    return LightningPolicy(parsed, config).to(dtype)


def local_folder(source: str | Path) -> Path:
    """The folder itself, or a copy of the hub's model of that name. Raises UserError where there is neither."""
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

    Raises UserError where there is none, or one that the index names is missing.
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
