"""Run folders: their names, and the lock that keeps a second command out of a folder in use.

    with create_run_folder(output_dir, name) as folder: ...     a new folder, locked
    with only_user_of(last_run_folder(...)) as folder: ...      an existing one

The lock is taken before a command reads the state that it goes on from, and held to its end. Commands that only read
take none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cispo.errors import RunError, UserError

_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder that this process has locked, until the end of a `with` block."""

    path: Path
    _lock: int
    """Descriptor of the lock's file."""
    _identity: os.stat_result
    """Of the folder, when it was locked."""

    def check(self) -> None:
        """Raises RunError where the folder is not at its path any more."""
        try:
            there = os.path.samestat(os.stat(self.path), self._identity)
        except (FileNotFoundError, NotADirectoryError):
            there = False
        if not there:
            raise RunError(f"{self.path} was removed or moved during the run")

    def empty(self) -> None:
        """Removes everything in the folder but its lock."""
        for entry in self.path.iterdir():
            if entry.name == _LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)


def create_run_folder(output_dir: str, name: str) -> RunFolder:
    """Makes and locks `output_dir/name`, or `name-2`, `name-3` ... where that holds a run already.

    Nothing is overwritten. Raises UserError where output_dir cannot be written.
    """
    try:
        for number in range(1, 10_000):
            path = Path(output_dir) / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
            folder = _try_lock(path) if _is_unused(path) else None
            if folder is None:
                continue
            # Another command may have had it meanwhile.
            if _is_unused(path):
                return folder
            folder.__exit__(None, None, None)
    except OSError as error:
        raise UserError(f"output_dir {output_dir!r} cannot be written: {error.strerror}") from None
    raise UserError(f"output_dir {output_dir!r} holds ten thousand runs named {name!r}")


def last_run_folder(output_dir: str, name: str) -> Path | None:
    """The newest run folder of a name, None where there is no run."""
    folders = Path(output_dir).iterdir() if Path(output_dir).is_dir() else ()
    found = [f for f in folders if re.fullmatch(rf"{re.escape(name)}(-\d+)?", f.name) and _holds_run(f)]
    return max(found, key=lambda f: int(f.name[len(name) + 1 :] or 1), default=None)


def only_user_of(path: Path) -> RunFolder:
    """Locks an existing run folder. Raises UserError where another command has locked it."""
    try:
        folder = _try_lock(path)
    except OSError as error:
        raise UserError(f"{path} cannot be locked: {error.strerror}") from None
    if folder is None:
        raise UserError(f"{path} is in use: another process is running in it")
    return folder


@contextlib.contextmanager
def no_run_above(path: Path) -> Iterator[None]:
    """Raises UserError where `path` is, or lies in, a run folder in use; keeps commands out of it during the block."""
    with contextlib.ExitStack() as stack:
        for folder in (path, *path.absolute().parents):
            # A path that cannot be read holds no run in use; the command finds the reason when it writes there.
            with contextlib.suppress(OSError):
                descriptor = os.open(folder / _LOCK, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                if not _flock(descriptor, folder, fcntl.LOCK_SH):
                    raise UserError(f"{folder} is in use: another process is running in it")
        yield


def _try_lock(path: Path) -> RunFolder | None:
    """Locks a folder; None where another process, or another block of this one, holds the lock."""
    while True:
        # Opened without a change: the file belongs to the command that holds the lock.
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        if not _flock(descriptor, path, fcntl.LOCK_EX):
            os.close(descriptor)
            return None
        if _is_open(path / _LOCK, descriptor):
            return RunFolder(path, descriptor, os.stat(path))
        # The folder was removed and made anew between the two calls.
        os.close(descriptor)


def _flock(descriptor: int, folder: Path, kind: int) -> bool:
    """Whether the lock was free. On a file system without locks it is, with a warning."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        reason = f"its file system has no locks ({error.strerror})"
        print(f"cispo: warning: {folder} is not protected from a second command: {reason}", file=sys.stderr)
    return True


def _is_open(file: Path, descriptor: int) -> bool:
    """Whether the path leads to the open file."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except OSError:
        return False


def _is_unused(folder: Path) -> bool:
    """Whether a folder is there and holds nothing but the lock of a command that ended in its first write or before."""
    return folder.is_dir() and all(entry.name in (_LOCK, "recipe.yaml.partial") for entry in folder.iterdir())


def _holds_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").exists() or (folder / "checkpoints").exists()
