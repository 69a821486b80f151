"""Linux namespaces, a machine of the program's own: no network but a closed loopback, no other processes, and a
read-only file system with the files that Python needs and one folder to write in.

    /  tmpfs, read-only     the interpreter and the shared libraries, bound where they lie on the host, read-only
    /tmp  tmpfs, limited    the throw-away folder: it ends with the last process
    /dev  null zero random urandom

There is no /proc, no /sys, no /etc but the linker's cache, and no home.
"""

from __future__ import annotations

import ctypes
import os
import struct

from cispo.sandbox.kernel import AARCH64, call, syscall

SCRATCH = "/tmp"

_NEW = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""Mounts, host name, System V messages and memory, process ids, network."""
_NEW_USERS = 0x10000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC = 1, 2, 4, 8
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 4096, 16384, 1 << 18, 2
_PIVOT_ROOT, _MOUNT_SETATTR = 41 if AARCH64 else 155, 442
_CURRENT_FOLDER, _WITH_MOUNTS_BELOW = -100, 0x8000

_NEW_ROOT = "/proc"
"""Mount point for the new root: a folder that every Linux has, and from which nothing is bound."""
NOBODY = 65534
_MAX_FILES = 2048
"""Files and folders in the throw-away folder."""


def enter(readable: list[str], devices: list[str], scratch_bytes: int) -> int | None:
    """Moves this process into a file system of its own, to the folder SCRATCH; its children get new process ids too.

    Returns the user and group id to which a child must change. None: it must not change, because a user without
    privileges gets a user namespace, in which it is NOBODY.
    """
    uid, gid = os.geteuid(), os.getegid()
    privileged = uid == 0
    call("unshare", _NEW if privileged else _NEW | _NEW_USERS)
    inside = _unused_user() if privileged else NOBODY
    if not privileged:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{inside} {uid} 1")
        _write("/proc/self/gid_map", f"{inside} {gid} 1")
    _build_root(readable, devices, scratch_bytes, inside)
    os.chdir(SCRATCH)
    return inside if privileged else None


def _unused_user() -> int:
    """A user id for this launcher alone, from the last 2**20 of this (possibly nested) machine.

    No two programs share one, because the kernel counts processes by user and lets a user signal its own processes.
    """
    with open("/proc/self/uid_map") as file:
        first, _, count = map(int, max(file, key=lambda line: int(line.split()[2])).split())
    ids = min(count // 2, 1 << 20)
    if ids < 1:
        raise OSError(f"no user id but {first} to give to the program")
    # The last two ids of 2**32 are reserved.
    return first + count - 3 - os.getpid() % ids if count > 4 else first + count - 1


def _build_root(readable: list[str], devices: list[str], scratch_bytes: int, owner: int) -> None:
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", _NEW_ROOT, "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    os.mkdir(_NEW_ROOT + SCRATCH)
    limits = f"size={scratch_bytes},nr_inodes={_MAX_FILES},mode=700,uid={owner},gid={owner}"
    _mount("tmpfs", _NEW_ROOT + SCRATCH, "tmpfs", _NO_SUID | _NO_DEVICES | _NO_EXEC, limits)
    for path in readable:
        _bind(path, _READ_ONLY | _NO_SUID | _NO_DEVICES)
    for path in devices:
        _bind(path, _NO_SUID | _NO_EXEC)
    os.chdir(_NEW_ROOT)
    syscall("pivot_root", _PIVOT_ROOT, b".", b".")
    # The old root is mounted on top of the new one until this call.
    call("umount2", b".", _DETACH)
    os.chdir("/")
    _restrict_mount("/", _READ_ONLY, below=False)


def _bind(path: str, flags: int) -> None:
    target = _NEW_ROOT + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    # Recursive, because a user namespace may not leave out the mounts below a path.
    _mount(path, target, None, _BIND | _RECURSIVE)
    _restrict_mount(target, flags, below=True)


def _restrict_mount(path: str, flags: int, *, below: bool) -> None:
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", flags, 0, 0, 0))
    reach = _WITH_MOUNTS_BELOW if below else 0
    where = (_CURRENT_FOLDER, os.fsencode(path), reach, attributes, 32)
    syscall("mount_setattr", _MOUNT_SETATTR, *where)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text and os.fsencode(text) for text in (source, target, kind, options)]
    try:
        call("mount", texts[0], texts[1], texts[2], flags, texts[3])
    except OSError as error:
        raise OSError(error.errno, f"mount {source or target}: {os.strerror(error.errno or 0)}") from None


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
