"""The process between a caller and a sandboxed program: builds the sandbox, starts and watches the program, cleans up.

    caller  -- request on stdin -->  launcher  -- fork, confine, exec -->  the program, a fresh Python
            <-- "started", "exit 0", or "error ..." on a pipe of its own --
            <-- the program's stdout and stderr, which only the caller reads --

stdin stays open while the caller lives: its end is the order to kill the program. When the launcher dies, the kernel
kills the program. One launcher serves one program, so nothing of one program can reach another.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
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
_SPARED = (1, 10, 15)
"""SIGHUP, SIGUSR1 and SIGTERM, which batch systems send to every process of a job: the caller's are heeded."""
_POLL_MILLISECONDS = 50
_CLOCK_SKEW = 0.05
_MAX_OPEN_FILES = 64
_MAX_SCRATCH_ENTRIES = 2048
_MAX_SCRATCH_DEPTH = 64

# `exit` and `quit` come from `site`, which takes 35 ms and reads the installed packages. A name that this code left
# behind would hide a missing import of the program, so it leaves none.
_BOOT = (
    'for __file__ in ("exit", "quit"):\n'
    '    setattr(__import__("builtins"), __file__, __import__("_sitebuiltins").Quitter(__file__, "Ctrl-D"))\n'
    '__import__("os").environ.clear()\n'
    '__import__("sys").argv[:] = ["main.py"]\n'
    '__file__ = "main.py"\n'
    'exec((lambda file: (compile(file.read(), "main.py", "exec"), file.close())[0])(open("main.py", "rb")))'
)


def main(status: int) -> None:
    """Runs the request that comes on stdin; `status` is the file descriptor of the reports."""
    os.set_inheritable(status, False)
    for number in _SPARED:
        _signal.signal(number, _signal.SIG_IGN)
    try:
        with open(0, "rb", closefd=False) as stdin:
            (size,) = HEADER.unpack(stdin.read(HEADER.size))
            request = marshal.loads(stdin.read(size))
        os.write(status, _run(request, status).encode())
    except OSError as error:
        os.write(status, f"error {error}\n".encode())


def _run(request: dict, status: int) -> str:
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    code, paths = request["code"], (request["readable"], request["devices"])
    # A text, or the descriptor of a pipe.
    data, stdin = (request["stdin"], -1) if isinstance(request["stdin"], bytes) else (b"", request["stdin"])
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
        if stdin < 0:
            _write("stdin", data)
            stdin = os.open("stdin", os.O_RDONLY)
            os.unlink("stdin")
        os.set_inheritable(stdin, False)
        child = os.fork()
        if child == 0:
            _become_the_program(request, stdin, user, folder, status)
        for descriptor in (1, 2, stdin):
            os.close(descriptor)
        os.write(status, b"started\n")
        stopped = _watch(child, proc, folder, request["threads"], request["disk_bytes"] + len(code) + len(data))
        _, ending, usage = os.wait4(child, 0)
        # The clock by which the kernel kills may be ahead of the CPU time that it reports.
        if ending == _SIGKILL and usage.ru_utime + usage.ru_stime >= request["cpu_seconds"] - _CLOCK_SKEW:
            stopped = "time"
        return f"exit {os.waitstatus_to_exitcode(ending)} {stopped}\n"
    finally:
        if folder is not None:
            _remove(folder)


