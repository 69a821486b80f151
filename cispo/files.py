"""Reading and writing of files: whole or not at all, in a background thread, and with disk errors as one sentence."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import RunError, UserError

if TYPE_CHECKING:
    from torch import Tensor


def write_text(file: Path, text: str) -> None:
    """Replaces the file by one rename: a reader never sees a part of it, and a killed process leaves the old one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)


def write_json(file: Path, values: Mapping[str, object]) -> None:
    write_text(file, json.dumps(values, indent=1) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises UserError where it holds none."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object")
    return values


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises OSError and SafetensorError of the block as RunError, which names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise RunError(f"cannot write {path}: {error}") from None


class BackgroundSave:
    """A write that runs in a thread of its own."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        # `done` raises it in the caller's thread.
        except BaseException as error:
            self._error = error

    def done(self, *, wait: bool) -> bool:
        """Whether the write has ended; raises its error. `wait` blocks until it has."""
        if wait:
            self._thread.join()
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file. Raises RunError where the disk refuses."""
    from safetensors.torch import save_file

    with disk_errors(file):
        file.parent.mkdir(exist_ok=True)
        save_file(dict(tensors), file, metadata={"format": "pt"})


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises UserError where it is no such file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
