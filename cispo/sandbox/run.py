"""Sandbox for untrusted Python code, such as a model's: a fresh interpreter that can do nothing but compute.

    run_python(code) --> launcher (`launcher`) --> the program: no network, no processes, no files but its own
                     <-- stdout, stderr, exit code, and the limit that stopped it

The first of two mechanisms that works on this machine is used; each is complete by itself:

    namespaces   the program is alone on a machine of its own, which holds nothing but Python. Needs root, or a kernel
                 that lets users make user namespaces.
    landlock     the program sees this machine but may not open its files. Needs Linux 5.13 or newer, and no privileges.

Both add the same filter on system calls and the same limits, so a program does the same on a laptop and in a
container. The filter denies fork, so a program is one process: a limit on a process is a limit on the program, and a
fork bomb is one failed call. On a machine without either mechanism no such code is run: UserError.
"""

from __future__ import annotations

import marshal
import math
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from cispo.errors import RunError, UserError
from cispo.sandbox.launcher import HEADER

Mechanism = Literal["namespaces", "landlock"]
Stop = Literal["time", "memory", "output", "disk", "threads"]

Dialogue = Callable[[bytes], bytes | None]
"""From each new part of a program's stdout to more of its stdin; None for its end."""

MAX_THREADS = 64
"""Largest number of threads of a program."""
START_SECONDS = 30
"""Limit for building a sandbox. It takes some 20 ms, but the machine may be busy."""
END_SECONDS = 10
"""Limit for ending a sandbox."""

_REASONS: dict[str, Stop] = {"time": "time", "disk": "disk", "threads": "threads"}

_PROJECT = str(Path(__file__).parents[2])
"""The folder that contains the package `cispo`."""
_BOOT = "import sys; sys.path.append({project!r}); from cispo.sandbox.launcher import main; main({status})"
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_TRY_TO_ESCAPE = """
import os, socket
attempts = [socket.socket, os.fork, lambda: os.listdir("/proc"), lambda: open({secret!r}), lambda: open("/out", "w"),
            lambda: os.kill(os.getppid(), 0), lambda: os.chmod("/", 0o755)]
for number, attempt in enumerate(attempts):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit(f"attempt {{number}} to escape succeeded")
print("contained")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxResult:
    """Output and end of a program.

    Example: SandboxResult(stdout="42\\n", stderr="", exit_code=0, stopped=None)
    """

    stdout: str
    """Decoded as UTF-8, invalid bytes as U+FFFD. Cut at `output_kb`, where the program is killed."""
    stderr: str
    """As stdout; holds the traceback."""
    exit_code: int
    """Negative: minus the number of the signal that ended it."""
    stopped: Stop | None
    """The limit that ended it. A file that grows too large raises OSError in the program, as does a socket."""

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and self.stopped is None


def run_python(
    code: str,
    *,
    stdin: str | Dialogue = "",
    timeout: float = 5.0,
    memory_mb: int = 512,
    disk_mb: int = 16,
    output_kb: int = 1024,
    mechanism: Mechanism | None = None,
) -> SandboxResult:
    """Runs a program in a sandbox and waits for its end.

    It has the standard library and nothing else, an empty environment, `stdin` (a text, or answers to its output), and
    an empty folder to work in, which is removed afterwards. `timeout` limits the wall clock, and the CPU time of all
    threads (rounded up), in seconds; `memory_mb` the address space, `disk_mb` the files, `output_kb` stdout and stderr
    each. `mechanism` is by default the first that works on this machine.

    Raises UserError where this machine cannot contain a program, RunError where the sandbox itself failed.
    """
    limits = _Limits(timeout, memory_mb << 20, disk_mb << 20, output_kb << 10)
    return _run(code, stdin, limits, mechanism or available_mechanisms()[0])


@cache
def available_mechanisms() -> tuple[Mechanism, ...]:
    """The mechanisms that contain a program on this machine, the better one first. Each is tried by an escape attempt.

    Raises UserError where there is none.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise UserError(
            "model-written code runs on Linux on x86_64 or aarch64 only, which this machine is not: nothing else here "
            "can contain it"
        )
    works: list[Mechanism] = []
    problems: list[str] = []
    for mechanism in ("namespaces", "landlock"):
        try:
            with tempfile.NamedTemporaryFile() as secret:
                code = _TRY_TO_ESCAPE.format(secret=secret.name)
                result = _run(code, "", _Limits(20.0, 1 << 29, 1 << 20, 1 << 16), mechanism)
        except RunError as error:
            problems.append(f"{mechanism}: {error}")
            continue
        if result.stdout == "contained\n" and result.ok:
            works.append(mechanism)
        else:
            problems.append(f"{mechanism}: {' '.join(result.stderr.split()[-20:]) or result.stopped}")
    if not works:
        raise UserError(
            "model-written code cannot be contained on this machine, so it is not run: allow user namespaces or start "
            f"the kernel with Landlock ({'; '.join(problems)})"
        )
    return tuple(works)


