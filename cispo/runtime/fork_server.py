"""The worker processes of a run's own cluster, forked from one process that has imported the libraries.

    driver --socket, imports--> fork server: imports ... first request, Ray ... a fork for each
    raylet --worker command---> fork client (fork_client.py) --request--> child: Ray's worker script, as if executed
                                       '--no answer--> Ray's worker script, executed by the client itself

An executed worker of Ray imports Ray twice, then torch, and vLLM in an engine: three and more processor seconds each,
in all processes at once. A child has them at its first instruction, and shares their memory.

Ray reads its environment when it is imported, the job's number for one: the server imports Ray, and all that may, once
it has that of a request. A child has the client's environment, folder, standard streams, priority, limits and signals.
Imports must leave no thread and no CUDA context behind, of which a child would have a broken copy: the server then ends
instead, and clients execute. It ends with its driver.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import IO, NamedTuple, NoReturn

from cispo.runtime.garbage import no_collections

CLIENT = Path(__file__).with_name("fork_client.py")

# Options of Ray's setup script, which imports Ray and executes the worker script behind it.
_RUNTIME_ENV, _LANGUAGE = "--serialized-runtime-env-context=", "--language="

# Ray's own for workers (worker_oom_score_adjustment): the kernel ends them before driver and raylet.
_OOM_SCORE = "1000"

_PROGRAM = "import sys; del sys.path[0]; from cispo.runtime.fork_server import main; main(*sys.argv[1:])"

asked: float = 0.0
"""Unix time of this process's request; 0 where it was not forked."""


class Import(NamedTuple):
    """A function that imports libraries.

    Example: Import("cispo.learner.learner:prepare", (False, "runs/a/initial", None))
    """

    function: str
    """"module:function"."""
    args: tuple[object, ...] = ()
    """Of JSON's types."""


class Imports(NamedTuple):
    """The imports of a fork server, in their order.

    Example: Imports(without_ray=(Import("cispo.learner.learner:prepare", (False, None, None)),))
    """

    without_ray: tuple[Import, ...] = ()
    """Made while Ray's servers start."""
    with_ray: tuple[Import, ...] = ()
    """Those that may import Ray themselves, such as vLLM's."""
    env: Mapping[str, str] = MappingProxyType({})
    """Settings that libraries read when they are imported, beside this process's environment."""


class ForkServer:
    """The server of this process; it ends with `close`, or with this process."""

    def __init__(self, path: Path, imports: Imports) -> None:
        """Listens at `path`, and begins to import."""
        self.path = path
        with socket.socket(socket.AF_UNIX) as listener:
            # Before any client asks: it would not wait for a server that does not listen.
            listener.bind(str(path))
            listener.listen(128)
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _PROGRAM,
                    str(listener.fileno()),
                    json.dumps([imports.without_ray, imports.with_ray]),
                ],
                pass_fds=(listener.fileno(),),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **imports.env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
                preexec_fn=_ignore_signals,
            )

    def command(self, worker: Sequence[str]) -> list[str]:
        """The command of a worker, [python, Ray's setup script, options of Python, worker script, ...], by a fork."""
        return [worker[0], "-I", "-S", str(CLIENT), str(self.path), *worker[1:]]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


class Request(NamedTuple):
    """A client's state, that a child takes."""

    argv: list[str]
    """[Ray's setup script, options of Python, worker script, its arguments ...]."""
    env: dict[str, str]
    folder: str
    umask: int
    niceness: int
    """Ray's for a worker, by default 15."""
    blocked: list[int]
    """Signals."""
    ignored: list[int]
    """Signals."""
    limits: dict[str, list[int]]
    """Name of a resource -> soft and hard limit."""
    asked: float
    """Unix time."""


def worker_argv(argv: Sequence[str]) -> list[str] | None:
    """[worker script, its arguments ...] of a request; None where it needs a runtime environment of its own."""
    script = next(i for i, item in enumerate(argv) if i and not item.startswith("-"))
    given = {name: item[len(name) :] for item in argv for name in (_RUNTIME_ENV, _LANGUAGE) if item.startswith(name)}
    environment: Mapping[str, object] = json.loads(given.get(_RUNTIME_ENV) or "{}")
    if any(value for name, value in environment.items() if name != "py_executable"):
        return None
    return [item for item in argv[script:] if not item.startswith((_RUNTIME_ENV, _LANGUAGE))]


