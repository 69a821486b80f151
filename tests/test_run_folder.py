"""A run folder in use: a second command changes not one byte of it; a folder of its own for every new run."""

from __future__ import annotations

import hashlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cispo import cli
from cispo.errors import RunError, UserError
from cispo.files import write_text
from cispo.output.run_folder import create_run_folder, last_run_folder, only_user_of
from tests.test_bad_input import recipe  # noqa: F401 (fixture)

ROOT = Path(__file__).parents[1]
OLD_RUN = ROOT / "tests" / "data" / "old_run"
SFT = "sft={data: {source: 'rewards.sorting:demonstrations', args: {size: 8, seed: 0, count: 2}}}"
Recipe = Callable[..., Path]


def content(folder: Path) -> dict[str, tuple[int, int, int, str]]:
    """Path -> (mode, size, time of the last change, hash) of everything in a folder."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        size = status.st_size if path.is_file() else 0
        found[str(path.relative_to(folder))] = status.st_mode, size, status.st_mtime_ns, digest
    return found


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["cispo", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    "command",
    [
        ("train", "RECIPE", "--resume"),
        ("train", "RECIPE", "--resume", "auto"),
        ("train", "RECIPE", "train.steps=9", "train.keep=1", "--resume"),
        ("train", "RECIPE", "output_dir=FOLDER/inside"),
        ("sft", "RECIPE", "output_dir=FOLDER", SFT),
        ("export", "CHECKPOINT", "--to", "FOLDER/exported"),
        ("export", "CHECKPOINT", "--to", "FOLDER/checkpoints/step_000003/exported"),
        ("compare", "RECIPE", "--algorithms", "cispo,grpo", "--seeds", "1", "output_dir=FOLDER"),
        ("compare", "RECIPE", "--algorithms", "cispo,grpo", "--seeds", "1", "--name", "bad"),
        ("compare", "RECIPE", "--algorithms", "cispo,grpo", "--seeds", "1", "--name", "bad", "--plot-only"),
    ],
    ids=lambda command: "-".join(command[::2])[:40].replace("/", "_"),
)
def test_a_second_command_is_refused_before_it_writes(
    recipe: Recipe,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: tuple[str, ...],
) -> None:
    folder = Path(shutil.copytree(OLD_RUN, tmp_path / "runs" / "bad"))
    (folder / "checkpoints" / ".draft").mkdir()
    (folder / "checkpoints" / ".draft" / "half").write_text("written by the run")
    words = {"RECIPE": str(recipe(rollout__max_tokens=6)), "CHECKPOINT": str(OLD_RUN / "checkpoints" / "step_000003")}
    arguments = [words.get(word, word.replace("FOLDER", str(folder))) for word in command]
    with only_user_of(folder):
        before = content(folder)
        assert run_command(monkeypatch, *arguments) == 2
        assert content(folder) == before
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cispo: ")]
    assert len(said) == 1 and said[0].endswith(f"{folder} is in use: another process is running in it")


def test_an_arm_in_use_is_left_alone(
    recipe: Recipe,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Its comparison is free, so that another process runs the arm by its own folder."""
    arm = tmp_path / "runs" / "bad-compare" / "arms" / "cispo" / "seed_0"
    shutil.copytree(OLD_RUN, arm)
    with only_user_of(arm):
        before = content(arm)
        command = ("compare", recipe(), "--algorithms", "cispo", "--seeds", "1")
        assert run_command(monkeypatch, *command) == 2
        assert content(arm) == before
        resumed = ("train", recipe(), "--resume", f"output_dir={arm.parent}", "name=seed_0")
        assert run_command(monkeypatch, *resumed) == 2
        assert content(arm) == before


def test_a_command_that_reads_needs_no_lock_and_writes_nothing(
    recipe: Recipe,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = recipe()
    assert run_command(monkeypatch, "train", file) == 0
    folder = tmp_path / "runs" / "bad"
    checkpoint = folder / "checkpoints" / "step_000001"
    with only_user_of(folder):
        before = content(folder)
        assert run_command(monkeypatch, "show", file) == 0
        assert run_command(monkeypatch, "evaluate", file, "--checkpoint", checkpoint) == 0
        assert run_command(monkeypatch, "generate", file, "--checkpoint", checkpoint, "--prompt", "b") == 0
        assert run_command(monkeypatch, "export", checkpoint, "--to", tmp_path / "exported") == 0
        assert content(folder) == before
        # A new run of that name gets a folder of its own meanwhile.
        assert run_command(monkeypatch, "train", file) == 0
        assert content(folder) == before and (tmp_path / "runs" / "bad-2" / "metrics.jsonl").exists()


CLAIM = """
import os, sys, time
from cispo.output.run_folder import create_run_folder
while not os.path.exists(sys.argv[2]):
    time.sleep(0.001)
with create_run_folder(sys.argv[1], "run") as folder:
    print(folder.path.name, flush=True)
    sys.stdin.read()
"""


def test_runs_that_start_together_get_a_folder_each(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLAIM, str(tmp_path / "runs"), str(tmp_path / "go")]
    pipe = subprocess.PIPE
    starts = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(6)]
    time.sleep(1.0)
    (tmp_path / "go").touch()
    names = [start.stdout.readline().strip() for start in starts if start.stdout is not None]
    for start in starts:
        start.communicate()
    assert sorted(names) == ["run", *(f"run-{number}" for number in range(2, 7))]


def test_a_folder_of_a_command_that_never_wrote_is_taken(tmp_path: Path) -> None:
    with create_run_folder(str(tmp_path), "run") as folder:
        assert folder.path == tmp_path / "run"
    with create_run_folder(str(tmp_path), "run") as folder:
        assert folder.path == tmp_path / "run"
        (folder.path / "recipe.yaml.partial").write_text("")
    with create_run_folder(str(tmp_path), "run") as folder:
        assert folder.path == tmp_path / "run", "a command that was killed in its first write"
        (folder.path / "recipe.yaml").write_text("")
    with create_run_folder(str(tmp_path), "run") as folder:
        assert folder.path == tmp_path / "run-2"
    (tmp_path / "run-3").write_text("a file")
    (tmp_path / "run-2" / "recipe.yaml").write_text("")
    with create_run_folder(str(tmp_path), "run") as folder:
        assert folder.path == tmp_path / "run-4"


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, limits[1]))
    try:
        with pytest.raises(OSError):
            write_text(file, "longer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file", "old")]


def test_the_last_run_of_a_name(tmp_path: Path) -> None:
    """Names may hold characters of a pattern; a folder without a run is none."""
    assert last_run_folder(str(tmp_path / "none"), "run") is None
    for name in ("a[1]", "a[1]-2", "a[1]-10", "a[1]-x", "a1-30"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text("")
    (tmp_path / "a[1]-11").mkdir()
    assert last_run_folder(str(tmp_path), "a[1]") == tmp_path / "a[1]-10"


def test_a_folder_that_is_removed_or_made_anew_is_noticed(tmp_path: Path) -> None:
    with create_run_folder(str(tmp_path), "run") as folder:
        folder.check()
        folder.path.rename(tmp_path / "moved")
        with pytest.raises(RunError, match="run was removed or moved during the run"):
            folder.check()
        with create_run_folder(str(tmp_path), "run"), pytest.raises(RunError):
            folder.check()
    with pytest.raises(UserError, match="gone cannot be locked: No such file"), only_user_of(tmp_path / "gone"):
        pass
