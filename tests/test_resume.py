"""A resumed run is the same run, bit for bit; failures that checkpoints survive; changes that are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cispo import __version__
from cispo.commands.train import train
from cispo.errors import RunError, UserError
from cispo.output.checkpoint import CheckpointFolder, step_of
from cispo.recipe.load import dump_yaml, load_recipe
from cispo.recipe.migrate import RENAMED
from cispo.recipe.resume import check_same_run
from tests.test_end_to_end import QUICKSTART, ROOT, SMALL, VARIED, cispo, metrics

SCRIPT = ROOT / "scripts" / "inject_faults.py"
KEYS = [
    *SMALL,
    "sft.steps=3",
    "learner.schedule=constant",
    "train.eval_every=2",
    "train.save_every=2",
    "learner.lr=1e-3",
    VARIED,
]


TURNS = (
    "env.use=rewards.chase:Chase",
    "env.workers=1",
    "sft.data={source: 'rewards.chase:demonstrations', args: {size: 200, seed: 1}}",
    "data={source: 'rewards.chase:problems', args: {size: 100, seed: 2}}",
    "eval={source: 'rewards.chase:problems', split: test, args: {size: 8, seed: 3}}",
    "rollout.max_context=80",
    "rollout.max_tokens=6",
    "learner.share_prompts=true",
    "algorithm.advantage=turn_to_go",
)
"""Attempts of several turns."""


def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("inject_faults", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["inject_faults"] = module
    spec.loader.exec_module(module)
    return module


FAULTS = script()


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("algorithm={name: ppo, ratio_max: null, updates_per_batch: 2, kl_coef: 0.01, kl_in: reward, kl: k1}",),
        pytest.param(
            ("policy.dtype=bfloat16", "algorithm={name: dapo, ratio_max: null, dynamic_sampling: 1}"),
            marks=pytest.mark.slow,
        ),
        ("curriculum={drop_above: 0.9, weighting: difficulty, length_stages: [[0, 8], [3, 16]]}", "data.limit=12"),
        TURNS,
    ],
    ids=["cispo", "critic-and-reference", "bfloat16-dynamic-sampling", "curriculum", "turns"],
)
def test_a_resumed_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]):
    """Policy, optimizers, masters, critic, reference, prompts, counters: all as if nothing had happened."""
    monkeypatch.chdir(ROOT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(QUICKSTART, [f"output_dir={whole}", *KEYS, *keys, "train.steps=6"], resume=False)
    for steps in (2, 4, 6):
        train(QUICKSTART, [f"output_dir={parts}", *KEYS, *keys, f"train.steps={steps}"], resume=steps > 2)
    one, other = FAULTS.state_of(whole / "quickstart"), FAULTS.state_of(parts / "quickstart")
    assert FAULTS.difference(one, other) == ""
    assert len(one["metrics"]) == 7 and len(one["tensors"]) > 30
    assert any(row.get("grad_norm", 0) > 0 for row in one["metrics"]), "it did learn something"


def test_the_world_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another number of ranks and engines: the same numbers but for the order of float32 sums."""
    monkeypatch.chdir(ROOT)
    arguments = [*KEYS, "algorithm.zero_variance=keep"]
    for folder, steps in (("whole", 4), ("parts", 2)):
        train(QUICKSTART, [*arguments, f"output_dir={tmp_path / folder}", f"train.steps={steps}"], resume=False)
    wider = ["runtime=ray", "learner.ranks=2", "learner.tokens_per_micro_batch=64", "--resume"]
    cispo("train", str(QUICKSTART), *arguments, "train.steps=4", f"output_dir={tmp_path / 'parts'}", *wider)
    one, other = (metrics(tmp_path / folder / "quickstart") for folder in ("whole", "parts"))
    assert len(one) == len(other) == 5
    for name in ("grad_norm", "entropy", "reward/mean", "adv/std"):
        assert [row.get(name) for row in other[:3]] == [row.get(name) for row in one[:3]], name
        # The third step starts from equal weights; a float32 sum of other order differs by some 1e-6 of its terms.
        assert other[3][name] == pytest.approx(one[3][name], rel=1e-5, abs=1e-6), name


KILLS = ("kill-driver", "kill-learner", "kill-engine")


