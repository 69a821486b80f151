"""Latent attention and its families beyond the tiny checkpoints: variants, spellings, hand-worked numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cispo.errors import UserError
from cispo.ops.expansion import Recomputed
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.sparse_attention import Index
from cispo.policies.families import family_of
from cispo.policies.hybrid import deepseek, kimi_linear
from cispo.policies.hybrid.config import IndexerConfig, MLAConfig
from cispo.policies.hybrid.mla import Indexer, MultiHeadLatentAttention, turn
from cispo.policies.loading import count_parameters, init_policy, load_policy
from cispo.policies.lora import adapt
from cispo.recipe.schema import Lora
from tests.tiny_hybrids import COMMON, TINY, VOCAB, draw_weights, save
from tests.tiny_policies import assert_close, bounds, logprobs, tokens_of

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}

VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # (family, keys of transformers' config, keys of config.json, where null takes a key out)
    "yarn, scores grow with the context": ("deepseek_v3", {"rope_parameters": YARN}, {}),
    "yarn, no growth of scores": ("deepseek_v3", {"rope_parameters": {**YARN, "mscale_all_dim": 0}}, {}),
    "yarn as the release spells it": (
        "deepseek_v3",
        {"rope_parameters": YARN},
        {
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_scaling": {("type" if key == "rope_type" else key): v for key, v in YARN.items()},
        },
    ),
    "halves rotated": ("deepseek_v3", {"rope_interleave": False}, {}),
    "no latents of queries, biases": ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}, {}),
    "yarn with an indexer": ("deepseek_v32", {"rope_parameters": YARN}, {}),
    "latents of queries, groups": (
        "kimi_linear",
        {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]},
        {},
    ),
    "two shared experts": ("kimi_linear", {"n_shared_experts": 2}, {}),
}


@pytest.mark.parametrize("family, changes, on_disk", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_equal_transformers(
    family: str, changes: dict[str, Any], on_disk: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TINY[family]
    values = {**COMMON, **tiny.config, **changes}
    monkeypatch.setitem(TINY, family, replace(tiny, config=values, added={**tiny.added, **on_disk}))
    model = save(family, tmp_path)
    tokens = tokens_of(120, VOCAB, seed=4)
    with torch.no_grad():
        expected = model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
        assert_close(logprobs(load_policy(tmp_path), tokens), expected, 1e-5)


def test_sparse_attention_equals_stock_transformers(tmp_path: Path) -> None:
    """Without the tie rule patched in: up to `index_topk` tokens every key is selected."""
    tiny, tokens = TINY["deepseek_v32"], tokens_of(90, VOCAB, seed=4)
    config = AutoConfig.for_model("deepseek_v32", **{**COMMON, **tiny.config, "index_topk": 90})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    draw_weights(model, 0)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
        assert_close(logprobs(load_policy(tmp_path), tokens), expected, 1e-5)


# --- by hand ---------------------------------------------------------------------------------------------------------


class Recorded:
    """Attention that keeps its inputs and answers with the values."""

    inputs: tuple[Tensor, Tensor, Tensor]
    scale: float | None
    index: Index | None = None

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        self.inputs, self.scale = (q, k, v), scale
        return v

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        self.index = index
        return self.softmax(q, k, v, scale)

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        raise AssertionError("latent attention has no state")


@torch.no_grad()
def test_expanded_keys_by_hand() -> None:
    """W_UK = [[1, 2], [0, 1]] and latents (1, 0), (1, 1): keys (1, 0), (3, 1); the query (1, 2) scores 1 and 5.

    Absorbed, the query is (1, 4) against the latents: 1 and 5 again.
    """
    config = MLAConfig(
        num_heads=1,
        q_lora_rank=None,
        kv_lora_rank=2,
        nope_dim=2,
        rope_dim=2,
        value_dim=1,
        rotary=None,
        scale=0.25,
        latent_norm_eps=1e-6,
    )
    mla = MultiHeadLatentAttention(4, config)
    mla.q_proj.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    mla.kv_a_proj_with_mqa.weight.copy_(torch.eye(4))
    # Latents of mean square 1/2 and 1: the norm's weight is 1, so (1, 0) becomes (sqrt 2, 0) and is undone here.
    mla.kv_b_proj.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 1.0]]))
    attention = Recorded()
    mla(torch.tensor([[1.0, 0.0, 0.5, -1.0], [1.0, 1.0, 2.0, 3.0]]), attention, None)
    q, k, v = attention.inputs
    k[0, :, :2] /= 2**0.5
    assert_close(q[:, 0], torch.tensor([[1.0, 2.0, 0.0, 0.0]] * 2), 1e-5)
    assert_close(k[:, 0], torch.tensor([[1.0, 0.0, 0.5, -1.0], [3.0, 1.0, 2.0, 3.0]]), 1e-5)
    assert_close(k[:, 0] @ q[1, 0], torch.tensor([1.0, 5.0]), 1e-5)
    latents, absorbed = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), q[1, 0, :2] @ mla.kv_b_proj.weight[:2]
    assert_close(absorbed, torch.tensor([1.0, 4.0]), 1e-5)
    assert_close(latents @ absorbed, torch.tensor([1.0, 5.0]), 1e-5)
    assert attention.scale == 0.25 and v.shape == (2, 1, 1)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_recomputed_expansion_has_the_gradients_of_a_kept_one(adapter: bool) -> None:
    """Of the latents and of all weights that are trained: with an adapter its two matrices alone. float64, 1e-12."""
    policy = init_policy(TINY["deepseek_v3"].hf_config, seed=0)
    if adapter:
        policy = adapt(policy, Lora(rank=3, targets=["kv_b_proj"]))
        policy.load_adapter({name: torch.randn(w.shape) for name, w in policy.adapter().items()})
    policy.double()
    mla = next(module for module in policy.modules() if isinstance(module, MultiHeadLatentAttention))
    expand, config = mla.expansion, mla.config
    assert len(expand.trained) == (2 if adapter else 1)
    latents = torch.randn(7, config.kv_lora_rank).double(), torch.randn(7, 1, config.rope_dim).double()
    kept = [x.clone().requires_grad_() for x in latents]
    k, v = expand(*kept)
    above = torch.randn_like(k), torch.randn_like(v)
    expected = torch.autograd.grad((k, v), (*kept, *expand.trained), above)
    recomputed = Recomputed(expand, *latents)
    assert torch.equal(recomputed.keys, k) and torch.equal(recomputed.values, v)
    assert [tuple(x.shape) for x in expand.shapes(*latents)] == [(0, *k.shape[1:]), (0, *v.shape[1:])]
    of_latents, of_weights = recomputed.gradients(*above)
    for ours, theirs in zip((*of_latents, *of_weights), expected, strict=True):
        assert_close(ours, theirs, 1e-12)
    assert all(weight.grad is None for weight in expand.weights)


def test_pairs_and_halves_by_hand() -> None:
    """A quarter turn takes (a, b) to (-b, a): neighbours 1, 2 | 3, 4 or halves 1, 3 | 2, 4; the rest stays."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]])
    quarter = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert turn(x, quarter, pairs=True).tolist() == [[[-2.0, -4.0, 1.0, 3.0, 5.0, 6.0]]]
    assert turn(x, quarter, pairs=False).tolist() == [[[-3.0, -4.0, 1.0, 2.0, 5.0, 6.0]]]
    assert turn(x[..., :4], quarter, pairs=True).tolist() == [[[-2.0, -4.0, 1.0, 3.0]]]


