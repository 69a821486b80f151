"""A run folder that was damaged: a sentence, the checkpoint before, and the same run; without any, one sentence."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cispo import cli
from cispo.commands.train import train
from cispo.errors import UserError
from cispo.output.folder import logged_steps, read_metrics
from tests.test_end_to_end import ROOT, metrics
from tests.test_resume import FAULTS, OLD_RUN

RECIPE = OLD_RUN.with_suffix(".yaml")
KEYS = ["name=run", "control.max_staleness=0", "train={steps: 6, save_every: 2, eval_every: 2, keep: 2}"]
KEYS.append("algorithm={name: cispo, ratio_max: null, kl_coef: 0.01}")

Damage = Callable[[Path], object]


def resume(folder: Path, *keys: str) -> None:
    train(RECIPE, [f"output_dir={folder.parent}", *KEYS, *keys], resume=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps: checkpoints 4 and 6, and a reference policy."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train(RECIPE, [f"output_dir={folder}", *KEYS], resume=False)
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(name: str, place: float = 0.7, step: int = 6) -> Damage:
    """Flips one bit of a file of a checkpoint."""

    def damage(run: Path) -> None:
        file = run / "checkpoints" / f"step_{step:06d}" / name
        data = bytearray(file.read_bytes())
        data[int(place * len(data))] ^= 1
        file.write_bytes(data)

    return damage


def write(name: str, text: str) -> Damage:
    return lambda run: (run / name).write_text(text)


def edit(name: str, old: str, new: str) -> Damage:
    def damage(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return damage


def line(number: int, text: str) -> Damage:
    """Replaces a row of the metrics."""

    def damage(run: Path) -> None:
        rows = (run / "metrics.jsonl").read_text().split("\n")
        rows[number] = text
        (run / "metrics.jsonl").write_text("\n".join(rows))

    return damage


LAST = "checkpoints/step_000006"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            flip("model.safetensors"),
            "step_000006 is damaged and moved to damaged_step_000006: model.safetensors is not as",
        ),
        (
            flip("training/learner.safetensors"),
            "training/learner.safetensors is not as it was written: its hash differs",
        ),
        (flip("training/driver.safetensors", 0.99), "training/driver.safetensors is not as it was written"),
        (flip("training/driver.json", 0.5), "training/driver.json is not as it was written"),
        (flip("tokenizer.json", 0.5), "tokenizer.json is not as it was written"),
        (write(f"{LAST}/training/driver.json", "{"), "training/driver.json has 1 bytes, not"),
        (lambda run: (run / LAST / "config.json").unlink(), "config.json is missing"),
        (write(f"{LAST}/cispo.json", "{"), "cispo.json cannot be read"),
        (write(f"{LAST}/cispo.json", "[]"), "cispo.json cannot be read"),
        (write(f"{LAST}/cispo.json", '{"step": 6}'), "cispo.json cannot be read"),
        (write(f"{LAST}/cispo.json", '{"step": 6, "files": {}}'), "cispo.json lists no files"),
        (edit(f"{LAST}/cispo.json", '"config.json": "', '"config.json": "0'), "config.json is not as it was written"),
        (lambda run: (run / LAST / "cispo.json").unlink(), "cispo.json is missing"),
        (lambda run: shutil.rmtree(run / LAST), ""),
        (line(5, "{"), "metrics.jsonl is whole up to step 4 only: later steps are made again"),
        (line(6, '{"step": 6, "reward/mean": "much"}'), "metrics.jsonl is whole up to step 5 only"),
        (line(5, "\x00\x00\x00"), "metrics.jsonl is whole up to step 4 only"),
    ],
    ids=lambda value: value[:40].replace("/", "_") if isinstance(value, str) else "",
)
def test_the_checkpoint_before_makes_the_same_run(
    whole: Path, run: Path, capfd: pytest.CaptureFixture[str], damage: Damage, said: str
) -> None:
    damage(run)
    resume(run)
    output = capfd.readouterr().out
    assert said in output and "going on after step 4" in output
    assert FAULTS.difference(FAULTS.state_of(whole), FAULTS.state_of(run)) == ""


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (write("checkpoints/best.json", "{"), "best.json is damaged"),
        (write("checkpoints/best.json", '{"step": "six", "eval/accuracy": 1}'), "best.json is damaged"),
        (write("checkpoints/best.json", '{"step": 6, "eval/accuracy": NaN}'), "best.json is damaged"),
        (write("checkpoints/best.json", '{"step": 3, "eval/accuracy": 1}'), "best.json is damaged"),
        (write("samples/notes.parquet", "mine"), ""),
        (lambda run: (run / "checkpoints" / "step_by_step").mkdir(), ""),
        (lambda run: (run / "checkpoints" / "step_000009").mkdir(), "step_000009 is damaged"),
        (lambda run: (run / "checkpoints" / "step_000009").write_text("a file"), ""),
        (flip("model.safetensors", step=4), ""),
        (line(3, "{"), "metrics.jsonl is whole up to step 2 only: rows that cannot be read are left out"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is whole up to step -1 only"),
    ],
    ids=lambda value: value[:40].replace("/", "_") if isinstance(value, str) else "",
)
def test_other_damage_costs_no_step(run: Path, capfd: pytest.CaptureFixture[str], damage: Damage, said: str) -> None:
    damage(run)
    resume(run, "train.steps=7")
    output = capfd.readouterr().out
    assert said in output and "going on after step 6" in output
    assert [row["step"] for row in metrics(run)][-1] == 7
    for kept in ("samples/notes.parquet", "checkpoints/step_by_step"):
        assert "notes" not in said or (run / kept).exists()


def test_without_a_whole_checkpoint_nothing_is_touched(run: Path) -> None:
    for step in (4, 6):
        flip("training/learner.safetensors", step=step)(run)
    before = sorted(str(path) for path in run.rglob("*"))
    with pytest.raises(UserError, match="no checkpoint in .* is whole: in step_000006, training/learner.safetensors"):
        resume(run)
    assert sorted(str(path) for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (write("recipe.yaml", "name: ["), "recipe.yaml is not valid YAML"),
        (write("recipe.yaml", ""), "recipe.yaml does not hold keys and values"),
        (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml does not exist"),
        (lambda run: flip("../reference/model.safetensors")(run), "reference policy .* is damaged"),
    ],
    ids=["broken-recipe", "empty-recipe", "no-recipe", "reference"],
)
def test_damage_that_no_checkpoint_mends(run: Path, damage: Damage, said: str) -> None:
    damage(run)
    before = {path for path in run.rglob("*") if path.is_dir()}
    with pytest.raises(UserError, match=said):
        resume(run, "train.steps=7")
    assert {path for path in run.rglob("*") if path.is_dir()} >= before


@pytest.mark.parametrize("keys", [("totals",), ("finished",), ("buffer", "submitted"), ("rewards", "errors")])
def test_a_state_without_a_key_is_named(run: Path, keys: tuple[str, ...]) -> None:
    """Of an old checkpoint, which has no hashes."""
    shutil.rmtree(run / "checkpoints" / "step_000004")
    folder = run / LAST
    state = json.loads((folder / "training" / "driver.json").read_text())
    section = state
    for key in keys[:-1]:
        section = section[key]
    del section[keys[-1]]
    (folder / "training" / "driver.json").write_text(json.dumps(state))
    facts = json.loads((folder / "cispo.json").read_text())
    del facts["sha256"]
    facts["files"]["training/driver.json"] = (folder / "training" / "driver.json").stat().st_size
    (folder / "cispo.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"driver.json (cannot be read: .*|is of another step)"):
        resume(run, "train.steps=7")


def test_a_checkpoint_without_hashes_resumes(whole: Path, run: Path) -> None:
    """Version 0.1.0 kept sizes alone."""
    for step in (4, 6):
        file = run / "checkpoints" / f"step_{step:06d}" / "cispo.json"
        facts = json.loads(file.read_text())
        del facts["sha256"]
        file.write_text(json.dumps(facts))
    shutil.rmtree(run / LAST)
    resume(run)
    assert FAULTS.difference(FAULTS.state_of(whole), FAULTS.state_of(run)) == ""


def test_damaged_weights_are_neither_evaluated_nor_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flip("model.safetensors")(run)
    for command in (
        ("export", run / LAST, "--to", tmp_path / "out"),
        ("evaluate", RECIPE, *KEYS, "--checkpoint", run / LAST),
        ("train", RECIPE, *KEYS, "name=next", f"output_dir={tmp_path}", "policy={config: null, tokenizer: null}")
        + (f"policy.model={run / LAST}",),
    ):
        monkeypatch.setattr(sys, "argv", ["cispo", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2 and "is damaged: model.safetensors is not as it was" in capfd.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "next").exists()


def test_rows_that_cannot_be_read_are_no_report(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "a": 1}\n{"step": 1, "a"\n{"step": 2, "a": 2}\n{"step": 3, "a"')
    assert logged_steps(tmp_path) == 0
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is damaged"):
        read_metrics(file)
    file.write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 3}\n{"step": 2, "a"')
    assert logged_steps(tmp_path) == 1 and len(read_metrics(file)) == 2
    assert os.path.exists(file) and logged_steps(tmp_path / "none") == -1


@pytest.mark.parametrize("arguments", [("--resume", "auto"), ("--resume=auto",)])
def test_resume_auto_starts_goes_on_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    """One batch script that can be queued again."""
    monkeypatch.chdir(ROOT)

    def run(*extra: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cispo", "train", str(RECIPE), *arguments, f"output_dir={tmp_path}", *extra])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        assert ended.value.code == 0, captured.err
        return captured.out

    assert "going on" not in run("train.steps=1")
    assert "going on after step 1" in run("train.steps=2")
    assert "has all its 2 steps: a larger train.steps goes on from there" in run("train.steps=2")
    assert [folder.name for folder in tmp_path.iterdir()] == ["old_run"] and len(metrics(tmp_path / "old_run")) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["r.yaml"], (False, [])),
        (["r.yaml", "--resume"], (True, [])),
        (["--resume", "r.yaml", "a=1"], (True, ["a=1"])),
        (["r.yaml", "--resume", "a=1"], (True, ["a=1"])),
        (["--resume", "auto", "r.yaml"], ("auto", [])),
        (["r.yaml", "--resume=auto", "a=1"], ("auto", ["a=1"])),
        (["r.yaml", "--resume", "--", "auto"], (True, ["auto"])),
    ],
)
def test_the_value_of_resume_may_be_left_out(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: tuple[object, list[str]]
) -> None:
    seen: list[tuple[object, object]] = []
    monkeypatch.setattr("cispo.commands.train.train", lambda path, keys, *, resume: seen.append((resume, keys)))
    monkeypatch.setattr(sys, "argv", ["cispo", "train", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and seen == [expected]
    monkeypatch.setattr(sys, "argv", ["cispo", "train", "r.yaml", "--resume=never"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
