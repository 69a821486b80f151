"""File access rules without namespaces: Landlock, a Linux security module that any process may apply to itself.

It governs opening, making and removing files. It does not hide the existence and size of a path, nor the processes that
run; `seccomp` denies system calls that would change such files.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from cispo.sandbox.kernel import syscall

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""Version -> number of rights on files; 16 from version 5 on."""
_TCP, _SCOPES = 0b11, 0b11
"""Binding and connecting (version 4); abstract Unix sockets and signals (version 6)."""


def version() -> int:
    """Version of the kernel's Landlock. Raises OSError where it has none, or was started without it."""
    return syscall("landlock", _CREATE_RULESET, None, 0, _VERSION_FLAG)


def restrict(readable: list[str], devices: list[str], scratch: str) -> None:
    """Limits this process to reading `readable`, using `devices` and owning folder `scratch`. Needs no_new_privs."""
    supported = version()
    handled = (1 << _FILE_RIGHTS.get(supported, 16)) - 1
    attributes = struct.pack("=QQQ", handled, _TCP, _SCOPES)[: 8 if supported < 4 else 16 if supported < 6 else 24]
    ruleset = syscall("landlock_create_ruleset", _CREATE_RULESET, attributes, len(attributes), 0)
    for path in readable:
        _allow(ruleset, path, _EXECUTE | _READ_FILE | _READ_DIR)
    for path in devices:
        _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
    _allow(ruleset, scratch, handled & ~(_EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_BLOCK))
    syscall("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not stat.S_ISDIR(os.fstat(beneath).st_mode):
        rights &= _EXECUTE | _WRITE_FILE | _READ_FILE
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, beneath))
    syscall("landlock_add_rule", _ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    os.close(beneath)
