"""Bad input of every kind: one clear sentence that names the key or file, exit code 2, no traceback, nothing lost.

The commands run in this process with the small torch engine; two go through a real shell and Ray as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cispo import cli
from cispo.policies.loading import init_policy, save_policy
from tests.bad_inputs import CASES, TINY
from tests.bad_inputs import CHARS as CHARS_FOLDER

ROOT = Path(__file__).parents[1]
CHARS = str(CHARS_FOLDER)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a small recipe that works, with changes given as dotted keys."""
    monkeypatch.chdir(tmp_path)

    def write(**changes: object) -> Path:
        values: dict = {
            "name": "bad",
            "runtime": "local",
            "output_dir": str(tmp_path / "runs"),
            "policy": {"tokenizer": CHARS, "config": dict(TINY)},
            "data": {"source": "rewards.sorting:problems", "args": {"size": 8, "seed": 0, "count": 2}},
            "eval": {"source": "rewards.sorting:problems", "split": "test", "args": {"size": 4, "seed": 0, "count": 2}},
            "reward": {"functions": [{"fn": "rewards.exact:exact_match"}]},
            "rollout": {
                "engine": "torch",
                "prompts_per_step": 2,
                "group_size": 2,
                "max_context": 32,
                "max_tokens": 4,
            },
            "train": {"steps": 1},
        }
        for key, value in changes.items():
            *parents, leaf = key.split("__")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            section[leaf] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return write