def _become_the_program(request: dict, stdin: int, user: int | None, folder: str | None, status: int) -> None:
    """In the child: gives up every right, then executes Python. Never returns."""
    try:
        os.dup2(stdin, 0)
        for number in _SPARED:
            _signal.signal(number, _signal.SIG_DFL)
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # After the change of user, which would clear this setting.
        call("prctl", PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        drop_capabilities()
        if folder is not None:
            landlock.restrict(request["readable"], request["devices"], folder)
        else:
            # Linux counts processes by user. The program has a user of its own here; with Landlock it has the caller's.
            _limit(resource.RLIMIT_NPROC, request["threads"])
        os.umask(0o077)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
        _limit(resource.RLIMIT_FSIZE, request["disk_bytes"])
        _limit(resource.RLIMIT_CPU, request["cpu_seconds"])
        _limit(resource.RLIMIT_AS, request["memory_bytes"])
        seccomp.install()
        # A fixed hash seed: the order of sets of strings, and so a program's output, is the same in each run.
        os.execve(request["python"], [request["python"], "-sPSBc", _BOOT], {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"})
    except OSError as error:
        os.write(status, f"error {error}\n".encode())
    finally:
        os._exit(127)


def _limit(kind: int, value: int) -> None:
    """Sets the soft and the hard limit, never above the caller's own hard limit."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _watch(child: int, proc: int, folder: str | None, threads: int, disk_bytes: int) -> str:
    """Waits for the program's end, or kills it by order of the caller or at a limit; returns that reason, or "none"."""
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
        elif folder is not None and _is_over(folder, disk_bytes, _held_bytes(child, proc, folder)):
            reason = "disk"
    os.kill(child, _SIGKILL)
    return reason


def _thread_count(child: int, proc: int) -> int:
    try:
        return os.stat(f"{child}/task", dir_fd=proc).st_nlink - 2
    except FileNotFoundError:
        return 0


def _held_bytes(child: int, proc: int, folder: str) -> float:
    """Bytes of the deleted files of a folder that the program keeps; infinite where it hides one.

    An open file has a size. A mapping without a descriptor hides the size of its file.
    """
    inside = os.fsencode(os.path.realpath(folder)) + b"/"
    try:
        # Twice, because the program runs meanwhile and may map or close a file between the two lists.
        for _ in range(2):
            mapped, opened = _mapped_files(child, proc, inside), _deleted_files(child, proc, inside)
            if all(len(inodes) <= len(opened.get(path, ())) for path, inodes in mapped.items()):
                return sum(size for files in opened.values() for size in files.values())
    except (FileNotFoundError, ProcessLookupError):
        # It has ended.
        return 0
    except OSError:
        pass
    return float("inf")


def _mapped_files(child: int, proc: int, inside: bytes) -> dict[bytes, set[bytes]]:
    """Path -> inodes of the deleted files that the program has mapped."""
    found: dict[bytes, set[bytes]] = {}
    with open(os.open(f"{child}/maps", os.O_RDONLY, dir_fd=proc), "rb") as lines:
        for line in lines:
            place = line.rstrip(b"\n").split(maxsplit=5)
            if place[-1].startswith(inside) and place[-1].endswith(b" (deleted)"):
                found.setdefault(place[-1], set()).add(b" ".join(place[3:5]))
    return found


def _deleted_files(child: int, proc: int, inside: bytes) -> dict[bytes, dict[int, int]]:
    """Path -> inode -> bytes of the deleted files that the program has open."""
    found: dict[bytes, dict[int, int]] = {}
    folder = os.open(f"{child}/fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    try:
        for descriptor in os.listdir(folder):
            try:
                status = os.stat(descriptor, dir_fd=folder)
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    path = os.fsencode(os.readlink(descriptor, dir_fd=folder))
                    if path.startswith(inside):
                        found.setdefault(path, {})[status.st_ino] = status.st_blocks * 512
            except FileNotFoundError:
                continue
    finally:
        os.close(folder)
    return found


def _is_over(folder: str, limit: int, size: float) -> bool:
    """Whether a folder, with `size` bytes beside it, exceeds the limit on bytes, entries or levels.

    An unreadable part counts as over the limit.
    """
    entries, todo = 0, [folder]
    if size > limit:
        return True
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
            # The program has removed it meanwhile.
            continue
        except OSError:
            # A mode, or a path too long to open, hides the contents.
            return True
    return False


def _remove(folder: str) -> None:
    """Removes a folder of any depth: the entries of a subfolder are first moved up."""
    while names := os.listdir(folder):
        for name in names:
            path = f"{folder}/{name}"
            if not _opened(path):
                os.unlink(path)
                continue
            for inner in os.listdir(path):
                # Moving a folder needs the right to write into it.
                _opened(f"{path}/{inner}")
                os.rename(f"{path}/{inner}", f"{folder}/moved-{os.urandom(16).hex()}")
            os.rmdir(path)
    os.rmdir(folder)


def _opened(path: str) -> bool:
    """Whether the path is a folder; if so, makes it accessible."""
    if os.path.islink(path) or not os.path.isdir(path):
        return False
    os.chmod(path, 0o700)
    return True


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
