"""stdout and stderr of a command that must not end for want of a reader.

A closed pipe (`| head -1`), a full disk or a lost terminal makes a stream silent, and the run goes on.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Raw(io.FileIO):
    """A file descriptor that counts failed writes as done, and keeps the first error."""

    error: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self.error = self.error or error
            written = None
        # None also where a pipe that does not block is full.
        return memoryview(data).nbytes if written is None else written


def spare_writers() -> None:
    """Replaces sys.stdout and sys.stderr by streams that never raise, and opens /dev/null where they are closed."""
    # A file of the run must not get the number of a closed stream, into which libraries write.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Under a test runner they are its own.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _spare(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _spare(2, sys.stderr)


def _spare(number: int, stream: TextIO | None) -> TextIO:
    encoding = (stream and stream.encoding) or "utf-8"
    raw = io.BufferedWriter(_Raw(number, "w", closefd=False))
    # A character that the encoding lacks is shown as its number.
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def lost_output() -> str | None:
    """The reason for which a part of stdout was lost, None where all of it arrived or its reader left early."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Raw) else None
    return None if error is None or error.errno == errno.EPIPE else error.strerror
