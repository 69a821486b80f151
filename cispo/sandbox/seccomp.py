"""The filter on system calls: a list of those that Python needs to compute. Every other call fails.

    listed --> allowed, some of them with certain arguments only        below 424, not listed --> EPERM
                                                            from 424 (Linux 5.1), not listed --> ENOSYS

One process of threads, its own files, a socket pair within itself, clocks and memory remain: no other process, no
network, no memory, queue or lock that outlives the program or is counted for the machine. It is the same under both
mechanisms, so that a program does the same on any machine. It also covers the gaps of Landlock: mode, owner, times and
attributes of files that the program may not even read; truncation before version 3; sockets in the file system.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from cispo.sandbox.kernel import AARCH64, PR_SET_SECCOMP, call
from cispo.sandbox.system_calls import ALLOWED, CONDITIONAL

_MODE_FILTER = 2
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_DENY = _ERRNO | errno.EPERM
_UNKNOWN = _ERRNO | errno.ENOSYS

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCH = 0, 4
_AUDIT_ARCH = 0xC00000B7 if AARCH64 else 0xC000003E
_ALL_BITS = 0xFFFFFFFF

CLONE_THREAD = 0x10000
AF_UNIX, SOCK_STREAM = 1, 1
_SOCKET_KIND = 0xF
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000
_MAP_HUGETLB = 0x40000

# Dumpable, pdeathsig, name, no_new_privs: to be read; the names of threads and of memory: to be set.
_PRCTL = [2, 3, 15, 16, 39, 0x53564D41]
# Copies, flags and record locks of a file descriptor, and the size of a pipe.
_FCNTL = [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032]
# Is it a terminal, how wide; bytes that wait; not blocking; closed on exec.
_IOCTL = [0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]

_FIRST_OF_ALL_MACHINES = 424
"""From this number on (Linux 5.1) a system call has the same number on every machine."""
_ALLOWED_FROM_THERE = (436, 439, 441, 449)
"""close_range, faccessat2, epoll_pwait2, futex_waitv. clone3 fails, because a filter cannot see its flags."""


def install() -> None:
    """Binds this process and every program that it executes to the filter, for good. Needs no_new_privs."""
    code = program(os.getpid())
    instructions = ctypes.create_string_buffer(code)
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    call("prctl", PR_SET_SECCOMP, _MODE_FILTER, ctypes.create_string_buffer(header), 0, 0)


def program(own_pid: int) -> bytes:
    """The filter as BPF, for the process with this id."""
    code = _step(_LOAD, _ARCH) + _step(_EQUAL, _AUDIT_ARCH, 1, 0) + _step(_RETURN, _KILL) + _step(_LOAD, _NUMBER)
    for number in (*_ALLOWED_FROM_THERE, *(numbers[AARCH64] for numbers in ALLOWED.values())):
        code += _on(number, _step(_RETURN, _ALLOW))
    # These include the x32 calls of an x86_64 kernel, which are numbered from 2**30.
    code += _step(_AT_LEAST, _FIRST_OF_ALL_MACHINES, 0, 1) + _step(_RETURN, _UNKNOWN)
    for name, conditions in _conditions(own_pid).items():
        code += _on(CONDITIONAL[name][AARCH64], conditions + _step(_RETURN, _ALLOW))
    return code + _step(_RETURN, _DENY)


def _conditions(own_pid: int) -> dict[str, bytes]:
    """Call -> code that returns where its arguments are not allowed, and else runs into the next instruction."""
    return {
        # No new process: a limit on a process is a limit on the program.
        "clone": _among(_low(0), [CLONE_THREAD], mask=CLONE_THREAD),
        "kill": _among(_low(0), [own_pid]),
        "tgkill": _among(_low(0), [own_pid]),
        "prlimit64": _among(_low(0), [0, own_pid]),
        # asyncio wakes its loop through a socket pair. Another kind than a stream sends to sockets of other processes.
        "socketpair": _among(_low(0), [AF_UNIX]) + _among(_low(1), [SOCK_STREAM], mask=_SOCKET_KIND),
        # To the other end, and to no address.
        "sendto": _among(_low(4), [0]) + _among(_high(4), [0]),
        "prctl": _among(_low(0), _PRCTL),
        # Leases and owners of a file would reach other processes by signals.
        "fcntl": _among(_low(1), _FCNTL),
        "ioctl": _among(_low(1), _IOCTL),
        # The pool of huge pages is the machine's.
        "mmap": _among(_low(3), [0], mask=_MAP_HUGETLB),
        # Opening a file to read can truncate it, for which Landlock 1 and 2 ask for the right to read only.
        "open": _not_among(_low(1), [_O_TRUNC], mask=_O_ACCMODE | _O_TRUNC),
        "openat": _not_among(_low(2), [_O_TRUNC], mask=_O_ACCMODE | _O_TRUNC),
    }


def _step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def _on(number: int | None, body: bytes) -> bytes:
    """Runs `body`, which returns, for one system call."""
    return b"" if number is None else _step(_EQUAL, number, 0, len(body) // 8) + body


def _low(argument: int) -> int:
    """Offset of the lower half of an argument; the kernel takes all ints from it."""
    return 16 + 8 * argument


def _high(argument: int) -> int:
    return _low(argument) + 4


def _among(offset: int, values: list[int], mask: int = _ALL_BITS) -> bytes:
    """Returns EPERM unless the word at the offset & mask is one of `values`."""
    code = _step(_LOAD, offset) + _step(_AND, mask)
    for number, value in enumerate(values, 1):
        code += _step(_EQUAL, value, len(values) - number + 1, 0)
    return code + _step(_RETURN, _DENY)


def _not_among(offset: int, values: list[int], mask: int) -> bytes:
    """Returns EPERM where the word at the offset & mask is one of `values`."""
    code = _step(_LOAD, offset) + _step(_AND, mask)
    for value in values:
        code += _step(_EQUAL, value, 0, 1) + _step(_RETURN, _DENY)
    return code
