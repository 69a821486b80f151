"""Weights on disk: the three namings, loading, saving, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cispo.errors import UserError
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.minimax.config import parse_config
from cispo.policies.minimax.model import LightningAttention, LightningPolicy
from cispo.policies.minimax.names import Place, disk_names, place_of
from cispo.policies.policy import Policy
from tests.tiny_policies import (
    DENSE,
    EVERY_KIND,
    MINIMAX,
    ORIGINAL,
    QWEN3,
    bounds,
    logprobs,
    tokens_of,
)


def assert_same_weights(first: Policy, second: Policy) -> None:
    ours, theirs = first.to_hf(), second.to_hf()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@EVERY_KIND
def test_from_hf_of_to_hf_is_the_same_bit_for_bit(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    policy, other = init_policy(config, 0, dtype), init_policy(config, 1, dtype)
    other.load_hf(policy.to_hf().items())
    assert_same_weights(policy, other)
    other.load_hf(policy.to_hf().items())  # a second update into the same policy
    save_policy(policy, tmp_path)
    loaded = load_policy(tmp_path, dtype)
    assert_same_weights(policy, loaded)
    assert loaded.hf_config() == policy.hf_config()
    assert not list(tmp_path.glob("*.partial"))
    tokens = tokens_of(20)
    with torch.no_grad():
        assert torch.equal(logprobs(loaded, tokens), logprobs(policy, tokens))


def test_tied_head_is_written_once_and_accepted_twice() -> None:
    for config in ({**MINIMAX, "tie_word_embeddings": True}, QWEN3):
        policy, other = init_policy(config, 0), init_policy(config, 1)
        weights = policy.to_hf()
        assert "lm_head.weight" not in weights
        assert policy.lm_head_weight.data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
        other.load_hf([*weights.items(), ("lm_head.weight", weights["model.embed_tokens.weight"].clone())])
        assert_same_weights(policy, other)


def test_fused_names_and_stray_buffers_load() -> None:
    policy, other = init_policy(MINIMAX, 0), init_policy(MINIMAX, 1)
    assert isinstance(policy, LightningPolicy)
    fused = {
        name if name.startswith("lm_head") else f"model.{name}": parameter.detach()
        for name, parameter in policy.named_parameters()
    }
    assert fused["model.layers.0.mlp.experts.gate_up_proj"].shape == (5, 72, 48)
    for buffer in ("slope_rate", "query_decay", "key_decay", "diagonal_decay", "rotary_emb.inv_freq"):
        fused[f"model.layers.0.self_attn.{buffer}"] = torch.full((6,), float("nan"))
    other.load_hf(fused.items())
    assert_same_weights(policy, other)


def test_place_of_is_the_inverse_of_disk_names() -> None:
    policy = init_policy({**ORIGINAL, "shared_intermediate_size": 1}, 0)
    assert isinstance(policy, LightningPolicy)
    seen = [pair for name, _ in policy.named_parameters() for pair in disk_names(name, 4)]
    assert {name for name, _ in seen} == set(policy.to_hf())
    for name, place in seen:
        assert place_of(name) == place
    w3 = place_of("model.layers.7.block_sparse_moe.experts.11.w3.weight")
    assert w3 == Place("layers.7.mlp.experts.gate_up_proj", 11, "up")


def test_slopes_stay_float32_and_out_of_the_checkpoint() -> None:
    policy = init_policy(MINIMAX, 0, torch.bfloat16)
    assert isinstance(policy, LightningPolicy)
    expected = parse_config(MINIMAX).slopes(0)
    for cast in (policy, policy.to(torch.bfloat16), policy.half(), policy.bfloat16()):
        first = next(module for module in cast.modules() if isinstance(module, LightningAttention))
        assert first.slopes.dtype == torch.float32 and torch.equal(first.slopes, expected)
    assert not [name for name in policy.state_dict() if "slope" in name or "decay" in name]
    assert not list(policy.buffers())
    output = policy(tokens_of(30), torch.arange(30), bounds([10, 20]))
    assert output.hidden.dtype == torch.bfloat16 and torch.isfinite(output.hidden).all()
    exact = init_policy(MINIMAX, 0)
    exact.load_hf(policy.to_hf().items())
    with torch.no_grad():
        error = (logprobs(policy, tokens_of(30)) - logprobs(exact, tokens_of(30))).abs().mean()
    assert error < 0.1  # 8-bit roundings, and a router that may flip


@EVERY_KIND
def test_initial_weights_depend_on_the_seed_alone(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = init_policy(config, seed=7)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(123)
    assert_same_weights(first, init_policy(config, seed=7))
    second = init_policy(config, seed=8).to_hf()
    matrices = torch.cat([t.flatten() for t in first.to_hf().values() if t.ndim > 1])
    assert matrices.std() == pytest.approx(config["initializer_range"], rel=0.05)
    assert abs(matrices.mean()) < config["initializer_range"] / 20
    for name, tensor in first.to_hf().items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert not torch.equal(tensor, second[name])
    rounded = init_policy(config, seed=7, dtype=torch.bfloat16).to_hf()
    for name, tensor in first.to_hf().items():
        assert torch.equal(rounded[name], tensor.bfloat16())


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_sharded_checkpoints_load(index: bool, tmp_path: Path) -> None:
    policy = init_policy(MINIMAX, 0)
    save_policy(policy, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = list(policy.to_hf().items())
    shards = {"model-00001-of-00002.safetensors": weights[:20], "model-00002-of-00002.safetensors": weights[20:]}
    for file, part in shards.items():
        save_file({name: tensor.contiguous() for name, tensor in part}, tmp_path / file)
    if index:
        weight_map = {name: file for file, part in shards.items() for name, _ in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        save_file({"junk": torch.zeros(1)}, tmp_path / "consolidated.safetensors")  # not in the index
    assert_same_weights(policy, load_policy(tmp_path))
    if index:
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors"):
            load_policy(tmp_path)


def test_special_tokens_survive_a_round_trip(tmp_path: Path) -> None:
    save_policy(init_policy({**MINIMAX, "eos_token_id": [1, 3], "bos_token_id": None}, 0), tmp_path)
    config = load_policy(tmp_path).hf_config()
    assert config["eos_token_id"] == [1, 3] and config["bos_token_id"] is None and "pad_token_id" not in config


# --- bad input -------------------------------------------------------------------------------------------------------


def _drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _listed_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')


def _drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _edit(function: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        function(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_config, "config.json is missing"),
        (_break_config, "config.json cannot be read"),
        (_listed_config, "config.json is not a JSON object"),
        (_unknown_type, "no_such_model"),
        (_drop_weights, "holds no weights"),
        (_cut_weights, "broken or cut short"),
        (_edit(lambda w: w.pop("model.layers.1.post_attention_layernorm.weight")), "1 weights are missing"),
        (_edit(lambda w: w.update(stray=torch.zeros(1))), "'stray' has no place"),
        (_edit(lambda w: w.update({"model.norm.weight": torch.ones(3)})), "'model.norm.weight' has shape"),
    ],
    ids=["no config", "broken config", "list", "unknown", "no weights", "cut", "missing", "unexpected", "shape"],
)
@pytest.mark.parametrize("config", [MINIMAX, QWEN3], ids=["minimax", "qwen3"])
def test_broken_folders_give_one_sentence(
    config: dict[str, Any], damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save_policy(init_policy(config, 0), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_policy(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    other = {**MINIMAX, "num_local_experts": 6}
    with pytest.raises(UserError, match="no place in this policy|has shape"):
        init_policy(MINIMAX, 0).load_hf(init_policy(other, 0).to_hf().items())
    with pytest.raises(UserError, match="weights are missing"):
        init_policy(other, 0).load_hf(
            (name, t) for name, t in init_policy(MINIMAX, 0).to_hf().items() if not name.endswith("gate.weight")
        )
    with pytest.raises(UserError, match="no place in this policy"):
        init_policy(QWEN3, 0).load_hf(init_policy(MINIMAX, 0).to_hf().items())


def test_a_source_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_policy(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a folder"):
        load_policy("runs/quickstart/missing/policy")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama4_text", "num_local_experts": 4, **DENSE},
        {"model_type": "gpt_oss", "num_local_experts": 4, **DENSE},
        {"model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2, **DENSE},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, **DENSE},
        {"model_type": "lfm2", **DENSE},
        {"model_type": "mamba", "vocab_size": 40, "hidden_size": 48, "num_hidden_layers": 2},
        {"model_type": "jamba", **DENSE},
        {"model_type": "gemma2", **DENSE},
        {"model_type": "bert", "vocab_size": 40},
        {"model_type": "gptj", "vocab_size": 40},
        {"model_type": "vit"},
        {"model_type": "llama", "hidden_size": "wide"},
    ],
    ids=lambda config: config["model_type"],
)
def test_models_that_packing_would_change_are_refused(config: dict[str, Any]) -> None:
    """Recurrent, convolutional, windowed, expert and rescaled models: one sentence naming the kind of model."""
    with pytest.raises(UserError, match=config["model_type"]) as caught:
        init_policy(config, 0)
    assert "\n" not in str(caught.value)
