"""Trackers through accelerate: real ones with local stores, and one of accelerate's own kind that fails on order."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from cispo.commands.train import train
from cispo.errors import UserError
from cispo.output.folder import RunLog
from cispo.output.trackers import SAMPLES, Trackers, check_trackers, flat
from cispo.recipe.load import load_recipe, stored_values
from cispo.types import Completion, FinishReason, Prompt, Trajectory, TrajectoryGroup, Turn
from tests.test_end_to_end import QUICKSTART, SMALL, VARIED

FAKE = "tests.fake_tracker:FileTracker"


def groups(count: int, size: int) -> list[TrajectoryGroup]:
    done = Completion(token_ids=(3, 1), logprobs=(-1.0, -1.0), versions=(0, 0), finish_reason=FinishReason.STOP)

    def one(prompt: int, index: int) -> Trajectory:
        turn = Turn(context_ids=(2,), completion=done)
        return Trajectory(group_id=prompt, index=index, turns=(turn,), text=f"{prompt}.{index}", reward=prompt / 8)

    return [
        TrajectoryGroup(
            prompt=Prompt(id=p, messages=({"role": "user", "content": f"{p}?"},), columns={}),
            trajectories=tuple(one(p, i) for i in range(size)),
        )
        for p in range(count)
    ]


def log(folder: Path, names: list[str], steps: range, *, after: int = -1, group: str = "") -> list[str]:
    """Logs some steps of a run as the controller does; returns the warnings."""
    warnings: list[str] = []
    trackers = Trackers(
        names, folder, name=folder.name, group=group, config={"learner.lr": 0.5, "eval": None}, say=warnings.append
    )
    run = RunLog(folder, after=after, board=False, trackers=trackers)
    for step in steps:
        run.samples(step, groups(4, 8))
        run.metrics(step, {"reward/mean": step / 8})
    run.close()
    return warnings


def fake_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_mlflow_and_trackio_go_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their own local stores: config, metrics and samples; a resumed run adds only the steps after it."""
    pytest.importorskip("mlflow")
    pytest.importorskip("trackio")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder, fake = tmp_path / "arm", tmp_path / "fake.jsonl"
    monkeypatch.setenv("FAKE_TRACKER", str(fake))
    folder.mkdir()
    names = ["mlflow", "trackio", FAKE]
    assert log(folder, names, range(3), group="g") == []
    # The run was killed after step 2 and goes on after step 1.
    assert log(folder, names, range(2, 5), after=1, group="g") == []
    assert not list(folder.glob("events.*")), "no TensorBoard where logging does not name it"
    ids = json.loads((folder / "trackers.json").read_text())

    (run,) = (tmp_path / "mlruns").glob("*/*/meta.yaml")
    assert run.parent.name == ids["mlflow"]
    assert (run.parent / "params" / "learner.lr").read_text() == "0.5"
    assert (run.parent / "tags" / "group").read_text() == "g"
    written = [line.split() for line in (run.parent / "metrics" / "reward" / "mean").read_text().splitlines()]
    assert [(float(value), int(step)) for _, value, step in written] == [(step / 8, step) for step in range(5)]
    table = json.loads((run.parent / "artifacts" / "samples" / "step_000003.json").read_text())
    assert table["columns"][:3] == ["step", "prompt", "completion"] and len(table["data"]) == SAMPLES

    with sqlite3.connect(tmp_path / "trackio" / "cispo.db") as store:
        rows = store.execute("select run_name, step, metrics from metrics order by step").fetchall()
    logged = [(name, step, json.loads(values)) for name, step, values in rows]
    assert {name for name, _, _ in logged} == {ids["trackio"]}
    assert [(step, v["reward/mean"]) for _, step, v in logged if "reward/mean" in v] == [(s, s / 8) for s in range(5)]

    lines = fake_lines(fake)
    assert [line["resumed"] for line in lines if "start" in line] == [None, "made up"]
    assert [line for line in lines if "config" in line] == [{"config": {"learner.lr": 0.5, "eval": None}}]
    assert [line["step"] for line in lines if "values" in line] == [0, 1, 2, 3, 4]
    table = next(line for line in lines if "table" in line)
    # 16 of 32 completions, evenly: of every group.
    assert [row[2] for row in table["rows"]][:5] == ["0.0", "0.2", "0.4", "0.6", "1.0"]
    assert [sum(1 for line in lines if "finish" in line)] == [2]