@pytest.mark.parametrize(
    "faults",
    [pytest.param(KILLS[os.getpid() % 3 :][:1], id="one"), pytest.param(KILLS, id="all", marks=pytest.mark.slow)],
)
def test_faults_in_a_real_run(faults: tuple[str, ...]):
    """Ray; one random moment each. `scripts/inject_faults.py` does more of them, and vLLM: docs/reliability.md."""
    command = [sys.executable, str(SCRIPT), *faults, "--times", "1", "rollout.engine=torch"]
    command += ["--seed", str(os.getpid())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


OLD_RUN = ROOT / "tests" / "data" / "old_run"


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run of version 0.1.0 that was killed after row 4 of its metrics, with step 3 its last checkpoint."""
    monkeypatch.chdir(ROOT)
    return Path(shutil.copytree(OLD_RUN, tmp_path / "old_run"))


def test_a_run_of_an_earlier_version_goes_on(old_run: Path):
    """Its recipe has removed keys, and the buffered rollouts of its checkpoint have removed fields."""
    before = metrics(old_run)
    train(OLD_RUN.with_suffix(".yaml"), [f"output_dir={old_run.parent}", "train.steps=6"], resume=True)
    rows = metrics(old_run)
    assert rows[:4] == before[:4] and [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[4]["staleness/max"] == 1, "the buffered rollouts are trained on"
    facts = json.loads((old_run / "checkpoints" / "step_000006" / "cispo.json").read_text())
    assert (facts["cispo_version"], facts["step"], facts["updates"]) == (__version__, 6, 6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda recipe: recipe["critic"].pop("value_clip"), ""),
        (lambda recipe: recipe["rollout"].update(top_k=0), ""),
        (lambda recipe: recipe.update(speed=recipe["learner"].pop("lr")), ""),
        (lambda recipe: recipe["critic"].update(value_clip=0.3), "has critic.value_clip 0.3, not 0.2"),
        (
            lambda recipe: recipe["rollout"].update(top_k=3),
            r"old_run/recipe.yaml: unknown key rollout.top_k: truncated",
        ),
        (lambda recipe: recipe["rollout"].update(beams=3), r"old_run/recipe.yaml: unknown key rollout.beams"),
    ],
    ids=["a-newer-key", "a-removed-key", "a-renamed-key", "another-value", "a-removed-value", "an-unknown-key"],
)
def test_the_stored_recipe_is_read_through_todays_schema(
    old_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    edit: Callable[[dict], object],
    message: str,
):
    monkeypatch.setitem(RENAMED, "speed", "learner.lr")
    file = old_run / "recipe.yaml"
    stored = yaml.safe_load(file.read_text())
    edit(stored)
    file.write_text(yaml.safe_dump(stored))
    recipe = load_recipe(OLD_RUN.with_suffix(".yaml"), ["train.steps=6"])
    if message:
        with pytest.raises(UserError, match=message):
            check_same_run(recipe, old_run)
        return
    check_same_run(recipe, old_run)
    assert ("recipe key speed is read as learner.lr" in capsys.readouterr().err) == ("speed" in stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("algorithm.ratio_max=4", "has algorithm.ratio_max 5.0, not 4.0: that would be another run"),
        ("seed=7", "has seed 0, not 7"),
        ("name=other", "holds no run"),
    ],
)
def test_what_cannot_be_resumed(tmp_path: Path, change: str, message: str):
    folder = tmp_path / "quickstart"
    (folder / "checkpoints").mkdir(parents=True)
    shown = [sys.executable, "-m", "cispo.cli", "train", str(QUICKSTART), f"output_dir={tmp_path}", *KEYS]
    (folder / "recipe.yaml").write_text(dump_yaml(load_recipe(QUICKSTART, [f"output_dir={tmp_path}", *KEYS])))
    done = subprocess.run([*shown, change, "--resume"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def filled(checkpoints: CheckpointFolder, step: int, score: float | None = None) -> Path:
    with checkpoints.writing() as draft:
        (draft / "config.json").write_text("{}")
        (draft / "training").mkdir()
        (draft / "training" / "driver.json").write_text(json.dumps({"finished": step}))
    return checkpoints.finish(step, {"version": step}, score=score)


def test_the_newest_and_the_best_stay(tmp_path: Path):
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    for step, score in enumerate([0.1, 0.9, 0.3, None, 0.4]):
        filled(checkpoints, step, score)
    assert [step_of(f) for f in checkpoints.whole()] == [1, 3, 4]
    best = checkpoints.best()
    assert best is not None and step_of(best) == 1


def test_what_is_cut_short_is_not_a_checkpoint(tmp_path: Path):
    """A machine that lost its power may have lost the end of a file, or a file."""
    checkpoints = CheckpointFolder(tmp_path, keep=3)
    first, second, third = (filled(checkpoints, step) for step in (1, 2, 3))
    (third / "config.json").unlink()
    (second / "training" / "driver.json").write_text('{"finis')
    assert checkpoints.last() == first
    checkpoints.forget_after(1)
    assert [f.name for f in sorted(checkpoints.folder.iterdir())] == ["step_000001"]


def test_a_disk_that_refuses_loses_no_earlier_checkpoint(tmp_path: Path):
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    first = filled(checkpoints, 1)
    with pytest.raises(RunError, match="cannot write .*draft: No space left on device"), checkpoints.writing() as draft:
        (draft / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")
    assert checkpoints.last() == first and [f.name for f in checkpoints.folder.iterdir()] == [first.name]
    checkpoints.folder.joinpath(".draft").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="cannot write"), checkpoints.writing():
        pass
    assert checkpoints.last() == first


def test_two_processes_cannot_share_a_run_folder(tmp_path: Path):
    from cispo.output.run_folder import only_user_of

    with only_user_of(tmp_path), pytest.raises(UserError, match="is in use"), only_user_of(tmp_path):
        pass


def test_a_checkpoint_is_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers and the engine load it as it is, and `export` gives the same weights."""
    monkeypatch.chdir(ROOT)
    train(QUICKSTART, [f"output_dir={tmp_path}", *KEYS, "train.steps=2"], resume=False)
    checkpoint = CheckpointFolder(tmp_path / "quickstart", 2).last()
    assert checkpoint is not None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert len(AutoTokenizer.from_pretrained(checkpoint)) <= model.config.vocab_size
    cispo("export", str(checkpoint), "--to", str(tmp_path / "out"))
    one, other = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
