"""Whole runs of several turns: the time that tools take, and a death at any turn, change no bit of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cispo.commands.train import train
from tests.test_end_to_end import QUICKSTART, ROOT
from tests.test_resume import FAULTS, KEYS, TURNS

LAST = 6
"""Turns of an attempt that follow a table of up to five hops."""


def keys(folder: Path, *own: str) -> list[str]:
    return [f"output_dir={folder}", *KEYS, *TURNS, *own]


@pytest.mark.slow
def test_tools_that_sleep_at_random_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Metrics but times, samples, weights and optimizer of a run with `Chase` and of one with a slow `Chase`."""
    monkeypatch.chdir(ROOT)
    folders = [tmp_path / "quick", tmp_path / "slow"]
    for folder, use in zip(folders, ("rewards.chase:Chase", "tests.agent_code:SleepyChase"), strict=True):
        train(QUICKSTART, keys(folder, f"env.use={use}", "env.workers=2", "train.steps=2"), resume=False)
    quick, slow = (FAULTS.state_of(folder / "quickstart") for folder in folders)
    assert FAULTS.difference(quick, slow) == ""
    assert len(quick["metrics"]) == 3 and len(quick["tensors"]) > 30


@pytest.mark.slow
def test_a_run_killed_at_any_turn_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGKILL from within the environment, at turn k of the third step; then resumed."""
    monkeypatch.chdir(ROOT)
    mark = tmp_path / "kill"
    own = ["env.use=tests.agent_code:ChaseThatKills", "sft.steps=60", "sft.batch_size=64", "sft.lr=3e-3"]
    own += ["train.eval_every=2", "train.save_every=2"]  # the part of two steps evaluates at its end

    def arguments(folder: Path, steps: int) -> list[str]:
        return keys(folder, *own, f"env.args={{mark: {mark}}}", f"train.steps={steps}")

    whole, begun = tmp_path / "whole", tmp_path / "begun"
    train(QUICKSTART, arguments(whole, 4), resume=False)
    train(QUICKSTART, arguments(begun, 2), resume=False)
    undisturbed = FAULTS.state_of(whole / "quickstart")
    assert undisturbed["metrics"][-1]["agent/turns_max"] >= LAST, "every turn is met"
    for turn in range(1, LAST + 1):
        killed = tmp_path / f"killed_{turn}"
        shutil.copytree(begun, killed)
        mark.write_text(str(turn))
        command = [sys.executable, "-m", "cispo.cli", "train", str(QUICKSTART), *arguments(killed, 4), "--resume"]
        first = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
        assert first.returncode == -9, first.stdout + first.stderr
        again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
        assert again.returncode == 0, again.stdout + again.stderr
        assert FAULTS.difference(undisturbed, FAULTS.state_of(killed / "quickstart")) == "", f"killed at turn {turn}"
