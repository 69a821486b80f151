"""Reading and writing of files: whole or not at all, in a background thread, and with disk errors as one sentence.

Text is UTF-8 under every locale.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import RunError, UserError

if TYPE_CHECKING:
    from torch import Tensor


def write_text(file: Path, text: str) -> None:
    """Replaces the file by one rename: a reader never sees a part of it, and a killed process leaves the old one."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError:
        # On a full disk an empty file is left.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(file: Path, values: Mapping[str, object]) -> None:
    write_text(file, json.dumps(values, indent=1) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises UserError where it holds none."""
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a regular file")  # a pipe would block for ever
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{file} cannot be read: it is nested too deeply") from None
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


@contextmanager
def form_errors(file: Path) -> Iterator[None]:
    """A block that takes values out of a file's content. Raises UserError where they are missing or of another type."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from None


def digest_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def digest_note(file: Path) -> Path:
    """The hidden file beside `file` that `note_digest` writes."""
    return file.with_name(f".{file.name}.sha256")


def note_digest(file: Path) -> None:
    """Leaves the digest of a file beside it: for the writer of a large file, in its own thread, on its own machine."""
    digest_note(file).write_text(digest_of(file), encoding="ascii")


@contextmanager
def temporary_folder(prefix: str, root: Path, *, stale: str) -> Iterator[Path]:
    """A new private folder (mode 0700), removed after the block.

    A process that is killed leaves its folder behind: folders of names that begin with `stale`, with a free lock, are
    removed. Raises RunError where `root` cannot be written.
    """
    _remove_abandoned(stale, root)
    with disk_errors(root):
        draft = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=root))
    with _locked(draft):
        # Only now under the name that other processes look for: they would find the lock free before.
        folder = draft.rename(root / draft.name.removeprefix("."))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(prefix: str, root: Path) -> None:
    for folder in root.glob(f"{prefix}*"):
        try:
            with _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use, or another user's


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises OSError where another process holds the folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


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


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, with its digest beside it; `metadata` goes to its header.

    Raises RunError where the disk refuses.
    """
    from safetensors.torch import save_file

    with disk_errors(file):
        file.parent.mkdir(exist_ok=True)
        save_file(dict(tensors), file, metadata={"format": "pt", **(metadata or {})})
        note_digest(file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises UserError where it is no such file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
