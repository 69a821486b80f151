"""The wheel outside a checkout: recipes by name, shipped rewards, and no package of ours that hides a user's own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[1]
ONE_STEP = [
    "runtime=local",
    "rollout.engine=torch",
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "learner.ranks=1",
    "data.limit=50",
    "eval.limit=4",
    "train.steps=1",
]
TINY = [*ONE_STEP, "sft.steps=2", "sft.data.limit=50"]


def run(*command: object, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, timeout=timeout
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a folder build/ behind and takes deleted modules from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("cispo", "recipes", "rewards"):
        copytree(ROOT / folder, source / folder, ignore=ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md"):
        copy(ROOT / file, source / file)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    done = run(*pip, "--no-index", "-w", out, source, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("cispo-*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment: the wheel, and this environment's packages but for its editable CISPO."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--no-index"]
    done = run(*pip, "--no-deps", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth is searched, but no .pth in it is read, so the editable CISPO stays out.
    (packages / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user's folder with rewards/: one module is named as a shipped one, one is not."""
    own = tmp_path / "rewards"
    own.mkdir()
    (own / "exact.py").write_text("def exact_match(completion, **_):\n    return len(completion) % 2 / 2\n")
    (own / "mine.py").write_text("def reward(completion, **_):\n    return 0.25\n")
    return tmp_path


def test_the_wheel_holds_all_that_recipes_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("cispo", "recipes", "rewards"):
        files = [f for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
        inside = Path() if folder == "cispo" else Path("cispo")
        missing = {str(inside / f.relative_to(ROOT)) for f in files} - names
        assert files and not missing
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"cispo"}


def test_a_recipe_by_name(scripts: Path, tmp_path: Path) -> None:
    shown = run(scripts / "cispo", "show", "quickstart", cwd=tmp_path)
    assert shown.returncode == 0 and "name: quickstart" in shown.stdout, shown.stderr
    done = run(scripts / "cispo", "train", "quickstart", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "step_000001" / "model.safetensors").exists()
    unknown = run(scripts / "cispo", "show", "quickstar", cwd=tmp_path)
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr
    assert (
        "recipe quickstar does not exist; the shipped recipes are chase, code, compare, compare_quick,"
        in unknown.stderr
    )


LOOKUP = """
import importlib.util, sys, cispo
sys.path.remove("")  # as in a console script
print(importlib.util.find_spec("rewards"))
print(cispo.__file__)
from cispo.recipe.user_code import load_object
for name in ("rewards.exact:exact_match", "rewards.mine:reward", "rewards.sorting:problems"):
    print(sys.modules[load_object(name, "key").__module__].__file__)
"""


def test_the_users_rewards_win_and_the_shipped_ones_fill_in(scripts: Path, user: Path) -> None:
    found = run(scripts / "python", "-c", LOOKUP, cwd=user)
    assert found.returncode == 0, found.stderr
    installed, package, *files = found.stdout.splitlines()
    assert installed == "None" and Path(package).is_relative_to(scripts.parent)
    shipped = Path(package).parent / "rewards"
    assert files == [str(f) for f in (user / "rewards/exact.py", user / "rewards/mine.py", shipped / "sorting.py")]


@pytest.mark.parametrize("init", [True, False], ids=["package", "folder"])
def test_a_checkout_on_the_path_is_no_different(
    scripts: Path, user: Path, monkeypatch: pytest.MonkeyPatch, init: bool
) -> None:
    """Its folder rewards/ comes first on the path, and as a package of the same name."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if init:
        (user / "rewards" / "__init__.py").touch()
    found = run(scripts / "python", "-c", LOOKUP, cwd=user)
    assert found.returncode == 0, found.stderr
    _, package, *files = found.stdout.splitlines()
    assert Path(package) == ROOT / "cispo" / "__init__.py"
    shipped = ROOT / "rewards" / "sorting.py"
    assert files == [str(f) for f in (user / "rewards/exact.py", user / "rewards/mine.py", shipped)]


def test_a_run_with_the_users_rewards(scripts: Path, user: Path) -> None:
    """Reward functions run in processes of their own, which look them up again."""
    functions = "{fn: 'rewards.exact:exact_match'}, {fn: 'rewards.mine:reward'}, {fn: 'rewards.format:boxed'}"
    (user / "task.yaml").write_text("base: quickstart\nname: task\n")
    done = run(
        scripts / "cispo", "train", "task.yaml", *TINY, f"reward={{functions: [{functions}]}}", "sft=null", cwd=user
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (user / "runs" / "task" / "metrics.jsonl").read_text()
    assert '"reward/reward": 0.25' in rows and '"reward/boxed": 0.0' in rows