@pytest.mark.parametrize("interleaved", [False, True])
def test_an_indexer_is_frozen_and_exact(interleaved: bool) -> None:
    """Neither its weights nor its inputs get a gradient; its weights of heads are float32 in a bfloat16 policy."""
    config = IndexerConfig(num_heads=3, head_dim=8, top_k=4, interleaved_rotary=interleaved)
    indexer = Indexer(16, 12, config)
    assert not any(parameter.requires_grad for parameter in indexer.parameters())
    x, latent = torch.randn(5, 16, requires_grad=True), torch.randn(5, 12, requires_grad=True)
    angles = torch.randn(5, 1, 2)
    index = indexer(x, latent, (angles.cos(), angles.sin()))
    assert index.queries.shape == (5, 3, 8) and index.keys.shape == (5, 8) and index.weights.shape == (5, 3)
    assert not (index.queries.requires_grad or index.keys.requires_grad or index.weights.requires_grad)
    # Rotation keeps the products of a token with itself.
    plain = indexer(x, latent, None)
    turned, straight = ((i.queries * i.keys[:, None]).sum(-1) for i in (index, plain))
    assert_close(turned, straight, 1e-5)
    assert not torch.allclose(index.keys[:, :4], plain.keys[:, :4])
    assert torch.equal(index.keys[:, 4:], plain.keys[:, 4:])
    half = indexer.bfloat16()(x.bfloat16(), latent.bfloat16(), None)
    assert half.weights.dtype == torch.float32


