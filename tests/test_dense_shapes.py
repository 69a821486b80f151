"""Names and shapes of dense models from their config alone, against the models that transformers builds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cispo.errors import UserError
from cispo.policies import loading
from cispo.policies.dense.shapes import known_shapes
from cispo.policies.loading import check_weights, init_policy, save_policy, shape_of
from cispo.recipe.load import load_recipe
from cispo.run import load_task
from tests.tiny_policies import DENSE

KINDS = ("llama", "mistral", "qwen2", "qwen3")
CHANGES: list[dict[str, Any]] = [
    *({key: value} for key in DENSE for value in (0, -1, 2.0, 3, "4", None, True)),
    *({key: True} for key in ("attention_bias", "mlp_bias", "use_sliding_window", "tie_word_embeddings", "use_cache")),
    *({key: 1} for key in ("attention_bias", "mlp_bias", "use_sliding_window", "tie_word_embeddings", "use_cache")),
    {"hidden_act": "gelu"},
    {"hidden_act": "no such"},
    {"rms_norm_eps": "small"},
    {"attention_dropout": 2},
    {"pad_token_id": 40},
    {"eos_token_id": [1, 2]},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "no such", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_theta": 1e4}},
    {"rope_theta": "large"},
    {"layer_types": ["full_attention"] * 2},
    {"layer_types": ["full_attention"]},
    {"layer_types": ["linear_attention"] * 2},
    {"sliding_window": 16},
    {"num_experts": 4},
    {"quantization_config": {"quant_method": "fp8"}},
    {"final_logit_softcapping": 30.0},
    {"text_config": {}},
]


def config_of(kind: str, **changes: object) -> dict[str, Any]:
    return {"model_type": kind, "tie_word_embeddings": False, **DENSE, **changes}


def built_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    policy = shape_of(config)
    weights = policy.named_weights()
    return {name: tuple(weights[place.parameter].shape) for name, place in policy.disk_places()}


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_that_transformers_builds(kind: str, tied: bool) -> None:
    config = config_of(kind, tie_word_embeddings=tied)
    built = built_shapes(config)
    assert known_shapes(config) == built
    # The config.json of a checkpoint has every key that transformers writes.
    assert known_shapes(json.loads(json.dumps(shape_of(config).hf_config()))) == built


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_of_any_config_is_right(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A config that transformers refuses, warns of or builds otherwise has no known shapes."""
    known = 0
    for change in CHANGES:
        config = config_of(kind, **change)
        shapes = known_shapes(config)
        if shapes is not None:
            known += 1
            capfd.readouterr()
            assert built_shapes(config) == shapes, change
            assert capfd.readouterr() == ("", ""), change
    assert 5 <= known < len(CHANGES) / 2
    assert known_shapes({**config_of(kind), "model_type": [kind]}) is None
    assert known_shapes({key: value for key, value in config_of(kind).items() if key != "hidden_size"}) is None


def damaged(folder: Path) -> Iterator[str]:
    """A folder of a policy with one thing after another changed in it."""
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    for change in (
        {other: weight for other, weight in weights.items() if other != name},
        {**weights, name: weights[name][:, 1:].clone()},
        {**weights, "model.layers.2.mlp.up_proj.weight": weights[name].clone()},
        {**weights, name: weights[name].to(torch.int8)},
    ):
        save_file(change, folder / "model.safetensors")
        yield "weights"
    save_file(weights, folder / "model.safetensors")
    for change in ({"hidden_size": 50}, {"hidden_size": "wide"}, {"num_hidden_layers": 3}, {"num_experts": 4}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        yield "config"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"cut short")
    yield "file"
    (folder / "model.safetensors").unlink()
    yield "no file"


def test_a_damaged_folder_is_refused_in_the_words_of_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_policy(init_policy(config_of("qwen2"), 0), tmp_path)
    check_weights(tmp_path)
    for what in damaged(tmp_path):
        with pytest.raises(UserError) as refused:
            check_weights(tmp_path)
        with monkeypatch.context() as patch, pytest.raises(UserError) as by_policy:
            patch.setattr(loading, "_known_shapes", lambda config: None)
            check_weights(tmp_path)
        assert str(refused.value) == str(by_policy.value), what


def test_transformers_models_are_not_imported_for_a_folder_with_known_shapes(tmp_path: Path) -> None:
    save_policy(init_policy(config_of("llama"), 0), tmp_path)
    code = (
        "import sys; from pathlib import Path; from cispo.policies.loading import check_weights;"
        f"check_weights(Path({str(tmp_path)!r})); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["learner.expert_parallel=2"], "learner.expert_parallel 2: the policy has no experts to distribute"),
        (["learner.expert_tensor_parallel=2"], "learner.expert_tensor_parallel 2: the policy has no experts"),
        (["policy.router_replay=rollout"], "policy.router_replay rollout: the policy has no experts to replay"),
        (["learner.router_bias_rate=0.1"], "learner.router_bias_rate 0.1: no router of the policy has a bias"),
        (["learner.router_aux_coef=0.1"], "learner.router_aux_coef 0.1: the policy has no experts to balance"),
    ],
)
def test_keys_for_experts_are_refused_before_a_run(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    """A recipe that asks nothing of experts needs no policy, one that does is refused as early."""
    save_policy(init_policy(config_of("qwen3", vocab_size=128), 0), tmp_path / "model")
    small = ["policy.config=null", f"policy.model={tmp_path / 'model'}", "sft=null", "data.args.size=4", "eval=null"]
    recipe_of = partial(load_recipe, Path("recipes/qwen3_tiny.yaml"))
    places = [*small, f"output_dir={tmp_path / 'runs'}", "learner.ranks=2"]
    assert len(load_task(recipe_of(places)).prompts) == 4
    with pytest.raises(UserError, match=sentence):
        load_task(recipe_of([*places, *overrides]))
