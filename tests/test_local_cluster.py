"""The Ray cluster of a run: private, deaf to the signals of a batch system, watched, and gone with the run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cispo.errors import UserError
from cispo.files import temporary_folder
from cispo.runtime import cluster, local_cluster

ROOT = Path(__file__).parents[1]

# Every process of the cluster gets the signals; then a server dies. Ray itself ends workers that are idle.
PROGRAM = """
import asyncio, contextlib, os, signal, stat, sys, time
import psutil
from cispo.errors import RunError
from cispo.runtime.actors import RayRuntime
from cispo.runtime.fork_server import Imports
from cispo.runtime.watchdog import Activity, guarded
from tests.test_concurrent_actors import Clerk

heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
activity = Activity()
runtime = RayRuntime(processes=1, activity=activity, imports=Imports())
os.kill(os.getpid(), signal.SIGTERM)
print("heard", len(heard))
me = psutil.Process()
folder = [p for p in os.scandir(os.environ["RAY_TMPDIR"]) if p.name.startswith("cispo-ray-")][0]
print("mode", oct(stat.S_IMODE(folder.stat().st_mode)))

def cluster(*without):
    commands = {}
    for process in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            commands[process] = " ".join(process.cmdline())
    return {p: c for p, c in commands.items() if not any(word in c for word in ("orphans", *without))}

async def work():
    clerk = await runtime.start(Clerk, name="clerk", concurrent=True)
    lasting = cluster("ray::IDLE", "default_worker.py")
    print("apart", all(os.getsid(p.pid) != os.getsid(0) for p in lasting), len(lasting) > 3)
    print("servers", *sorted(p.name() for p in lasting))
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        for process in cluster():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    await asyncio.sleep(2)
    ended = [command for p, command in lasting.items() if not p.is_running() or p.status() == psutil.STATUS_ZOMBIE]
    print("answers", await clerk.call("count"), "ended", ended)
    if sys.argv[1:]:
        [server] = [p for p in me.children() if p.name() == sys.argv[1]]
        server.kill()
        await asyncio.sleep(60)

try:
    asyncio.run(guarded(work(), activity, silence=0, say=print))
except RunError as error:
    print("said", str(error).split(" (")[0])
started = time.monotonic()
runtime.close()
print("left", list(cluster().values()))
print("folder", os.path.exists(folder.path), "late" if time.monotonic() - started > 50 else "soon")
"""


# No agent of Ray's among them, whose start a raylet waits for.
SERVERS = "servers cat cat gcs_server python ray::clerk"


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (None, []),
        ("gcs_server", ["said Ray's GCS"]),
        pytest.param("raylet", ["said Ray's raylet"], marks=pytest.mark.slow),
    ],
    ids=["none", "gcs", "raylet"],
)
def test_a_cluster_of_this_machine(server: str | None, said: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as root:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *([server] if server else [])],
            cwd=ROOT,
            env={**os.environ, "RAY_TMPDIR": root},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr
    lines = [
        "heard 1",
        "mode 0o700",
        "apart True True",
        SERVERS,
        "answers 0 ended []",
        *said,
        "left []",
        "folder False soon",
    ]
    assert done.stdout.splitlines() == lines and done.stderr == ""


def test_the_folder_of_the_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(UserError, match="^RAY_TMPDIR .* is too long for the paths of Ray's sockets: .. bytes at most"):
        cluster.check_settings()
    for unusable in (tmp_path / "none", "/proc", Path(__file__)):
        monkeypatch.setenv("RAY_TMPDIR", str(unusable))
        with pytest.raises(UserError, match=f"^RAY_TMPDIR {unusable} is not a folder that can be written"):
            cluster.check_settings()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    cluster.check_settings()
    # TMPDIR is not Ray's own: one that is too long is left for another.
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    root = local_cluster.root_folder()
    path = f"{root}/cispo-ray-12345678/r/session_2026-11-28_12-00-00_123456_{os.getpid()}/sockets/plasma_store"
    assert root != long and len(path) <= 107


def test_a_temporary_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from cispo.files import temporary_folder\n"
        "with temporary_folder('mine-a-', Path(sys.argv[1]), stale='mine-') as folder:\n"
        "    (folder / 'f').write_text('x'); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    (left,) = tmp_path.iterdir()
    (tmp_path / "others-b").mkdir()
    with temporary_folder("mine-c-", tmp_path, stale="mine-") as first:
        assert not left.exists() and first.stat().st_mode & 0o777 == 0o700
        with temporary_folder("mine-d-", tmp_path, stale="mine-") as second:
            assert first.exists() and second.exists()
    assert [folder.name for folder in tmp_path.iterdir()] == ["others-b"]
