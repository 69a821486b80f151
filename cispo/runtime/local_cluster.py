"""The Ray cluster that a run starts for itself on this machine: private, deaf to signals, watched.

    start --> gcs_server, raylet ... in sessions of their own --check--> RunError where one of them is gone
              workers: executed by the raylet, or forks of a server of ours (`fork_server`)
              a folder in the temporary one, mode 0700        --stop--> no process and no folder is left

A batch system signals the process group of a run, or all its processes. Only the driver heeds that: it finishes the
step and saves, and needs its actors meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cispo.errors import RunError, UserError
from cispo.files import temporary_folder
from cispo.runtime.fork_server import ForkServer, Imports
from cispo.runtime.orphans import watch_over

_PREFIX = "cispo-ray-"
_INNER = "r"
# The longest path of Ray below the folder that holds ours. Linux takes 107 bytes as the path of a socket.
_LONGEST = f"/{_PREFIX}12345678/{_INNER}/session_2026-11-28_12-00-00_000000_{os.getpid()}/sockets/plasma_store"
_MAX_ROOT = 107 - len(_LONGEST)

_END_SECONDS = 10.0


class LocalCluster:
    """A cluster of this process, from its start to `stop`."""

    def __init__(self, init: Callable[..., object], cpus: int, imports: Imports | None) -> None:
        """`init` is ray.init, but for some arguments. Workers are forks with `imports`, or executed.

        Raises UserError where no folder can hold Ray's sockets, RunError where Ray does not start.
        """
        self._servers: dict[str, psutil.Process] = {}
        self._forks: ForkServer | None = None
        self._sessions: set[int] = set()
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(temporary_folder(_PREFIX, root_folder(), stale=_PREFIX))
        watch_over(folder)
        try:
            if imports is not None:
                self._forks = ForkServer(folder / "forks", imports)
                self._sessions.add(self._forks.process.pid)
            with _starting(self._note, partial(_with_forks, self._forks)):
                # Ray gives its folder the mode 0777; the one above keeps other users out.
                init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=str(folder / _INNER))
        except BaseException as error:
            self._end_processes()
            self._stack.close()
            if isinstance(error, Exception):
                raise RunError(f"Ray did not start: {' '.join(str(error).split()):.300}") from None
            raise

    def _note(self, command: str, pid: int) -> None:
        self._sessions.add(pid)
        name = {"gcs_server": "GCS", "raylet": "raylet"}.get(Path(command).name)
        if name is not None:
            self._servers[name] = psutil.Process(pid)

    def check(self) -> None:
        """Raises RunError where one of Ray's servers has ended."""
        for name, server in self._servers.items():
            if not _is_running(server):
                raise RunError(f"Ray's {name} (process {server.pid}) ended unexpectedly")

    @property
    def is_alive(self) -> bool:
        return all(map(_is_running, self._servers.values()))

    def stop(self) -> None:
        """Ends all processes and removes the folder."""
        import ray

        if not self.is_alive:
            # Calls to a server that is gone would block for a minute.
            self._end_processes()
        ray.shutdown()
        self._end_processes()
        self._stack.close()

    def _end_processes(self) -> None:
        """Kills the processes of the cluster's sessions, also those that outlived their parents."""
        if self._forks is not None:
            self._forks.close()
        ours = [process for process in psutil.process_iter() if _session(process.pid) in self._sessions]
        for process in ours:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(ours, timeout=_END_SECONDS)