# --- config.json -----------------------------------------------------------------------------------------------------


# The shape of the released DeepSeek-V3.
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_released_shape() -> None:
    """671,026,404,352 parameters, as published; scores are 192^-1/2 (0.1 ln 40 + 1)^2 times the products."""
    assert count_parameters(None, DEEPSEEK_V3) == 671_026_404_352
    parsed = deepseek.parse(DEEPSEEK_V3)
    (mixer,) = {layer.mixer for layer in parsed.layers}
    assert isinstance(mixer, MLAConfig) and mixer.scale == pytest.approx(0.1352338, rel=1e-6)
    assert parsed.rotary is not None and parsed.rotary.yarn is not None and parsed.rotary.yarn.attention_factor == 1


def test_released_weights_lose_their_quantisation() -> None:
    config = {**TINY["deepseek_v3"].hf_config, "quantization_config": {"quant_method": "fp8"}}
    assert "quantization_config" not in init_policy(config, seed=0).hf_config()


RELEASE = {
    "model_max_length": 1024,
    "moe_renormalize": True,
    "num_expert_group": 1,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_router_activation_func": "sigmoid",
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "mla_use_nope": True,
    "linear_attn_config": {
        "head_dim": 32,
        "num_heads": 4,
        "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 3],
        "full_attn_layers": [4],
    },
}


def release_config() -> dict[str, Any]:
    """Kimi-Linear's config.json as the release spells it."""
    ours = TINY["kimi_linear"].hf_config
    spellings = {**kimi_linear._SPELLINGS, **kimi_linear._LINEAR_SPELLINGS}
    left = {key: value for key, value in ours.items() if key not in (*spellings.values(), "layer_types")}
    return {**left, **RELEASE}


def test_kimi_is_read_in_both_spellings_and_written_in_both() -> None:
    theirs = kimi_linear.parse(TINY["kimi_linear"].hf_config)
    release = kimi_linear.parse(release_config())
    assert theirs.layers == release.layers and theirs.norm_eps == release.norm_eps
    written = init_policy(release_config(), seed=0).hf_config()
    for key, value in {**RELEASE, **TINY["kimi_linear"].hf_config}.items():
        assert written[key] == value
    assert kimi_linear.parse(written).layers == release.layers
    theirs_written = init_policy(TINY["kimi_linear"].hf_config, seed=0).hf_config()
    assert theirs_written["linear_attn_config"] == RELEASE["linear_attn_config"]
    config = AutoConfig.for_model(**{key: value for key, value in written.items() if key != "architectures"})
    assert config.layer_types == TINY["kimi_linear"].config["layer_types"] and config.linear_num_heads == 4


def test_kimis_dense_layer_has_two_names(tmp_path: Path) -> None:
    """transformers writes it as a mixture; the release has mlp, which is written."""
    model = save("kimi_linear", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.up_proj.weight" in weights
    first = load_policy(tmp_path)
    save_file({n.replace("layers.0.block_sparse_moe", "layers.0.mlp"): w for n, w in weights.items()}, tmp_path / "x")
    (tmp_path / "x").replace(tmp_path / "model.safetensors")
    second = load_policy(tmp_path)
    assert "model.layers.0.mlp.up_proj.weight" in first.to_hf()
    assert all(torch.equal(weight, second.to_hf()[name]) for name, weight in first.to_hf().items())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in first.parameters())