def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Runs a command that must end with exit code 2 and one sentence; returns the sentence."""
    monkeypatch.setattr(sys, "argv", ["cispo", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capfd.readouterr()
    assert ended.value.code == 2, captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("cispo: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err + captured.out
    return lines[0]


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def module(folder: Path, text: str) -> None:
    (folder / "my_rewards.py").write_text(text)
    sys.modules.pop("my_rewards", None)


def test_the_recipe_works_without_the_mistakes(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(sys, "argv", ["cispo", "train", str(recipe())])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    run = tmp_path / "runs" / "bad"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and "eval/accuracy" in rows[1]
    assert (run / "learning_curve.png").stat().st_size > 10_000
    assert (run / "checkpoints" / "step_000001" / "model.safetensors").exists()
    assert (run / "samples" / "train_000001.parquet").exists() and (run / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learner__lrr": 1}, "unknown key learner.lrr (did you mean learner.lr?)"),
        ({"train__steps": "many"}, "train.steps = 'many'"),
        ({"algorithm__name": "cispoo"}, "algorithm.name 'cispoo' is unknown (did you mean cispo?)"),
        ({"algorithm__name": "best"}, "algorithm.name 'best' is unknown (there are cispo, cispo_masked"),
        ({"algorithm__name": "nowhere:ALGO"}, "algorithm.name"),
        ({"algorithm__name": "rewards.exact:exact_match"}, "is not an Algorithm"),
        ({"algorithm__ratio_max": 0.2}, "algorithm.ratio_max 0.2 is below 1"),
        ({"algorithm__clip_low": 0.2}, "algorithm.clip_low means nothing to cispo"),
        ({"algorithm__advantage": "gaee"}, "algorithm.advantage 'gaee' is unknown; there are group_norm"),
        ({"rollout__group_size": 1}, "rollout.group_size 1"),
        ({"rollout__top_p": 0.9}, "top_p"),
        ({"curriculum__drop_below": 0.1}, "unknown key curriculum.drop_below (did you mean curriculum.drop_above?)"),
        ({"curriculum__length_stages": [[0, 2], [1, 8]]}, "curriculum.length_stages has 8 tokens, rollout.max_tokens"),
        ({"data__source": "missing.jsonl"}, "missing.jsonl"),
        ({"data__source": "rewards.sorting:problem"}, "did you mean"),
        ({"data__source": "reasoning_gym:chain_summ", "data__args": {"size": 2, "seed": 0}}, "chain_summ"),
        ({"data__args": {"size": 8}}, "seed"),
        ({"data__prompt": "{question}"}, "question"),
        ({"data__args": {"size": 8, "seed": 0, "count": 20}}, "rollout.max_context 32"),
        ({"reward__functions": [{"fn": "rewards.exact:exact"}]}, "exact_match"),
        ({"reward__functions": [{"fn": "nowhere.at_all:fn"}]}, "nowhere"),
        ({"reward__functions": [{"fn": "rewards.sorting:problems"}]}, "must take completion"),
        ({"policy__tokenizer": "no/such/folder/here"}, "no/such/folder/here"),
        ({"policy__config__vocab_size": 10}, "policy.config.vocab_size 10 is smaller than the tokenizer's"),
        ({"policy__config__layer_types": ["linear_attention"]}, "layer_types has 1 entries"),
        ({"policy__config__layer_types": ["lightning", "full_attention"]}, "layer_types holds 'lightning'"),
        ({"policy__config__num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        ({"learner__ranks": 2}, "learner.ranks must be 1"),
        ({"output_dir": "/proc/cannot"}, "output_dir '/proc/cannot' cannot be written"),
        ({"sft": {"data": {"source": "rewards.sorting:problems", "args": {"size": 4, "seed": 0}}}}, "'completion'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_recipe_mistakes(
    recipe: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict,
    expected: str,
):
    sentence = refused(capfd, monkeypatch, "train", recipe(**changes))
    assert expected in sentence, sentence
    assert len(sentence) < 500


def test_malformed_rows_name_the_line(
    recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    good = {"prompt": "1>", "answer": "1"}
    file = lines(tmp_path / "rows.jsonl", good, '{"prompt": "2>"', good)
    assert "line 2" in refused(capfd, monkeypatch, "train", recipe(data={"source": file}))
    file = lines(tmp_path / "rows.jsonl", good, {"answer": "1"})
    assert "prompt" in refused(capfd, monkeypatch, "train", recipe(data={"source": file}))
    (tmp_path / "rows.jsonl").write_text("")
    assert "no rows" in refused(capfd, monkeypatch, "train", recipe(data={"source": file}))
    file = lines(tmp_path / "rows.jsonl", {"prompt": "1>"})
    sentence = refused(capfd, monkeypatch, "train", recipe(data={"source": file}))
    assert "answer" in sentence and "exact_match" in sentence


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("    return 1 / 0", "ZeroDivisionError"),
        ("    import time; time.sleep(600)", "did not finish within 1 s"),
        ("    return 'good'", "good"),
        ("    return float('nan')", "nan"),
    ],
)
def test_rewards_that_fail(
    recipe: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    body: str,
    expected: str,
):
    module(tmp_path, f"def reward(completion, **_):\n{body}\n")
    changes = {"reward": {"functions": [{"fn": "my_rewards:reward"}], "timeout": 1}}
    sentence = refused(capfd, monkeypatch, "train", recipe(**changes))
    assert "my_rewards:reward" in sentence and expected in sentence and "prompt" in sentence


def test_tokenizer_without_eos(
    recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folder = tmp_path / "tok"
    folder.mkdir()
    config = json.loads(Path(CHARS, "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(Path(CHARS, "tokenizer.json").read_text())
    assert "no eos token" in refused(capfd, monkeypatch, "train", recipe(policy__tokenizer=str(folder)))


def test_model_folders(
    recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model = tmp_path / "model"
    save_policy(init_policy({"vocab_size": 128, **TINY}, seed=0), model)
    policy = {"tokenizer": CHARS, "model": str(model)}

    def train() -> str:
        return refused(capfd, monkeypatch, "train", recipe(policy=policy))

    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    assert "holds no weights" in train()
    (model / "model.safetensors").write_bytes(weights[:1000])
    assert "broken or cut short" in train()
    (model / "model.safetensors").write_bytes(weights)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    assert "shape" in train()
    (model / "config.json").write_text("{")
    assert "config.json" in train()
    policy["model"] = str(tmp_path / "nothing" / "here")
    assert "nothing/here" in train()


def test_checkpoints(
    recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    other = tmp_path / "other"
    save_policy(init_policy({"vocab_size": 128, **TINY, "hidden_size": 24}, seed=0), other)
    sentence = refused(capfd, monkeypatch, "evaluate", recipe(), "--checkpoint", other)
    assert "of another model" in sentence and "hidden_size is 24" in sentence
    assert "does not exist" in refused(capfd, monkeypatch, "evaluate", recipe(), "--checkpoint", tmp_path / "gone")
    assert "--checkpoint" in refused(capfd, monkeypatch, "evaluate", recipe())
    assert "not empty" in refused(capfd, monkeypatch, "export", other, "--to", tmp_path)
    assert "--prompt" in refused(capfd, monkeypatch, "generate", recipe(), "--checkpoint", other)


def test_missing_sections(
    recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert "no sft: section" in refused(capfd, monkeypatch, "sft", recipe())
    assert "no reward: section" in refused(capfd, monkeypatch, "train", recipe(reward=None))
    assert "does not exist" in refused(capfd, monkeypatch, "train", "nowhere.yaml")
    assert "key=value" in refused(capfd, monkeypatch, "show", recipe(), "oops")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Path -> content of every file and folder, without what Python and the lock of a run folder leave."""
    found = [p for p in folder.rglob("*") if "__pycache__" not in p.parts and p.name != ".lock"]
    return {str(p): p.read_bytes() if p.is_file() else None for p in found}


@pytest.mark.parametrize("name", CASES)
def test_further_bad_inputs(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """One sentence, exit code 2 or 1, no traceback, and not one file more, less or changed."""
    if "GPU" in name and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    make, expected = CASES[name]
    arguments = make()
    before = contents(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cispo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capfd.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("cispo: ")]
    assert ended.value.code in (1, 2) and len(said) == 1 and "Traceback" not in captured.err + captured.out
    assert expected in said[0] and len(said[0]) < 500
    assert contents(tmp_path) == before


def test_a_failing_reward_in_a_real_run_with_ray(recipe: Callable[..., Path], tmp_path: Path):
    """The sentence crosses Ray and the shell as it is; the files of the run stay."""
    module(tmp_path, "def reward(completion, **_):\n    raise RuntimeError('the judge is down')\n")
    file = recipe(reward={"functions": [{"fn": "my_rewards:reward"}]}, runtime="ray")
    command = [sys.executable, "-m", "cispo.cli", "train", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 2, done.stderr
    assert "the judge is down" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert (tmp_path / "runs" / "bad" / "recipe.yaml").exists()