def _serve(listener: socket.socket, driver: IO[bytes], prepare: Callable[[Mapping[str, str]], bool]) -> None:
    """Forks a child for each request until the driver's end of the pipe is closed.

    `prepare` is called with the environment of the first; no child is forked where it returns False.
    """
    rays: Mapping[str, str] | None = None
    while True:
        ready, _, _ = select.select([listener, driver], [], [])
        if driver in ready:
            return
        connection, _ = listener.accept()
        with connection:
            request, streams = _receive(connection)
            argv = None if request is None else worker_argv(request.argv)
            if request is not None and argv is not None:
                if rays is None:
                    rays = _of_ray(request.env)
                    if not prepare(request.env):
                        return
                if _of_ray(request.env) == rays and os.fork() == 0:
                    listener.close()
                    driver.close()
                    connection.sendall(b"+")
                    connection.close()
                    _become(request, argv, streams)
            for stream in streams:
                os.close(stream)


def _of_ray(env: Mapping[str, str]) -> Mapping[str, str]:
    """The variables that Ray reads when it is imported."""
    return {name: value for name, value in env.items() if name.startswith("RAY_")}


def _receive(connection: socket.socket) -> tuple[Request | None, list[int]]:
    """The request and its standard streams; None where the client is gone: it may have waited too long for Ray."""
    try:
        connection.sendall(b"?")
        size, ancillary, *_ = connection.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
        wanted = int.from_bytes(size, "big")
        text = b""
        while len(text) < wanted and (more := connection.recv(1 << 20)):
            text += more
    except OSError:
        return None, []
    streams = array.array("i")
    for _, _, data in ancillary:
        streams.frombytes(data)
    if not wanted or len(text) < wanted:
        return None, list(streams)
    return Request(**json.loads(text)), list(streams)


def _become(request: Request, argv: list[str], streams: Sequence[int]) -> NoReturn:
    """Runs Ray's worker script in this child, which ends with it."""
    global asked
    asked = request.asked
    for number in signal.valid_signals():
        if number in request.ignored:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request.env)
    os.setpgid(0, 0)  # as Ray's own: the raylet kills the group of a worker that has ended
    os.chdir(request.folder)
    os.umask(request.umask)
    os.nice(max(request.niceness - os.nice(0), 0))
    for name, limit in request.limits.items():
        resource.setrlimit(getattr(resource, name), (limit[0], limit[1]))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # as Python's own generator, which a fork seeds anew
    # The script's folder, as in a process that executes it.
    sys.path.insert(0, str(Path(argv[0]).parent))
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
    sys.exit()


def _is_forkable() -> bool:
    """Whether a child has all of this process: one thread, and no device of CUDA's driver."""
    return len(os.listdir("/proc/self/task")) == 1 and not any(map(_is_cuda, Path("/proc/self/fd").iterdir()))


def _is_cuda(file: Path) -> bool:
    try:
        return os.readlink(file).startswith("/dev/nvidia-uvm")
    except OSError:  # the folder's own, closed again
        return False


def _ignore_signals() -> None:
    """Signals to all processes of a run are for its driver."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def main(listener: str, imports: str) -> None:
    """Imports, then serves the socket of a file descriptor; ends where a fork would be broken. `imports`: JSON."""
    without_ray, with_ray = json.loads(imports)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray sets it in a worker, too late for a library that has read it
    _import(without_ray)

    def prepare(env: Mapping[str, str]) -> bool:
        os.environ.update(env)
        for module in ("ray", "ray._private.runtime_env.setup_hook", "cispo.runtime.host"):
            importlib.import_module(module)
        _import(with_ray)
        gc.freeze()  # a collection would write to the pages of these objects, and so copy them, in every child
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps children
        return _is_forkable()

    with socket.socket(fileno=int(listener)) as server:
        _serve(server, sys.stdin.buffer, prepare)


def _import(imports: Sequence[tuple[str, Sequence[object]]]) -> None:
    for function, args in imports:
        # A process that misses something imports it, and says what is wrong.
        with contextlib.suppress(Exception), no_collections():
            resolve_name(function)(*args)