@dataclass(frozen=True, slots=True)
class _Limits:
    """`timeout` in seconds, all others in bytes."""

    timeout: float
    memory: int
    disk: int
    output: int


def _run(code: str, stdin: str | Dialogue, limits: _Limits, mechanism: Mechanism) -> SandboxResult:
    python, readable, devices = _interpreter()
    theirs, ours = (-1, -1) if isinstance(stdin, str) else os.pipe()
    request = {
        "mechanism": mechanism,
        "code": code.encode(errors="replace"),
        "stdin": stdin.encode(errors="replace") if isinstance(stdin, str) else theirs,
        "python": python,
        "readable": readable,
        "devices": devices,
        "scratch": tempfile.gettempdir(),
        "cpu_seconds": max(1, math.ceil(limits.timeout)),
        "memory_bytes": limits.memory,
        "disk_bytes": limits.disk,
        "threads": MAX_THREADS,
    }
    report, status = os.pipe()
    with open(report, "rb", buffering=0) as reports, _Answers(stdin, ours) as answers:
        try:
            launcher = subprocess.Popen(
                [python, "-I", "-S", "-c", _BOOT.format(project=_PROJECT, status=status)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(status,) if isinstance(stdin, str) else (status, theirs),
                # A signal that kills the caller's process group leaves the launcher alive to clean up.
                start_new_session=True,
                env={},
                cwd="/",
                bufsize=0,
            )
        finally:
            os.close(status)
            if not isinstance(stdin, str):
                os.close(theirs)
        try:
            outcome = _Conversation(launcher, reports, limits, answers)
            outcome.hold(marshal.dumps(request))
        finally:
            _end(launcher)
    return outcome.result()


class _Answers:
    """The caller's end of a program's stdin: what it answers to the program's output, sent as the pipe takes it."""

    def __init__(self, dialogue: str | Dialogue, pipe: int) -> None:
        self._dialogue, self._pipe = dialogue, pipe
        self._waiting = bytearray()
        self._ends = False

    def __enter__(self) -> _Answers:
        if self._pipe >= 0:
            os.set_blocking(self._pipe, False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def hear(self, output: bytes, selector: selectors.BaseSelector) -> None:
        """Takes a part of the program's stdout."""
        if self._pipe < 0 or self._ends or isinstance(self._dialogue, str):
            return
        answer = self._dialogue(output)
        self._ends = answer is None
        if not self._waiting and (answer or self._ends):
            selector.register(self._pipe, selectors.EVENT_WRITE, "stdin")
        self._waiting += answer or b""

    def send(self, selector: selectors.BaseSelector) -> None:
        """Writes as much as the pipe takes, and closes it after the last answer."""
        try:
            if self._waiting:
                del self._waiting[: os.write(self._pipe, self._waiting)]
        except BlockingIOError:
            return
        except BrokenPipeError:
            # The program has ended, or closed its stdin.
            self._waiting.clear()
            self._ends = True
        if not self._waiting:
            selector.unregister(self._pipe)
            if self._ends:
                self.__exit__()


class _Conversation:
    """Reads the output of a launcher and its program, and orders their end at a limit."""

    def __init__(
        self, launcher: subprocess.Popen[bytes], reports: IO[bytes], limits: _Limits, answers: _Answers
    ) -> None:
        assert launcher.stdin and launcher.stdout and launcher.stderr
        self._orders = launcher.stdin
        self._sources = {"stdout": launcher.stdout, "stderr": launcher.stderr, "report": reports}
        self._texts = {name: bytearray() for name in self._sources}
        self._limits = limits
        self._answers = answers
        self._stopped: Stop | None = None
        self._started = False
        self._deadline = 0.0

    def hold(self, request: bytes) -> None:
        """Sends the request, and reads until both have closed their outputs or fail to end in time."""
        try:
            # A raw pipe may take only a part of a write.
            rest = memoryview(HEADER.pack(len(request)) + request)
            while rest:
                rest = rest[self._orders.write(rest) :]
        except BrokenPipeError:
            # The launcher ended early; its report or stderr tells why.
            pass
        self._deadline = time.monotonic() + START_SECONDS
        with selectors.DefaultSelector() as selector:
            for name, source in self._sources.items():
                selector.register(source, selectors.EVENT_READ, name)
            while selector.get_map():
                ready = selector.select(max(0.0, self._deadline - time.monotonic()))
                for key, _ in ready:
                    if key.data == "stdin":
                        self._answers.send(selector)
                    elif not self._take(key.data, chunk := os.read(key.fd, 1 << 16)):
                        selector.unregister(key.fileobj)
                    elif key.data == "stdout":
                        self._answers.hear(chunk, selector)
                if not self._started and b"started\n" in self._texts["report"]:
                    self._started = True
                    self._deadline = time.monotonic() + self._limits.timeout
                if time.monotonic() >= self._deadline:
                    if self._orders.closed:
                        return
                    self._stop("time")

    def _take(self, name: str, chunk: bytes) -> bool:
        """Keeps the chunk up to the output limit; False at the end of the stream."""
        text = self._texts[name]
        free = self._limits.output - len(text)
        text += chunk[:free]
        if len(chunk) > free:
            self._stop("output")
        return bool(chunk)

    def _stop(self, reason: Stop) -> None:
        if not self._orders.closed:
            self._orders.close()
            self._stopped = reason
            self._deadline = time.monotonic() + END_SECONDS

    def result(self) -> SandboxResult:
        report = self._texts["report"].decode(errors="replace")
        stdout, stderr = (self._texts[name].decode(errors="replace") for name in ("stdout", "stderr"))
        words = report.rpartition("exit ")[2].split()
        if "error " in report or len(words) != 2:
            raise RunError(
                f"the sandbox failed: {report.partition('error ')[2].strip() or report + stderr or 'no reason'}"
            )
        exit_code = int(words[0])
        # The launcher's reason wins: a program that ended by itself just before the caller's order was in time. Cut
        # output counts in any case.
        told = words[1] == "caller" or self._stopped == "output"
        stopped = self._stopped if told else _REASONS.get(words[1])
        # At the memory limit Python raises MemoryError, which ends a program that does not catch it.
        if stopped is None and exit_code != 0 and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
            stopped = "memory"
        return SandboxResult(stdout=stdout, stderr=stderr, exit_code=exit_code, stopped=stopped)


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Gives the launcher time to clean up, then kills it together with its program."""
    pipes = [pipe for pipe in (launcher.stdin, launcher.stdout, launcher.stderr) if pipe]
    for pipe in pipes:
        pipe.close()
    try:
        launcher.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


@cache
def _interpreter() -> tuple[str, list[str], list[str]]:
    """(path of the real Python behind a virtual environment, files and folders that it reads, devices)."""
    python = os.path.realpath(sys.executable)
    prefix = Path(python).parents[1]
    library = [os.path.dirname(os.__file__), prefix / "lib", prefix / "lib64"]
    wanted = [python, *map(os.path.realpath, library), *_LIBRARIES]
    found = sorted({path for path in wanted if os.path.exists(path)})
    covered = [path for path in found if any(path.startswith(f"{other}/") for other in found)]
    devices = [device for device in _DEVICES if os.path.exists(device)]
    return python, [path for path in found if path not in covered], devices