def test_a_tracker_that_fails_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login, no network for a step, a dead process: the log is whole each time."""
    monkeypatch.setenv("FAKE_TRACKER", str(tmp_path / "fake.jsonl"))
    monkeypatch.setenv("FAKE_TRACKER_FAILS", "1")
    folder = tmp_path / "run"
    folder.mkdir()
    warnings = log(folder, ["tests.fake_tracker:NoStart", FAKE], range(4))
    assert sorted(warnings) == [
        f"logging: the tracker {FAKE} did not take step 1 (ConnectionError: no route to host); later steps are still "
        "sent",
        "logging: the tracker tests.fake_tracker:NoStart could not start (SystemExit: please log in), and this run "
        "goes on without it",
    ]
    assert [line["step"] for line in fake_lines(tmp_path / "fake.jsonl") if "values" in line] == [0, 2, 3]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    other = tmp_path / "other"
    other.mkdir()
    (warning,) = log(other, ["tests.fake_tracker:Dies"], range(4))
    assert warning.startswith("logging: the trackers (tests.fake_tracker:Dies) process ended with code 7")


def test_a_training_logs_its_recipe_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRACKER", str(tmp_path / "fake.jsonl"))
    keys = [*SMALL, VARIED, f"output_dir={tmp_path}", "sft.steps=1", "train.steps=2", f"logging=['{FAKE}']"]
    folder = train(QUICKSTART, keys, resume=False)
    lines = fake_lines(tmp_path / "fake.jsonl")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": line["step"], **line["values"]} for line in lines if "values" in line] == rows
    assert lines[0] == {"start": "quickstart", "resumed": None}
    config = lines[1]["config"]
    assert config["rollout.group_size"] == 4 and json.loads(config["reward.functions"])[0]["fn"].endswith(":varied")
    assert not list(folder.glob("events.*"))


def test_a_recipe_is_flat_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME_OF_RUN", "secret")
    recipe = load_recipe("quickstart", ["policy.config.note=${oc.env:NAME_OF_RUN}", "learner.betas=[0.5,0.75]"])
    config = flat(stored_values(recipe))
    assert config["learner.betas"] == "[0.5, 0.75]" and config["learner.lr"] == recipe.learner.lr
    assert "secret" not in json.dumps(config) and "oc.env:NAME_OF_RUN" in str(config["policy.config"])


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("wanb", r"logging: 'wanb' is no tracker, did you mean wandb\?"),
        ("comet_ml", r"logging: comet_ml is not installed \(pip install comet-ml\)"),
        ("tests.fake_tracker:json", "'tests.fake_tracker:json' is no tracker of accelerate"),
        ("tests.fake_tracker:Nobody", "has no 'Nobody'"),
    ],
)
def test_unknown_trackers_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_trackers(["tensorboard", name])


def records(log: bytes) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log format behind 7 bytes, in blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(log):
        if (1 << 15) - place % (1 << 15) < 7:
            place += (1 << 15) - place % (1 << 15)
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        parts += log[place + 7 : place + 7 + length]
        place += 7 + length
        # FULL or LAST
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    folder.mkdir()
    assert log(folder, ["wandb"], range(2), group="g") == []
    assert log(folder, ["wandb"], range(1, 4), after=0, group="g") == []
    run = json.loads((folder / "trackers.json").read_text())["wandb"]
    files = sorted((folder / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb"))
    steps, configs, group = [], {}, set()
    for file in files:
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(data)
            group |= {record.run.run_group} if record.HasField("run") else set()
            configs |= {item.key: item.value_json for item in record.config.update}
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "reward/mean" in items:
                steps.append((record.history.step.num, json.loads(items["reward/mean"])))
    assert len(files) == 2 and steps == [(s, s / 8) for s in range(4)]
    assert configs["learner.lr"] == "0.5" and group == {"g"}
