"""Workers are forked from a process with the imports, and executed where a fork would be broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cispo.runtime.fork_server import CLIENT, ForkServer, Import, Imports, worker_argv

ROOT = Path(__file__).parents[1]

WORKER = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "name": __name__, "parent": os.getppid(), "folder": os.getcwd(), "mark": os.environ.get("MARK"),
    "gone": "GONE" in os.environ, "imported": "sched" in sys.modules, "umask": os.umask(0), "nice": os.nice(0),
    "hup": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "int": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    "blocked": [*signal.pthread_sigmask(signal.SIG_BLOCK, ())], "path": sys.path[0],
}), flush=True)
"""

# Actors say where they come from; one is killed, and the others go on; the server is, and another actor starts.
PROGRAM = """
import asyncio, os, signal, sys
import psutil
from cispo.runtime import cluster
from cispo.runtime.actors import RayRuntime
from cispo.runtime.fork_server import Import, Imports
from cispo.runtime.watchdog import Activity
from tests.test_fork_server import Place

runtime = RayRuntime(processes=4, activity=Activity(), imports=Imports((Import("sched:scheduler"),)))
server = cluster._local._forks.process

async def work():
    first, second = await asyncio.gather(*(runtime.start(Place, name=name) for name in ("first", "second")))
    for handle in (first, second):
        _, parent, imported = await handle.call("look")
        print("forked", parent == server.pid, imported, 0 < handle.parts["process"] < 60)
    os.kill((await second.call("look"))[0], signal.SIGKILL)
    await asyncio.sleep(1)
    another = await runtime.start(Place, name="another")
    print("alive", (await first.call("look"))[1:] == (await another.call("look"))[1:] == (server.pid, True))
    server.kill()
    server.wait()
    third = await runtime.start(Place, name="third")
    _, parent, imported = await third.call("look")
    print("executed", parent != server.pid, imported)

asyncio.run(work())
runtime.close()
print("closed", all("orphans" in " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)))
"""


class Place:
    """An actor that says where it comes from."""

    def look(self) -> tuple[int, int, bool]:
        return os.getpid(), os.getppid(), "sched" in sys.modules

    def close(self) -> None:
        pass


def leave_a_thread() -> None:
    """An import that no fork may follow."""
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def test_workers_of_a_cluster() -> None:
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    lines = [*["forked True True True"] * 2, "alive True", "executed True False", "closed True"]
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (lines, "", 0)


@pytest.mark.parametrize("forkable", [True, False])
def test_a_worker_has_the_state_of_its_client(tmp_path: Path, forkable: bool) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    setup = tmp_path / "setup.py"
    setup.write_text("import os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:-1]])\n")
    imports = [Import("sched:scheduler")]
    if not forkable:
        imports.append(Import("tests.test_fork_server:leave_a_thread"))
    os.environ["GONE"] = "1"
    try:
        server = ForkServer(tmp_path / "forks", Imports(tuple(imports)))
    finally:
        del os.environ["GONE"]
    program = (
        "import os, signal, sys; os.umask(0o27); os.nice(3); signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2}); os.execv(sys.argv[1], sys.argv[1:])"
    )
    worker = [sys.executable, str(setup), str(script), "--a=b", "--language=PYTHON"]
    try:
        command = server.command(worker)
        assert command[3] == str(CLIENT)
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            cwd=tmp_path,
            env={**os.environ, "MARK": "x"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        said = json.loads(done.stdout)
        forked = said.pop("parent") == server.process.pid
    finally:
        server.close()
    assert forked == said.pop("imported") == forkable
    assert said == {
        "argv": [str(script), "--a=b"],
        "name": "__main__",
        "folder": str(tmp_path),
        "mark": "x",
        "gone": False,
        "umask": 0o27,
        "nice": min(os.nice(0) + 3, 19),
        "hup": True,
        "int": False,
        "blocked": [12],
        "path": str(tmp_path),
    }


def test_a_worker_with_a_runtime_environment_is_executed() -> None:
    """Ray's setup script makes it; what it needs besides is left to it."""
    worker = ["setup.py", "-s", "worker.py", "--a=b", "--language=PYTHON"]
    empty, own = ({"env_vars": value, "py_executable": "python"} for value in ({}, {"A": "1"}))
    option = "--serialized-runtime-env-context="
    assert worker_argv(worker) == ["worker.py", "--a=b"]
    assert worker_argv([*worker, option + json.dumps(empty)]) == ["worker.py", "--a=b"]
    assert worker_argv([*worker, option + json.dumps(own)]) is None
