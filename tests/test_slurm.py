"""The batch scripts of docs/cluster.md: killed by Slurm's signal and requeued, they give the undisturbed run."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cispo.commands.train import train
from tests.test_end_to_end import ROOT
from tests.test_resume import FAULTS

FAKE = Path(__file__).with_name("fake_slurm.py")
RECIPE = """
base: quickstart
name: job
runtime: local
sft: null
data: {limit: 500}
eval: {limit: 8}
rollout: {engine: torch, prompts_per_step: 2, group_size: 4}
reward: {functions: [{fn: "unhurried:reward"}]}
learner: {ranks: 1, lr: 0.001}
train: {steps: 6, eval_every: 3, save_every: 100}
"""
# Time for the signal to come before the run is over.
REWARD = """
import os, time

def reward(completion, **_):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    return sum(map(ord, completion)) % 8 / 8
"""


def scripts() -> dict[str, str]:
    """Heading -> batch script."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    return dict(re.findall(r"### ([^\n]*)\n(?:(?!###).)*?```bash\n(.*?)```", text, re.DOTALL))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shared folder with the recipe and the environment, and Slurm's commands first on the path."""
    shared, commands = tmp_path / "shared", tmp_path / "bin"
    for folder in (shared / "recipes", shared / "cispo" / ".venv" / "bin", commands):
        folder.mkdir(parents=True)
    (shared / "recipes" / "recipe.yaml").write_text(RECIPE)
    (shared / "cispo" / ".venv" / "bin" / "activate").write_text("")
    (tmp_path / "unhurried.py").write_text(REWARD)
    programs = {verb: f"{sys.executable} {FAKE} {verb}" for verb in ("sbatch", "srun", "scontrol", "ray")}
    for name, command in {**programs, "cispo": f"{sys.executable} -m cispo.cli"}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FAKE_SLURM_STATE", str(tmp_path))
    monkeypatch.setenv("FAKE_SLURM_METRICS", str(shared / "runs" / "job" / "metrics.jsonl"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("heading", ["One node", pytest.param("Several nodes", marks=pytest.mark.slow)])
def test_a_requeued_job_is_the_undisturbed_run(machine: Path, monkeypatch: pytest.MonkeyPatch, heading: str) -> None:
    job = machine / "job.sh"
    job.write_text(
        scripts()[heading].replace("/shared", str(machine / "shared")).replace("/tmp/cispo-", f"{machine}/cispo-")
    )
    recipe = machine / "shared" / "recipes" / "recipe.yaml"
    train(recipe, [f"output_dir={machine / 'whole'}"], resume=False)
    monkeypatch.setenv("PAUSE", "0.1")
    done = subprocess.run(["sbatch", str(job)], capture_output=True, text=True, check=False, timeout=200)
    said = (machine / "slurm-7.out").read_text()
    assert done.returncode == 0, said + done.stderr
    assert "SIGTERM" in said and "interrupted: finishing the step" in said
    (after,) = re.findall(r"going on after step (\d)", said)
    assert 2 <= int(after) < 6
    one, other = (FAULTS.state_of(folder / "job") for folder in (machine / "whole", machine / "shared" / "runs"))
    assert len(one["metrics"]) == 7 and FAULTS.difference(one, other) == ""


def test_both_scripts_ask_for_a_requeue() -> None:
    assert list(scripts()) == ["One node", "Several nodes"]
    for script in scripts().values():
        assert "#SBATCH --requeue\n" in script and "#SBATCH --open-mode=append\n" in script
        assert "--resume auto" in script and 'scontrol requeue "$SLURM_JOB_ID"' in script
