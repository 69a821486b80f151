"""The process between a caller and a sandboxed program: it builds the sandbox, starts the program in it, watches it,
and leaves nothing behind.

    caller  -- request on stdin -->  launcher  -- fork, confine, exec -->  the program, a fresh Python
            <-- "started", "exit 0", or "error ..." on a pipe of its own --
            <-- the program's stdout and stderr, which only the caller reads --

stdin stays open while the caller lives: its end is the order to kill the program. The program gets a kill from the
kernel when the launcher dies.
"""

from __future__ import annotations

import marshal
import os
import resource
import select
import stat
import struct

from cispo.sandbox import landlock, namespaces, seccomp
from cispo.sandbox.kernel import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, call, drop_capabilities

HEADER = struct.Struct("=Q")
PROGRAM = "main.py"

_SIGKILL = 9
_POLL_MILLISECONDS = 50
_CLOCK_SKEW = 0.05
_MAX_OPEN_FILES = 64
_MAX_SCRATCH_ENTRIES = 2048
_MAX_SCRATCH_DEPTH = 64

# `exit` and `quit` come from `site`, which takes 35 ms and reads what is installed. Names that this leaves behind, or
# imports, would be there for a program that forgot to import them.
_BOOT = (
    'for __file__ in ("exit", "quit"):\n'
    '    setattr(__import__("builtins"), __file__, __import__("_sitebuiltins").Quitter(__file__, "Ctrl-D"))\n'
    '__import__("os").environ.clear()\n'
    '__import__("sys").argv[:] = ["main.py"]\n'
    '__file__ = "main.py"\n'
    'exec((lambda file: (compile(file.read(), "main.py", "exec"), file.close())[0])(open("main.py", "rb")))'
)


def main(status: int) -> None:
    """Runs the request that comes on stdin; `status` is the file descriptor for what is to be reported."""
    os.set_inheritable(status, False)
    try:
        with open(0, "rb", closefd=False) as stdin:
            (size,) = HEADER.unpack(stdin.read(HEADER.size))
            request = marshal.loads(stdin.read(size))
        os.write(status, _run(request, status).encode())
    except OSError as error:
        os.write(status, f"error {error}\n".encode())


def _run(request: dict, status: int) -> str:
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    code, data, paths = request["code"], request["stdin"], (request["readable"], request["devices"])
    user, folder = None, None
    if request["mechanism"] == "namespaces":
        user = namespaces.enter(*paths, request["disk_bytes"] + len(code) + len(data))
    else:
        folder = f"{request['scratch']}/cispo-sandbox-{os.urandom(8).hex()}"
        os.mkdir(folder, 0o700)
    try:
        if folder is not None:
            os.chdir(folder)
        _write(PROGRAM, code)
        _write("stdin", data)
        stdin = os.open("stdin", os.O_RDONLY)
        os.unlink("stdin")
        child = os.fork()
        if child == 0:
            _become_the_program(request, stdin, user, folder, status)
        for descriptor in (1, 2, stdin):
            os.close(descriptor)
        os.write(status, b"started\n")
        stopped = _watch(child, proc, folder, request["threads"], request["disk_bytes"] + len(code))
        _, ending, usage = os.wait4(child, 0)
        # The kernel kills by a clock of its own, which may be ahead of what it reports.
        if ending == _SIGKILL and usage.ru_utime + usage.ru_stime >= request["cpu_seconds"] - _CLOCK_SKEW:
            stopped = "time"
        return f"exit {os.waitstatus_to_exitcode(ending)} {stopped}\n"
    finally:
        if folder is not None:
            _remove(folder)


def _become_the_program(request: dict, stdin: int, user: int | None, folder: str | None, status: int) -> None:
    """In the child: gives up everything, then executes Python. Never returns."""
    try:
        os.dup2(stdin, 0)
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # After the change of user, which would clear it.
        call("prctl", PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        drop_capabilities()
        if folder is not None:
            landlock.restrict(request["readable"], request["devices"], folder)
        else:
            # Counted for this user alone. With Landlock it would count all that the caller runs.
            _limit(resource.RLIMIT_NPROC, request["threads"])
        os.umask(0o077)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
        _limit(resource.RLIMIT_FSIZE, request["disk_bytes"])
        _limit(resource.RLIMIT_CPU, request["cpu_seconds"])
        _limit(resource.RLIMIT_AS, request["memory_bytes"])
        seccomp.install()
        # The order of sets of strings is part of what a program does: the same in each run.
        os.execve(request["python"], [request["python"], "-sPSBc", _BOOT], {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"})
    except OSError as error:
        os.write(status, f"error {error}\n".encode())
    finally:
        os._exit(127)


def _limit(kind: int, value: int) -> None:
    """Soft and hard; never above what the caller itself is limited to."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _watch(child: int, proc: int, folder: str | None, threads: int, disk_bytes: int) -> str:
    """Waits for the end of the program, and kills it where the caller or a limit says so: the reason, or "none"."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(0, select.POLLIN)
    reason = "none"
    while reason == "none":
        ready = [descriptor for descriptor, _ in poll.poll(_POLL_MILLISECONDS)]
        if ended in ready:
            return reason
        if 0 in ready:
            reason = "caller"
        elif _thread_count(child, proc) > threads:
            reason = "threads"
        elif folder is not None and _is_over(folder, disk_bytes):
            reason = "disk"
    os.kill(child, _SIGKILL)
    return reason


def _thread_count(child: int, proc: int) -> int:
    try:
        return os.stat(f"{child}/task", dir_fd=proc).st_nlink - 2
    except FileNotFoundError:
        return 0


def _is_over(folder: str, limit: int) -> bool:
    """Whether a folder holds more bytes, entries or levels than it may; also where it hides them."""
    size, entries, todo = 0, 0, [folder]
    while todo:
        try:
            with os.scandir(todo.pop()) as found:
                for entry in found:
                    status = entry.stat(follow_symlinks=False)
                    size += status.st_blocks * 512
                    entries += 1
                    deep = entry.path.count("/") - folder.count("/") > _MAX_SCRATCH_DEPTH
                    if size > limit or entries > _MAX_SCRATCH_ENTRIES or deep:
                        return True
                    if stat.S_ISDIR(status.st_mode):
                        todo.append(entry.path)
        except FileNotFoundError:
            # The program is at work meanwhile.
            continue
        except OSError:
            # A mode, or a path too long to open, that hides what is below.
            return True
    return False


def _remove(folder: str) -> None:
    """Removes a folder however deeply its program nested it: what lies in a folder is first moved up."""
    while names := os.listdir(folder):
        for name in names:
            path = f"{folder}/{name}"
            if not _opened(path):
                os.unlink(path)
                continue
            for inner in os.listdir(path):
                # Moving a folder takes the right to write into it.
                _opened(f"{path}/{inner}")
                os.rename(f"{path}/{inner}", f"{folder}/moved-{os.urandom(16).hex()}")
            os.rmdir(path)
    os.rmdir(folder)


def _opened(path: str) -> bool:
    """Whether this is a folder, which is now accessible whatever its mode was."""
    if os.path.islink(path) or not os.path.isdir(path):
        return False
    os.chmod(path, 0o700)
    return True


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
