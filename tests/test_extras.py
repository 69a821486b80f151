"""Without the extras' packages the core runs, and what needs one says so in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cispo.errors import EXTRAS
from tests.test_wheel import ONE_STEP

ROOT = Path(__file__).parents[1]

# Python imports sitecustomize at its start, in every process of a run.
BLOCKER = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(EXTRAS)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""

ASKS = """
import sys
from pathlib import Path
from cispo.errors import MissingPackage, UserError
from cispo.output.evaluation import Measured, draw
from cispo.rollout.rows import load_rows
from cispo.recipe.user_code import load_object
import cispo

def sentence(ask):
    try:
        ask()
    except UserError as error:
        print(error)

sentence(lambda: list(load_rows("reasoning_gym:chain_sum", "train", {"size": 2}, None, "data")))
for name in ("rewards.gym:score", "rewards.math:math_equal", "rewards.judge:judge"):
    sentence(lambda: load_object(name, "reward"))
sentence(lambda: cispo.compare("compare_quick", algorithms=["cispo", "grpo"], seeds=1))
sentence(lambda: draw(Path(), [], title=""))
"""

TINY = [*ONE_STEP, "sft=null"]


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds none of the extras' packages."""
    folder = tmp_path / "absent"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def run(without: dict[str, str], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=without, capture_output=True, text=True, check=False, timeout=200
    )


def test_a_run_needs_no_extra(without: dict[str, str], tmp_path: Path) -> None:
    done = run(without, tmp_path, "-m", "cispo.cli", "train", "quickstart", *TINY)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "quickstart"
    assert (folder / "checkpoints" / "step_000001").is_dir() and not (folder / "learning_curve.png").exists()
    said = "learning_curve.png needs matplotlib, which is not installed (pip install 'cispo[report]')"
    assert f"no picture: {said}" in " ".join(done.stdout.split())


def test_who_needs_one_says_which(without: dict[str, str], tmp_path: Path) -> None:
    done = run(without, tmp_path, "-c", ASKS)
    assert done.returncode == 0, done.stderr
    absent = "which is not installed (pip install 'cispo[{}]')"
    assert done.stdout.splitlines() == [
        f"data: reasoning_gym:chain_sum needs reasoning-gym, {absent.format('gym')}",
        f"reward: cannot import 'rewards.gym:score': it needs the module 'reasoning_gym', {absent.format('gym')}",
        f"reward: cannot import 'rewards.math:math_equal': it needs the module 'math_verify', {absent.format('math')}",
        f"reward: cannot import 'rewards.judge:judge': it needs the module 'aiolimiter', {absent.format('judge')}",
        f"cispo compare needs matplotlib, {absent.format('report')}",
        f"evaluation.png needs matplotlib, {absent.format('report')}",
    ]
    assert not list((tmp_path / "runs").glob("*"))


def test_extras_bring_what_the_sentences_promise() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for module, extra in EXTRAS.items():
        package = module.replace("_", "-")
        assert any(line.startswith(f"{package}>=") for line in project["optional-dependencies"][extra])
        assert not any(line.startswith(f"{package}>=") for line in project["dependencies"])
    everything = set(project["optional-dependencies"]["all"][0].removeprefix("cispo[").removesuffix("]").split(","))
    assert everything == set(EXTRAS.values())
