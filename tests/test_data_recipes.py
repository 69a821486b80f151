"""The recipes for datasets of the hub, whole and unchanged but for policy and sizes, on small files of our own.

A folder openai/gsm8k in the current directory goes before the hub's dataset of that name; the files have its columns.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cispo.commands.evaluate import evaluate_checkpoint
from cispo.commands.train import train
from cispo.output.folder import read_metrics
from cispo.recipe.load import load_recipe
from cispo.rollout.prompts import prompts_of
from cispo.rollout.renderer import Renderer, load_tokenizer

ROOT = Path(__file__).parents[1]
HUB = Path(__file__).parent / "data" / "hub"

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not enable_thinking | default(true) %}[no thoughts]{% endif %}"
    "{% endif %}"
)
CONFIG = (
    "{model_type: qwen3, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 1, head_dim: 8, max_position_embeddings: 1024, tie_word_embeddings: true}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Characters, with a chat template that can switch thoughts off."""
    folder = tmp_path_factory.mktemp("tokenizer")
    chars = load_tokenizer(ROOT / "recipes" / "tokenizers" / "chars")
    chars.chat_template = TEMPLATE
    chars.save_pretrained(str(folder))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the datasets as folders."""
    shutil.copytree(HUB, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def overrides(tokenizer: Path) -> list[str]:
    return [
        "policy.model=null", f"policy.tokenizer={tokenizer}", f"policy.config={CONFIG}", "policy.dtype=float32",
        "runtime=local", "device=cpu", "rollout.engine=torch", "rollout.max_context=512", "rollout.max_tokens=6",
        "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.placement=auto", "algorithm.dynamic_sampling=0",
        "train.steps=2", "train.eval_every=2", "train.save_every=1", "output_dir=runs", "logging=[]",
        "control.watchdog=0",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gsm8k", "math", "code"])
def test_a_recipe_trains_and_evaluates_its_dataset(name: str, here: Path, tokenizer: Path) -> None:
    run = train(Path(name), overrides(tokenizer), resume=False)
    rows = read_metrics(here / run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["data/overlong"] == 0
    sets = {"gsm8k": ["eval/accuracy"], "math": ["eval/math500/avg@4", "eval/aime24/avg@16", "eval/math500/maj@4"],
            "code": ["eval/mbpp/avg@1", "eval/humaneval/avg@4", "eval/humaneval/pass@2"]}[name]  # fmt: skip
    assert all(metric in rows[0] and metric in rows[2] and metric not in rows[1] for metric in sets)
    best = json.loads((here / run / "checkpoints" / "best.json").read_text())
    assert best["step"] == 2 and sets[0] in best


def test_prompts_are_those_of_the_configuration_with_system_and_template_arguments(here: Path, tokenizer: Path) -> None:
    recipe = load_recipe("gsm8k", overrides(tokenizer))
    renderer = Renderer(load_tokenizer(tokenizer))
    assert recipe.data is not None and not isinstance(recipe.eval, list) and recipe.eval is not None
    train_set = prompts_of(recipe.data, "data", renderer, recipe)
    held_out = prompts_of(recipe.eval, "eval", renderer, recipe)
    assert (len(train_set), len(held_out)) == (12, 6)
    for prompts in (train_set, held_out):  # the held-out prompts take over system and template_args of data
        prompt = prompts[0]
        text = renderer.with_args(prompt.template_args).text(prompt.messages)
        assert text.startswith("<system>Reason step by step") and text.endswith("<assistant>[no thoughts]")
        assert "<user>Ann has" in text
    assert not renderer.text(train_set[0].messages).endswith("[no thoughts]")
    math = load_recipe("math", overrides(tokenizer))
    assert math.data is not None
    first = prompts_of(math.data, "data", renderer, math)[0]
    assert first.columns["answer"] == "3" and first.columns["solution"] == "3"
    code = load_recipe("code", overrides(tokenizer))
    assert code.data is not None
    task = prompts_of(code.data, "data", renderer, code)[0]
    assert task.columns["test_code"] == ["assert double(2) == 4", "assert double(0) == 0"], "a list stays a list"


def test_a_run_is_evaluated_over_all_of_its_checkpoints(
    here: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = here / train(Path("gsm8k"), [*overrides(tokenizer), "eval.limit=3"], resume=False)
    capsys.readouterr()
    evaluate_checkpoint(run, ["eval.samples=4", "eval.answer=rewards.math:last_answer"], None)
    printed = capsys.readouterr().out
    assert all(f"{name}@" in printed for name in ("avg", "pass", "maj")) and "evaluation.png" in printed
    rows = json.loads((run / "evaluation.json").read_text())
    assert [row["step"] for row in rows] == [1, 2] and all(row["prompts"] == 3 for row in rows)
    for row in rows:
        assert row["avg@4"][1] <= row["avg@4"][0] <= row["avg@4"][2] and {"pass@2", "pass@4", "maj@4"} <= row.keys()
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    evaluate_checkpoint(run, ["eval.samples=4"], os.fspath(run / "checkpoints" / "step_000002"))
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert one["eval/accuracy"] == rows[1]["avg@4"][0] and one["intervals"]["eval/avg@4"] == rows[1]["avg@4"][1:]