@contextlib.contextmanager
def _starting(note: Callable[[str, int], None], change: Callable[[list[str]], list[str]]) -> Iterator[None]:
    """A block in which Ray starts its servers: each in a session of its own, with SIGTERM, SIGHUP and SIGUSR1 off.

    They hand both on to the actors that they start. Ray itself does so for SIGINT alone. Left out are the servers that
    scale a cluster, show it and send its logs to the driver; stand-ins take the place of the agents without which a
    raylet does not start. Together they took three processor seconds of a start, most of them waited for.
    """
    from ray._private import node, services, worker

    original = services.ConsolePopen

    class Apart(original):
        def __init__(self, command: list[str], *args: Any, preexec_fn: Callable[[], None], **kwargs: Any) -> None:
            command = change(_without_agents(command))

            def prepare() -> None:
                preexec_fn()
                # Ignored, SIGTERM would come back: the servers set handlers for it.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                for number in (signal.SIGHUP, signal.SIGUSR1):
                    signal.signal(number, signal.SIG_IGN)

            super().__init__(command, *args, preexec_fn=prepare, start_new_session=True, **kwargs)
            note(command[0], self.pid)

        def terminate(self) -> None:
            self.kill()

    # Ray's report of a raylet that died, with 20 lines of its log: `check` says it in a sentence.
    worker.print_to_stdstream = lambda *args, **kwargs: None
    services.ConsolePopen = Apart
    left_out = {name: getattr(node.Node, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")}
    for name in left_out:
        setattr(node.Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        services.ConsolePopen = original
        for name, method in left_out.items():
            setattr(node.Node, name, method)


# Agent of a node -> the ports that its raylet waits for. They gather metrics and install the environments of jobs; the
# actors of this cluster have no such environment.
_AGENTS = {
    "--dashboard_agent_command": ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"),
    "--runtime_env_agent_command": ("runtime_env_agent_port",),
}

# Ray reads -1 as a service that is not there, and ends a node that has lost an agent. The pipe that an agent reads from
# ends with its raylet; signals that a shell ignores stay ignored in what it executes.
_STAND_IN = """trap "" HUP INT TERM USR1
node=$1; cd "$2"; shift 2
for port; do printf %s -1 > ".$port" && mv ".$port" "${port}_$node"; done
test -p /dev/stdin || exec sleep 2147483647
exec cat
"""


def _without_agents(command: Sequence[str]) -> list[str]:
    """The command of a raylet with a shell that reports no ports for each of its agents; any other as it is."""
    given = _options(command)
    if not _AGENTS.keys() <= given.keys() or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return [*command]
    session = given["--session_dir"]
    script = Path(session) / "agent.sh"
    script.write_text(_STAND_IN)
    return _changed(
        command,
        {option: ["/bin/sh", str(script), given["--node_id"], session, *ports] for option, ports in _AGENTS.items()},
    )


_WORKERS, _AT_ONCE = "--python_worker_command", "--num_prestart_python_workers"


def _with_forks(forks: ForkServer | None, command: Sequence[str]) -> list[str]:
    """The command of a raylet that forks its workers, on demand; any other as it is.

    Those that Ray starts ahead would hold up the driver, with Python's lock held, until all of them had their imports.
    """
    given = _options(command)
    if forks is None or not {_WORKERS, _AT_ONCE} <= given.keys():
        return [*command]
    return _changed(command, {_WORKERS: forks.command(shlex.split(given[_WORKERS])), _AT_ONCE: ["0"]})


def _options(command: Sequence[str]) -> Mapping[str, str]:
    return dict(item.split("=", 1) for item in command if "=" in item)


def _changed(command: Sequence[str], options: Mapping[str, Sequence[str]]) -> list[str]:
    """The command with other values, themselves commands, of its `--name=value` options."""
    values = {name: subprocess.list2cmdline(value) for name, value in options.items()}
    return [f"{name}={values[name]}" if (name := item.partition("=")[0]) in values else item for item in command]


def root_folder() -> Path:
    """The folder for the cluster's own one. Raises UserError where none can be written and has a short enough path."""
    if os.environ.get("RAY_TMPDIR"):
        given = os.path.abspath(os.environ["RAY_TMPDIR"])
        if not _can_be_written(given):
            raise UserError(f"RAY_TMPDIR {given} is not a folder that can be written")
        if len(os.fsencode(given)) > _MAX_ROOT:
            raise UserError(f"RAY_TMPDIR {given} is too long for the paths of Ray's sockets: {_MAX_ROOT} bytes at most")
        return Path(given)
    try:
        candidates = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    except FileNotFoundError as error:
        raise UserError(f"there is no temporary folder that can be written: {error.strerror}") from None
    for folder in candidates:
        if len(os.fsencode(folder)) <= _MAX_ROOT and _can_be_written(folder):
            return Path(folder)
    raise UserError(f"TMPDIR {candidates[0]} is too long for the paths of Ray's sockets: {_MAX_ROOT} bytes at most")


def _can_be_written(folder: str) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _session(pid: int) -> int:
    """Session id of a process, 0 where it is gone."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0
