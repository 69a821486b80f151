"""Files that are written whole or not at all, and what a disk says as a sentence."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cispo.errors import RunError, UserError


def write_text(file: Path, text: str) -> None:
    """Replaces the file in one go: nobody sees a part of it, and an end of the process leaves the old one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(values, indent=1) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Raises UserError where the file holds no JSON object."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object")
    return values


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a disk says inside the block into a RunError."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise RunError(f"cannot write {path}: {error}") from None


class BackgroundSave:
    """A file that a thread writes while its process goes on."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        # Whatever it is, it is raised where somebody asks.
        except BaseException as error:
            self._error = error

    def done(self, *, wait: bool) -> bool:
        """Whether it is written; raises what went wrong."""
        if wait:
            self._thread.join()
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True


def save_tensors(tensors: Mapping[str, Any], file: Path) -> None:
    """Writes a safetensors file. Raises RunError where the disk refuses."""
    from safetensors.torch import save_file

    with disk_errors(file):
        file.parent.mkdir(exist_ok=True)
        save_file(dict(tensors), file, metadata={"format": "pt"})


def load_tensors(file: Path) -> dict[str, Any]:
    """Reads a safetensors file into the CPU's memory. Raises UserError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
