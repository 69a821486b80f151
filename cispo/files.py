"""Files that are written whole or not at all, and what a disk says as a sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
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
