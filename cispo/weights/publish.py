"""Weights leave the learner: a file in shared memory (here), or buckets on the device (`buckets`).

    learner   publish_weights(state, folder, version) -> FileMessage(folder/weights-00000007.safetensors)    CPU
              WeightSender.stage(number)              -> BucketMessage, one after another       GPU, several machines
    engine    receive_weights(message) ..., finish_update        `vllm_receiver` or `TorchEngine`

An engine copies each tensor into its parameter, so a version crosses between the processes once. No file that the
learner imports imports vLLM.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cispo.errors import UserError
from cispo.files import temporary_folder
from cispo.weights.buckets import BucketMessage

_PREFIX = "cispo-weights-"


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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    path = folder / f"weights-{version:08d}.safetensors"
    partial = folder / f"partial-{os.getpid()}"
    try:
        save_file(_standalone(state), partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write the weights for the engines to {folder}: {error}") from error
    for old in folder.glob("weights-*.safetensors"):
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
    from safetensors import safe_open

    if not Path(path).is_file():
        raise UserError(f"the published weights {path} do not exist (a newer version replaces an older one)")
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)
