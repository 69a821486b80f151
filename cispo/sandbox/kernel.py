"""Calls into the C library that Python 3.11 has no function for. Every error is an OSError that names the call.

All modules of this package but `run` are imported by an interpreter that is started for each sandboxed program. To
start fast they import almost nothing: no `typing`, no `signal` (an enum), no `json`.
"""

from __future__ import annotations

import ctypes
import os
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)

AARCH64 = os.uname().machine == "aarch64"
"""False means x86_64: `cispo.sandbox.run` refuses any other machine."""

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
_CAPABILITY_VERSION_3 = 0x20080522


def call(name: str, *arguments: object) -> int:
    """Calls a function of the C library by name, with int arguments as C longs. Raises OSError on a negative result."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = _LIBC[name](*values)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def syscall(name: str, number: int, *arguments: object) -> int:
    """A system call without a function in the C library; the name is for the error."""
    try:
        return call("syscall", number, *arguments)
    except OSError as error:
        raise OSError(error.errno, f"{name}: {os.strerror(error.errno or 0)}") from None


def drop_capabilities() -> None:
    """Drops all privileges of this process; with no_new_privs, exec does not give them back to uid 0."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    call("capset", header, ctypes.create_string_buffer(24))
