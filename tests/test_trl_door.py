"""Scripts written for TRL run with another import, and nothing else changed."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cispo.errors import UserError
from cispo.recipe.load import parse_recipe
from cispo.rollout.renderer import load_tokenizer
from cispo.trl import GRPOConfig, GRPOTrainer

SCRIPTS = Path(__file__).with_name("trl_scripts")
ROOT = SCRIPTS.parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of Hugging Face with the shipped character tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(ROOT / "recipes" / "tokenizers" / "chars")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=int(str(tokenizer.eos_token_id)),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(name: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The metrics of a script whose import alone is changed."""
    text = (SCRIPTS / f"{name}.py").read_text()
    assert text.count("from trl import") == 1
    script = folder / f"{name}.py"
    script.write_text(text.replace("from trl import", "from cispo.trl import"))
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("OUTPUT", str(folder / "out" / "grpo"))
    runpy.run_path(str(script), run_name="__main__")
    return [json.loads(line) for line in (folder / "out" / "grpo" / "metrics.jsonl").read_text().splitlines()]


def test_two_rewards(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("two_rewards", model, tmp_path, monkeypatch)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["total/updates"] == 2
    for row in rows[1:]:
        mean = row["reward/accuracy_reward"] + 0.5 * row["reward/length_reward"]
        assert row["reward/mean"] == pytest.approx(mean) and row["length/mean"] <= 6
    final = tmp_path / "out" / "grpo-final"
    before, after = load_file(model / "model.safetensors"), load_file(final / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before if name in after)
    assert not (final / "training").exists()
    assert not list((tmp_path / "out" / "grpo").glob("events.*")), "report_to none"


def test_message_lists(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("message_lists", model, tmp_path, monkeypatch)
    # 0.4 epochs of 6 prompts, 2 a batch.
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all("eval/accuracy" in row for row in rows)
    assert 0 <= rows[1]["reward/format_reward"] <= 1 and "reward/solution_reward" in rows[1]


def test_keyword_arguments(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}=", "level": ["easy", "hard"][i % 2]}) + "\n" for i in range(8)))
    monkeypatch.setenv("ROWS", str(data))
    rows = run("keyword_arguments", model, tmp_path, monkeypatch)
    assert [row["total/updates"] for row in rows] == [0, 2, 4], "two passes over each batch"
    import pyarrow.parquet as pq

    samples = pq.read_table(tmp_path / "out" / "grpo" / "samples" / "train_000002.parquet").to_pylist()
    assert {json.loads(sample["extra"])["step"] for sample in samples} == {2}
    checkpoint = tmp_path / "out" / "grpo" / "checkpoints" / "step_000002"
    assert (checkpoint / "adapter_config.json").exists()


def _recipe(model: Path, tmp_path: Path, **keys: object) -> Mapping[str, Any]:
    trainer = GRPOTrainer(
        model=str(model),
        reward_funcs=[len],
        args=GRPOConfig(output_dir=str(tmp_path / "x" / "run"), bf16=False, **{"max_completion_length": 32, **keys}),
        train_dataset=[{"prompt": "1+1="}] * 64,
    )
    parse_recipe(trainer.recipe)
    return trainer.recipe


def test_keys_become_those_of_a_recipe(model: Path, tmp_path: Path) -> None:
    recipe = _recipe(
        model,
        tmp_path,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        max_steps=8,
    )
    # 128 completions a batch, of 8 a prompt; an optimizer step on every 32 of them.
    assert recipe["rollout"]["prompts_per_step"] == 16 and recipe["algorithm"]["updates_per_batch"] == 4
    assert recipe["train"]["steps"] == 2 and recipe["learner"]["schedule"] == "linear"
    assert recipe["algorithm"]["name"] == "trl_grpo" and recipe["algorithm"]["reduction"] == "token"
    assert recipe["rollout"]["max_context"] == 64, "the model's positions"
    other = _recipe(model, tmp_path, use_vllm=True, loss_type="grpo", epsilon_high=0.28, beta=0.1, num_train_epochs=1)
    assert other["algorithm"]["correction"] == "sequence_mask" and other["algorithm"]["clip_high"] == 0.28
    assert other["train"]["steps"] == 64 and other["algorithm"]["kl_coef"] == 0.1 and other["runtime"] == "ray"


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"num_generation": 4}, r"unknown key num_generation \(did you mean num_generations\?\)"),
        ({"top_p": 0.9}, "top_p=0.9 is not supported here: truncated sampling"),
        ({"deepspeed": "zero3.json"}, "deepspeed='zero3.json' is not supported here: learner.shard"),
        ({"loss_type": "sapo"}, "loss_type='sapo' is none of cispo, dapo"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' is not supported here"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type='polynomial' is none of"),
        ({"num_generations": 3}, "a batch of 8 completions .* is no multiple of num_generations 3"),
        ({"max_completion_length": 64}, "64 leaves no room for a prompt in the 64 positions of the model"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 weights for 1 reward functions"),
    ],
)
def test_keys_that_cannot_be_honoured(model: Path, tmp_path: Path, keys: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _recipe(model, tmp_path, **keys)


def test_arguments_without_a_counterpart(model: Path, tmp_path: Path) -> None:
    args = GRPOConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="callbacks is not supported here"):
        GRPOTrainer(model=str(model), reward_funcs=len, args=args, train_dataset=[{"prompt": "a"}], callbacks=[1])
    with pytest.raises(UserError, match="train_dataset needs rows with a column 'prompt'"):
        GRPOTrainer(model=str(model), reward_funcs=len, args=args, train_dataset=[{"text": "a"}])