@pytest.mark.parametrize(
    "family, key, value, message",
    [
        ("deepseek_v3", "topk_method", "greedy", "topk_method 'greedy' is not supported by DeepSeek policies"),
        ("deepseek_v3", "num_key_value_heads", 2, "num_key_value_heads 2 is not supported"),
        ("deepseek_v3", "partial_rotary_factor", 0.5, "partial_rotary_factor leaves 8 of qk_rope_head_dim 16"),
        ("deepseek_v3", "topk_group", 5, "topk_group 5 is more than n_group 4"),
        ("deepseek_v3", "mlp_layer_types", ["dense"], "mlp_layer_types has 1 entries"),
        ("deepseek_v32", "q_lora_rank", None, "lacks 'q_lora_rank': an indexer reads"),
        ("deepseek_v32", "index_head_dim", 8, "index_head_dim 8 is less than qk_rope_head_dim 16"),
        ("deepseek_v32", "index_topk", 0, "index_topk 0 must be a whole number of at least 1"),
        ("kimi_linear", "mla_use_nope", False, "mla_use_nope False is not supported by Kimi-Linear policies"),
        ("kimi_linear", "layer_types", None, "lacks 'linear_attn_config', or 'layer_types'"),
        ("kimi_linear", "linear_attn_config", [1], r"linear_attn_config \[1\] must be a mapping"),
        (
            "kimi_linear",
            "linear_attn_config",
            {"kda_layers": [1, 2]},
            r"names the layers \[1, 2\], num_hidden_layers is 4",
        ),
        ("kimi_linear", "linear_attn_config", {"kda_layers": "all"}, "kda_layers 'all' must be a list of layers"),
        ("ling", "qk_rope_head_dim", 8, "qk_rope_head_dim 8 must be 16, partial_rotary_factor of head_dim 32"),
        ("ling", "group_norm_size", 3, "group_norm_size 3 does not divide 128, the width of all heads"),
        ("ling", "use_qkv_bias", True, "use_qkv_bias True is not supported by Ling policies, only False"),
        ("ling", "layer_group_size", None, "lacks 'layer_group_size'"),
    ],
)
def test_bad_configs_are_one_sentence(family: str, key: str, value: object, message: str) -> None:
    config = {**TINY[family].hf_config, key: value}
    with pytest.raises(UserError, match=message):
        init_policy(config, seed=0)


def test_families_are_told_apart() -> None:
    for family, parse in (
        ("deepseek_v3", deepseek.parse),
        ("deepseek_v32", deepseek.parse),
        ("kimi_linear", kimi_linear.parse),
    ):
        config = TINY[family].hf_config
        policy = family_of(config).build(config, None, torch.float32)
        assert policy.hf_config() == {**parse(config).raw, "dtype": "float32"}


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")
@pytest.mark.parametrize("family", ["kimi_linear", "deepseek_v3", "deepseek_v32", "ling"])
@torch.no_grad()
def test_a_gpu_gives_the_same(family: str) -> None:
    """In float32, packed, the CPU's experts replayed; within 2e-5: products are summed in another order."""
    policy = init_policy(TINY[family].hf_config, seed=0)
    draw_weights(policy, 0)
    lengths = [37, 81, 1, 70]
    tokens, positions = tokens_of(sum(lengths), VOCAB), torch.cat([torch.arange(n) for n in lengths])
    expected = policy(tokens, positions, bounds(lengths))
    routes = torch.stack([layer.chosen for layer in expected.router], 1)
    logits = expected.hidden @ policy.lm_head_weight.T
    policy.cuda()
    output = policy(tokens.cuda(), positions.cuda(), bounds(lengths).cuda(), max(lengths), routes.cuda())
    found = (output.hidden @ policy.lm_head_weight.T).cpu()
    assert_close(found.log_softmax(-1), logits.log_softmax(-1), 2e-5)
