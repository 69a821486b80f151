"""A policy against its tokenizer, its recipe and the machine, before a run folder exists; saved folders are whole."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cispo import cli
from cispo.errors import UserError
from cispo.policies.loading import init_policy, load_policy, max_positions_of, save_policy
from cispo.recipe.schema import Policy, Recipe, Rollout
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.start import check_new_policy, check_vocabulary, chosen_policy
from tests.test_bad_input import TINY
from tests.tiny_policies import LLAMA

CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(load_tokenizer(CHARS))


def recipe_of(config: Mapping[str, object], max_context: int = 64) -> Recipe:
    policy = Policy(config=dict(config), tokenizer=str(CHARS))
    return Recipe(policy=policy, rollout=Rollout(max_context=max_context, max_tokens=8))


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({**TINY, "vocab_size": 10**11}, "policy.config describes a policy of .* GiB, and this machine has"),
        ({"model_type": "llama", **SMALL, "vocab_size": 10**11}, "policy.config describes a policy of .* GiB"),
        ({"model_type": "llama", **SMALL, "vocab_size": 10**19}, "the 'llama' config"),
        ({"model_type": "llama", **SMALL, "vocab_size": -5}, "the config|the 'llama' config"),
        ({"model_type": "llama", **SMALL, "vocab_size": 10}, "policy.config.vocab_size 10 is smaller"),
        ({"model_type": "llama", **SMALL, "rope_parameters": nested(900)}, "the config|the 'llama' config"),
        ({"model_type": 3}, "model_type 3"),
        ({"architectures": 5, **SMALL}, "the config|model_type"),
        ({**TINY, "max_position_embeddings": 32}, "rollout.max_context 64 is above the 32 positions of policy.config"),
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}, "above the 32 positions"),
    ],
)
def test_a_config_without_a_possible_policy(renderer: Renderer, config: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        check_new_policy(recipe_of(config), renderer)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_defaults_of_a_class_bound_the_context_too(renderer: Renderer) -> None:
    check_new_policy(recipe_of(TINY), renderer)
    with pytest.raises(UserError, match="rollout.max_context 200000 is above the 131072 positions"):
        check_new_policy(recipe_of(TINY, max_context=200_000), renderer)


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"])
def test_positions_under_any_name(tmp_path: Path, key: str) -> None:
    assert max_positions_of({key: 128}) == 128 == max_positions_of({"text_config": {key: 128}})
    assert max_positions_of({}) is None and max_positions_of({key: "128", "n_ctx": 7}) == 7
    save_policy(init_policy(TINY | {"vocab_size": 128}, seed=0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 32}))
    recipe = Recipe(policy=Policy(model=str(tmp_path)), rollout=Rollout(max_context=64, max_tokens=8))
    for checkpoint in (None, str(tmp_path)):
        with pytest.raises(UserError, match="rollout.max_context 64 is above the 32 positions that the policy in"):
            chosen_policy(recipe, checkpoint)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path, renderer: Renderer) -> None:
    """Only tokens that occur need a row: some tokenizers have tokens that their model never had."""
    save_policy(init_policy(TINY | {"vocab_size": 50}, seed=0), tmp_path)
    renderer.render([{"role": "user", "content": "2,1"}])
    check_vocabulary(str(tmp_path), renderer)
    renderer.render([{"role": "user", "content": "z"}])
    with pytest.raises(
        UserError, match=r"is larger than the vocabulary of .* token 96 \('z'\) has no place in 50 rows"
    ):
        check_vocabulary(str(tmp_path), renderer)


def test_a_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    save_policy(init_policy(TINY | {"vocab_size": 128}, seed=0), tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"a": ' * 30_000 + "1" + "}" * 30_000)
    for read in (load_policy, lambda folder: chosen_policy(Recipe(policy=Policy(model=str(folder))), None)):
        with pytest.raises(UserError, match="config.json cannot be read: it is nested too deeply"):
            read(tmp_path)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(UserError, match="config.json"):
        load_policy(tmp_path)


# Whole folders


def test_saved_and_exported_folders_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For transformers, a checkpoint, its export and the reference policy have the logits, prompts and ends of the
    model that the training started from.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = tmp_path / "model"
    save_policy(init_policy({**LLAMA, "vocab_size": 128, "initializer_range": 0.1}, seed=0), model)
    renderer = Renderer(load_tokenizer(CHARS))
    renderer.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}>"
    renderer.save(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "top_p": 0.9}))
    _train(tmp_path, model, monkeypatch)
    checkpoint = tmp_path / "runs" / "whole" / "checkpoints" / "step_000001"
    _cli(monkeypatch, "export", str(checkpoint), "--to", str(tmp_path / "out"))
    token_ids = torch.tensor([[5, 6, 7, 8]])
    reference = AutoModelForCausalLM.from_pretrained(str(model))(token_ids).logits
    for folder in (checkpoint, tmp_path / "out", checkpoint.parent / "reference"):
        assert GenerationConfig.from_pretrained(str(folder)).eos_token_id == [2, 7]
        assert json.loads((folder / "generation_config.json").read_text())["top_p"] == 0.9
        again = Renderer(load_tokenizer(folder))
        assert again.eos_ids == (2, 7)
        assert again.render([{"role": "user", "content": "a"}]) == [71, 2, 36]
        assert AutoTokenizer.from_pretrained(str(folder)).chat_template == renderer.tokenizer.chat_template
        # A learning rate of 1e-30 leaves the weights as they were.
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(str(folder))(token_ids).logits, reference)


def test_an_export_without_a_tokenizer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_policy(init_policy(TINY | {"vocab_size": 128}, seed=0), tmp_path / "model")
    _cli(monkeypatch, "export", str(tmp_path / "model"), "--to", str(tmp_path / "out"))
    assert "holds no tokenizer" in capsys.readouterr().err


def _train(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        "name": "whole",
        "runtime": "local",
        "output_dir": str(folder / "runs"),
        "policy": {"model": str(model)},
        "data": {"source": "rewards.sorting:problems", "args": {"size": 8, "seed": 0, "count": 2}},
        "reward": {"functions": [{"fn": "rewards.exact:exact_match"}]},
        "rollout": {"engine": "torch", "prompts_per_step": 2, "group_size": 2, "max_context": 32, "max_tokens": 4},
        "algorithm": {"name": "grpo"},
        "learner": {"lr": 1e-30},
        "train": {"steps": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    _cli(monkeypatch, "train", str(folder / "recipe.yaml"))


def _cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cispo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
