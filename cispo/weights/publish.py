"""Weights leave the learner: a file in shared memory (here), or buckets on the device (`buckets`).

    learner   publish_weights(state, folder, version) -> FileMessage(folder/weights-00000007.safetensors)    CPU
              publish_pieces(shapes, pieces, ...)     -> the same of a sharded policy, written as it is gathered
              WeightSender.stage(number)              -> BucketMessage, one after another       GPU, several machines
    engine    receive_weights(message) ..., finish_update        `vllm_receiver` or `TorchEngine`

An engine copies each tensor into its parameter, so a version crosses between the processes once. No file that the
learner imports imports vLLM.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from cispo.errors import UserError
from cispo.files import temporary_folder
from cispo.policies.loading import WeightSlice
from cispo.weights.buckets import BucketMessage

if TYPE_CHECKING:
    from safetensors import safe_open

_PREFIX = "cispo-weights-"

# Names of number formats in safetensors files.
_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class FileMessage:
    """A whole version in a file of `publish_weights`."""

    path: str


WeightMessage = FileMessage | BucketMessage
"""Announces a whole version, or one bucket of it, to an engine."""


@contextlib.contextmanager
def weights_folder(run: str) -> Iterator[Path]:
    """A new folder for one run's weights, in shared memory if there is any, else on disk; removed after the block.

    A driver that is killed leaves its folder behind; the next run removes it.
    """
    shared = Path("/dev/shm")
    root = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    # An engine that still maps a version keeps its memory until it unmaps it.
    with temporary_folder(f"{_PREFIX}{run}-", root, stale=_PREFIX) as folder:
        yield folder


@contextlib.contextmanager
def shared_weights_folder(run: str, root: Path) -> Iterator[Path]:
    """As `weights_folder`, in `root` on a file system of several machines, where locks cannot be relied on.

    Raises UserError where `root` cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".weights-{run}-", dir=root.absolute())
    except OSError as error:
        raise UserError(f"output_dir '{root}' cannot be written: {error.strerror}") from None
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_weights(state: Mapping[str, Tensor], folder: str | Path, version: int) -> Path:
    """Writes one version of the weights, then removes older ones; returns its path.

    `state` has the names of the checkpoint format; tensors may share memory (tied embeddings) and be on any device.
    Raises UserError where the folder cannot hold them.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    partial = folder / f"partial-{os.getpid()}"
    with _write_errors(partial):
        save_file(_standalone(state), partial)
        return _replace_older(partial, version)


def publish_pieces(
    shapes: Mapping[str, Tensor],
    pieces: Iterable[Mapping[str, Tensor]],
    folder: str | Path,
    version: int,
    *,
    write: bool,
) -> Path:
    """`publish_weights` of weights that come a few at a time; `shapes` has all of them, in order, without values.

    Ranks that do not `write` only take part in the gathers that bring the pieces. Raises UserError where the folder
    cannot hold them, after the last gather.
    """
    folder = Path(folder)
    path = _published(folder, version)
    if not write:
        for _ in pieces:
            pass
        return path
    partial = folder / f"partial-{os.getpid()}"
    remaining = iter(pieces)
    try:
        with _write_errors(partial):
            _write_pieces(shapes, remaining, partial)
            return _replace_older(partial, version)
    finally:
        for _ in remaining:
            pass


def _write_pieces(shapes: Mapping[str, Tensor], pieces: Iterable[Mapping[str, Tensor]], file: Path) -> None:
    """A safetensors file: the header's length, the header, then the tensors in its order without gaps."""
    import torch

    header, end = {}, 0
    for name, shape in shapes.items():
        kind = _DTYPES[str(shape.dtype)]
        header[name] = {"dtype": kind, "shape": list(shape.shape), "data_offsets": [end, end + shape.nbytes]}
        end += shape.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            for name, tensor in piece.items():
                out.seek(8 + len(text) + header[name]["data_offsets"][0])
                out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _published(folder: Path, version: int) -> Path:
    return folder / f"weights-{version:08d}.safetensors"


@contextlib.contextmanager
def _write_errors(partial: Path) -> Iterator[None]:
    """A block that writes `partial`, which an error removes. Raises UserError for those of the disk."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write the weights for the engines to {partial.parent}: {error}") from error


def _replace_older(partial: Path, version: int) -> Path:
    """Gives a complete file its name, then removes older versions."""
    path = _published(partial.parent, version)
    os.replace(partial, path)
    for old in partial.parent.glob("weights-*.safetensors"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def _standalone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, each with its own storage: safetensors refuses tensors that share one."""
    storages: set[int] = set()
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def mapped_weights(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a published version, mapped from the file without a copy.

    Raises UserError where the file is gone.
    """
    with _opened(path) as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def mapped_slices(path: str | Path) -> Iterator[tuple[str, WeightSlice]]:
    """`mapped_weights` of which slices along the first axis are read."""
    with _opened(path) as file:
        for name in file.keys():
            yield name, file.get_slice(name)


def _opened(path: str | Path) -> safe_open:
    from safetensors import safe_open

    if not Path(path).is_file():
        raise UserError(f"the published weights {path} do not exist (a newer version replaces an older one)")
    return safe_open(path, framework="pt")
