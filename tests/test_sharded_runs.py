"""Whole runs of a sharded learner: the watchdog names a rank that hangs, a killed one ends the run at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.test_end_to_end import FEW_ROWS, QUICKSTART, ROOT, VARIED, metrics

RECIPE = [
    *FEW_ROWS,
    "rollout.engine=torch",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "learner.ranks=2",
    "learner.shard=true",
    "learner.lr=1e-3",
    "sft.steps=2",
    "eval.limit=8",
    "train.save_every=1",
    "control.watchdog=60",
    VARIED,
]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cispo.cli", "train", str(QUICKSTART), f"output_dir={folder}", *RECIPE, *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def rank_of(run: subprocess.Popen[str], name: str) -> psutil.Process:
    """The process of a learner rank, by the name that Ray gives it."""
    return next(p for p in psutil.Process(run.pid).children(recursive=True) if f"ray::{name}" in " ".join(p.cmdline()))


def wait_for(path: Path, run: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert run.poll() is None and time.monotonic() < end, run.communicate()[0]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_rank_that_hangs_or_dies_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path: Path):
    folder = tmp_path / "quickstart"
    # The next checkpoint is steps away: the rank is missed in an update, whose collective has a name, not in a save.
    run = start(tmp_path, "train.steps=500", "train.save_every=5")
    wait_for(folder / "checkpoints" / "step_000005", run)
    rank_of(run, "learner-1").send_signal(signal.SIGSTOP)
    output, _ = run.communicate(timeout=400)
    assert run.returncode != 0 and "nothing has moved" in output
    assert "learner-0 is in " in output and "learner-1 does not answer" in output, output

    done = max(row["step"] for row in metrics(folder))
    run = start(tmp_path, "train.steps=500", "--resume")
    wait_for(folder / "checkpoints" / f"step_{done + 2:06d}", run)
    rank_of(run, "learner-1").kill()
    killed = time.monotonic()
    output, _ = run.communicate(timeout=400)
    assert time.monotonic() - killed < 60
    assert run.returncode != 0 and "process of learner-1 ended unexpectedly" in output

    last = int(sorted(folder.glob("checkpoints/step_*"))[-1].name[-6:])
    run = start(tmp_path, f"train.steps={last + 1}", "--resume", "learner.ranks=1")
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output
    assert [row["step"] for row in metrics(folder)] == list(range(last + 2))


@pytest.mark.slow
def test_a_run_with_distributed_experts_goes_on_with_another_mesh(tmp_path: Path):
    """Two ranks with half of the experts each, then two with half of each expert, then one: in Ray actors."""
    folder = tmp_path / "quickstart"
    meshes = ["learner.expert_parallel=2"], ["learner.expert_tensor_parallel=2"], ["learner.ranks=1"]
    for steps, axes in enumerate(meshes, 1):
        own = [*axes, "learner.shard=auto", *(["--resume"] if steps > 1 else [])]
        output, _ = (run := start(tmp_path, f"train.steps={steps}", *own)).communicate(timeout=600)
        assert run.returncode == 0, output
    assert [row["step"] for row in metrics(folder)] == list(range(4))
    assert len(list(folder.glob("checkpoints/step_*/training/learner-*-of-00002.safetensors"))) >= 2
