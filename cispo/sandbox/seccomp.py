"""The filter on system calls: one process of threads, no sockets, no access to other processes, no exotic calls.

It is the same under both mechanisms, so that a program does the same on any machine. It also covers the gaps of
Landlock: mode, owner, times and attributes of files that the program may not even read; truncation before version 3.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from cispo.sandbox.kernel import AARCH64, PR_SET_PDEATHSIG, PR_SET_SECCOMP, call

_MODE_FILTER = 2
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_DENY = _ERRNO | errno.EPERM
_UNKNOWN = _ERRNO | errno.ENOSYS

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCH = 0, 4
_AUDIT_ARCH = 0xC00000B7 if AARCH64 else 0xC000003E

CLONE_THREAD = 0x10000
AF_UNIX = 1
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP = 0x5412, 0x541C, 0x8901, 0x8902

_FIRST_OF_ALL_MACHINES = 424
"""From this number on (Linux 5.1) a system call has the same number on every machine."""
_ALLOWED_FROM_THERE = (436, 439, 441, 449)
"""close_range, faccessat2, epoll_pwait2, futex_waitv. Any other, also of a future kernel, fails with ENOSYS."""

_DENIED = {
    # Processes. (clone is conditional; clone3 fails with ENOSYS, because a filter cannot see its flags.)
    "fork": (57, None),
    "vfork": (58, None),
    # In the last resort the caller kills the launcher's process group, which no program may leave.
    "setsid": (112, 157),
    "setpgid": (109, 154),
    # Other processes of the same user, and their data.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Network.
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # Memory and messages that outlive the process or escape its limit.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "memfd_create": (319, 279),
    # Files by their path, for which neither Landlock nor the mode of a file descriptor decides.
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "truncate": (76, 45),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    # Namespaces, mounts, and the machine as a whole.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    # Parts of the kernel that exploits use and Python programs do not.
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
"""Calls that fail with EPERM: numbers on (x86_64, aarch64), None where the machine has no such call."""

_CONDITIONAL = {
    "clone": (56, 220),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "socketpair": (53, 199),
    "prctl": (157, 167),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "open": (2, None),
    "openat": (257, 56),
}


def install() -> None:
    """Binds this process and every program that it executes to the filter, for good. Needs no_new_privs."""
    code = program(os.getpid())
    instructions = ctypes.create_string_buffer(code)
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    call("prctl", PR_SET_SECCOMP, _MODE_FILTER, ctypes.create_string_buffer(header), 0, 0)


def program(own_pid: int) -> bytes:
    """The filter as BPF, for the process with this id."""
    code = _step(_LOAD, _ARCH) + _step(_EQUAL, _AUDIT_ARCH, 1, 0) + _step(_RETURN, _KILL) + _step(_LOAD, _NUMBER)
    for number in _ALLOWED_FROM_THERE:
        code += _on(number, _step(_RETURN, _ALLOW))
    # These include the x32 calls of an x86_64 kernel, which are numbered from 2**30.
    code += _step(_AT_LEAST, _FIRST_OF_ALL_MACHINES, 0, 1) + _step(_RETURN, _UNKNOWN)
    for numbers in _DENIED.values():
        code += _on(numbers[AARCH64], _step(_RETURN, _DENY))
    for name, body in _conditions(own_pid).items():
        code += _on(_CONDITIONAL[name][AARCH64], body)
    return code + _step(_RETURN, _ALLOW)


def _conditions(own_pid: int) -> dict[str, bytes]:
    return {
        "clone": _allow_only(0, [CLONE_THREAD], mask=CLONE_THREAD),
        "kill": _allow_only(0, [own_pid]),
        "tgkill": _allow_only(0, [own_pid]),
        "prlimit64": _allow_only(0, [0, own_pid]),
        # asyncio wakes its loop through a socket pair.
        "socketpair": _allow_only(0, [AF_UNIX]),
        "prctl": _allow_all_but(0, [PR_SET_PDEATHSIG]),
        # A file sends signals to its owner, which could be any process.
        "fcntl": _allow_all_but(1, [_F_SETOWN, _F_SETSIG, _F_SETOWN_EX]),
        "ioctl": _allow_all_but(1, [_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP]),
        # Opening a file to read can truncate it, for which Landlock 1 and 2 ask for the right to read only.
        "open": _allow_all_but(1, [_O_TRUNC], mask=_O_ACCMODE | _O_TRUNC),
        "openat": _allow_all_but(2, [_O_TRUNC], mask=_O_ACCMODE | _O_TRUNC),
    }


def _step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def _on(number: int | None, body: bytes) -> bytes:
    """Runs `body`, which returns, for one system call."""
    return b"" if number is None else _step(_EQUAL, number, 0, len(body) // 8) + body


def _allow_only(argument: int, values: list[int], mask: int = 0xFFFFFFFF) -> bytes:
    return _by_argument(argument, values, mask, _ALLOW, _DENY)


def _allow_all_but(argument: int, values: list[int], mask: int = 0xFFFFFFFF) -> bytes:
    return _by_argument(argument, values, mask, _DENY, _ALLOW)


def _by_argument(argument: int, values: list[int], mask: int, listed: int, others: int) -> bytes:
    """Returns `listed` where the argument & mask is one of `values`, else `others`.

    The kernel takes all these arguments as 32-bit ints, so the lower half of the register holds the whole value.
    """
    code = _step(_LOAD, 16 + 8 * argument) + _step(_AND, mask)
    for value in values:
        code += _step(_EQUAL, value, 0, 1) + _step(_RETURN, listed)
    return code + _step(_RETURN, others)
