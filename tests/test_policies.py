"""Both policy kinds: exactness against stock transformers, the original code's outputs and a plain reference;
packing; the three weight namings; loading, saving and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from cispo.policies.base import Policy, init_policy, load_policy, save_policy
from cispo.policies.lightning import LightningAttention, LightningPolicy, Place, disk_names, place_of
from cispo.policies.lightning_config import parse_config
from cispo.types import UserError

ORACLE = Path(__file__).parents[2] / "shared/oracle/m1_like"

# H = 6 is no power of two, two key-value heads, factors that are not 1, softmax in the middle.
MINIMAX: dict[str, Any] = {
    "architectures": ["MiniMaxForCausalLM"],
    "model_type": "minimax",
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "linear_attn_alpha_factor": 1.3,
    "linear_attn_beta_factor": 0.7,
    "full_attn_alpha_factor": 0.8,
    "full_attn_beta_factor": 1.9,
    "mlp_alpha_factor": 1.4,
    "mlp_beta_factor": 0.6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
ORIGINAL: dict[str, Any] = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "model_type": "minimax_m1",
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "rope_theta": 10000000,
    "max_position_embeddings": 512,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attn_type_list": [0, 1, 0],
    "postnorm": True,
    "rms_norm_eps": 1e-5,
    "shared_intermediate_size": 0,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
DENSE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
QWEN3 = {"model_type": "qwen3", "tie_word_embeddings": True, **DENSE}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, **DENSE}
EVERY_KIND = pytest.mark.parametrize(
    "config",
    [
        MINIMAX,
        {**MINIMAX, "tie_word_embeddings": True},
        {**ORIGINAL, "initializer_range": 0.08, "shared_intermediate_size": 1, "postnorm": False},
        QWEN3,
        LLAMA,
    ],
    ids=["minimax", "minimax tied", "original", "qwen3", "llama"],
)


def tokens_of(length: int, vocab: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed))


def bounds(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def logprobs(policy: Policy, tokens: Tensor, lengths: list[int] | None = None) -> Tensor:
    """Log-probabilities [T, V] of packed documents of these lengths (one document by default)."""
    lengths = lengths or [len(tokens)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = policy(tokens, positions, bounds(lengths)).hidden
    return F.linear(hidden, policy.lm_head_weight).log_softmax(-1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all() and torch.isfinite(expected).all()
    assert (actual - expected).abs().max() <= tolerance


# --- packing ---------------------------------------------------------------------------------------------------------


@EVERY_KIND
def test_packed_equals_separate(config: dict[str, Any]) -> None:
    """Outputs and gradients of many ragged documents in one pass and in a pass each, float32, 1e-5.

    Gradients are compared relative to the largest of each weight. Empty documents pack as well.
    """
    policy = init_policy(config, seed=0)
    lengths = [30, 1, 7, 0, 90, 2, 25, 25, 1, 64, 11] + [5] * 20
    tokens = tokens_of(sum(lengths))
    projection = torch.randn(len(tokens), 40, generator=torch.Generator().manual_seed(1)) / len(tokens)
    parameters = list(policy.parameters())

    def run(separately: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        if separately:
            output = torch.cat([logprobs(policy, part) for part in tokens.split(lengths) if len(part)])
        else:
            output = logprobs(policy, tokens, lengths)
        return output.detach(), torch.autograd.grad((output * projection).sum(), parameters)

    packed, packed_gradients = run(separately=False)
    separate, separate_gradients = run(separately=True)
    assert_close(packed, separate)
    for ours, theirs in zip(packed_gradients, separate_gradients, strict=True):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs, 1e-5 * float(theirs.abs().max()))


@EVERY_KIND
def test_other_documents_and_later_tokens_do_not_matter(config: dict[str, Any]) -> None:
    """Exactly: the packed result for one document does not change by a bit when its neighbours change."""
    policy = init_policy(config, seed=0)
    tokens, other = tokens_of(90), tokens_of(90, seed=1)
    other[30:60] = tokens[30:60]
    with torch.no_grad():
        first, second = (policy(t, torch.arange(30).repeat(3), bounds([30, 30, 30])).hidden for t in (tokens, other))
        assert torch.equal(first[30:60], second[30:60])
        assert not torch.allclose(first[:30], second[:30])
        changed = tokens.clone()
        changed[50:60] = (tokens[50:60] + 1) % 40
        third = policy(changed, torch.arange(30).repeat(3), bounds([30, 30, 30])).hidden
        assert_close(third[30:50], first[30:50], 1e-6)


@EVERY_KIND
def test_gradient_checkpointing_changes_nothing(config: dict[str, Any]) -> None:
    policy = init_policy(config, seed=0)
    policy.train()
    tokens, lengths = tokens_of(50), [20, 30]
    results = []
    for enabled in (False, True):
        policy.gradient_checkpointing = enabled
        assert policy.gradient_checkpointing == enabled
        output = logprobs(policy, tokens, lengths)
        results.append([output.detach(), *torch.autograd.grad(output[:, 0].sum(), list(policy.parameters()))])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.isfinite(plain).all()
        assert torch.equal(plain, recomputed)


@EVERY_KIND
def test_no_token_at_all(config: dict[str, Any]) -> None:
    """A rank whose share of a batch is empty: empty outputs, and gradients that are zero."""
    policy = init_policy(config, seed=0)
    empty = torch.zeros(0, dtype=torch.long)
    output = policy(empty, empty, bounds([0]))
    assert output.hidden.shape == (0, config["hidden_size"])
    output.hidden.sum().backward()
    for parameter in policy.parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_router_outputs_follow_the_tokens() -> None:
    policy = init_policy(MINIMAX, seed=0)
    router = policy(tokens_of(12), torch.arange(12), bounds([12])).router
    assert len(router) == 4
    for layer in router:
        assert layer.probs.shape == (12, 5) and layer.chosen.shape == (12, 2)
        torch.testing.assert_close(layer.probs.sum(-1), torch.ones(12))
        assert torch.equal(layer.chosen, layer.probs.topk(2).indices)
    assert init_policy(QWEN3, seed=0)(tokens_of(12), torch.arange(12), bounds([12])).router == ()


# --- against other implementations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [MINIMAX, {**MINIMAX, "tie_word_embeddings": True}, QWEN3, LLAMA],
    ids=["minimax", "minimax tied", "qwen3", "llama"],
)
def test_stock_transformers_loads_what_we_save_and_agrees(config: dict[str, Any], tmp_path: Path) -> None:
    """Single unpadded sequences in float32, 1e-5; one longer than transformers' lightning block of 256."""
    from transformers import AutoModelForCausalLM

    policy = init_policy(config, seed=3)
    save_policy(policy, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        for length in (1, 7, 64, 300):
            tokens = tokens_of(length)
            expected = stock(tokens[None], use_cache=False).logits[0].log_softmax(-1)
            assert_close(logprobs(policy, tokens), expected)


def test_we_load_what_stock_transformers_saves(tmp_path: Path) -> None:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    torch.manual_seed(0)
    stock = MiniMaxForCausalLM(MiniMaxConfig(**MINIMAX)).eval()
    stock.save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    tokens = tokens_of(100)
    with torch.no_grad():
        assert_close(logprobs(policy, tokens), stock(tokens[None], use_cache=False).logits[0].log_softmax(-1))


def test_names_and_values_are_those_that_transformers_writes(tmp_path: Path) -> None:
    """Whatever reads a folder of save_pretrained (vLLM does) reads ours; only the recomputed buffers are left out."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    stock = MiniMaxForCausalLM(MiniMaxConfig(**MINIMAX))
    stock.save_pretrained(tmp_path)
    theirs = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if place_of(n) is not None}
    ours = load_policy(tmp_path).to_hf()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.skipif(not ORACLE.is_dir(), reason="shared/oracle/m1_like is not here")
@pytest.mark.parametrize("length", [1, 7, 255, 256, 257, 600])
def test_original_code_agrees(length: int) -> None:
    """Log-probabilities [L, V] after every token, computed by MiniMax-M1's own code in float32; 1e-5."""
    expected = load_file(ORACLE / "expected.safetensors")
    policy = load_policy(ORACLE)
    with torch.no_grad():
        assert_close(logprobs(policy, expected[f"ids_{length}"][0].long()), expected[f"logprobs_{length}"][0])


def random_original(config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """A checkpoint with the original names and random weights, and its config, written to `folder`."""
    generator = torch.Generator().manual_seed(5)
    hidden, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    inner, keys = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i, kind in enumerate(config["attn_type_list"]):
        layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        if kind == 0:
            layer |= {"self_attn.qkv_proj": (3 * inner, hidden), "self_attn.output_gate": (inner, hidden)}
            layer |= {"self_attn.out_proj": (hidden, inner), "self_attn.norm": (inner,)}
        else:
            layer |= {"self_attn.q_proj": (inner, hidden), "self_attn.o_proj": (hidden, inner)}
            layer |= {"self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden)}
        layer |= {"block_sparse_moe.gate": (config["num_local_experts"], hidden)}
        for e in range(config["num_local_experts"]):
            expert = f"block_sparse_moe.experts.{e}"
            layer |= {f"{expert}.w1": (width, hidden), f"{expert}.w3": (width, hidden), f"{expert}.w2": (hidden, width)}
        if config["shared_intermediate_size"]:
            layer |= {"shared_mlp.gate_proj": (width, hidden), "shared_mlp.up_proj": (width, hidden)}
            layer |= {"shared_mlp.down_proj": (hidden, width), "coefficient": (1, hidden)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    weights = {
        # Norm weights far from 1, so that a missing or misplaced one shows.
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else 0.15) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def plain_original(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """MiniMax-M1 one token and one head at a time in float64, from the description of its conventions: [L, V]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    layers, rotary = config["num_hidden_layers"], config["rotary_dim"]

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    def slopes(n: int) -> list[float]:
        if n & (n - 1) == 0:
            start = 2.0 ** -(2.0 ** -(math.log2(n) - 3))
            return [start ** (h + 1) for h in range(n)]
        below = 2 ** int(math.log2(n))
        return slopes(below) + slopes(2 * below)[::2][: n - below]

    def lightning(x: Tensor, at: str, layer: int) -> Tensor:
        qkv = F.silu(x @ w[f"{at}.qkv_proj.weight"].T).view(len(x), heads, 3, dim)
        output = torch.zeros(len(x), heads, dim, dtype=torch.float64)
        for h, slope in enumerate(slopes(heads)):
            decay = math.exp(-slope * (1 - layer / (layers - 1) + 1e-5))
            state = torch.zeros(dim, dim, dtype=torch.float64)
            for t in range(len(x)):
                q, k, v = qkv[t, h]
                state = decay * state + torch.outer(k, v)
                output[t, h] = q @ state
        normed = norm(output.flatten(1), w[f"{at}.norm.weight"], 1e-6)
        return (torch.sigmoid(x @ w[f"{at}.output_gate.weight"].T) * normed) @ w[f"{at}.out_proj.weight"].T

    def rotate(x: Tensor, t: int) -> Tensor:
        x = x.clone()
        for i in range(rotary // 2):
            angle = t * config["rope_theta"] ** (-2 * i / rotary)
            a, b = x[i].clone(), x[i + rotary // 2].clone()
            x[i] = a * math.cos(angle) - b * math.sin(angle)
            x[i + rotary // 2] = b * math.cos(angle) + a * math.sin(angle)
        return x

    def softmax(x: Tensor, at: str) -> Tensor:
        q, k, v = ((x @ w[f"{at}.{name}_proj.weight"].T).view(len(x), -1, dim) for name in "qkv")
        output = torch.zeros(len(x), heads, dim, dtype=torch.float64)
        for h in range(heads):
            group = h // (heads // kv_heads)
            for t in range(len(x)):
                query = rotate(q[t, h], t)
                scores = torch.stack([query @ rotate(k[j, group], j) for j in range(t + 1)]) / math.sqrt(dim)
                output[t, h] = scores.softmax(0) @ v[: t + 1, group]
        return output.flatten(1) @ w[f"{at}.o_proj.weight"].T

    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def experts(x: Tensor, at: str) -> Tensor:
        output = []
        for row in x:
            probs = (row @ w[f"{at}.block_sparse_moe.gate.weight"].T).softmax(0)
            best = sorted(range(len(probs)), key=lambda e: -float(probs[e]))[: config["num_experts_per_tok"]]
            total = sum(float(probs[e]) for e in best)
            mixed = torch.zeros_like(row)
            for e in best:
                w1, w2, w3 = (w[f"{at}.block_sparse_moe.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
                mixed += float(probs[e]) / total * swiglu(row, w1, w3, w2)
            if config["shared_intermediate_size"]:
                gate, up, down = (w[f"{at}.shared_mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
                share = torch.sigmoid(row @ w[f"{at}.coefficient.weight"][0])
                mixed = mixed * (1 - share) + swiglu(row, gate, up, down) * share
            output.append(mixed)
        return torch.stack(output)

    x = w["model.embed_tokens.weight"][ids]
    for i, kind in enumerate(config["attn_type_list"]):
        at = f"model.layers.{i}"
        which = "linear" if kind == 0 else "full"
        normed = norm(x, w[f"{at}.input_layernorm.weight"], config["rms_norm_eps"])
        branch = lightning(normed, f"{at}.self_attn", i) if kind == 0 else softmax(normed, f"{at}.self_attn")
        residual = normed if config["postnorm"] else x
        alpha, beta = (config[f"layernorm_{which}_attention_{name}"] for name in ("alpha", "beta"))
        x = alpha * residual + beta * branch
        normed = norm(x, w[f"{at}.post_attention_layernorm.weight"], config["rms_norm_eps"])
        residual = normed if config["postnorm"] else x
        x = config["layernorm_mlp_alpha"] * residual + config["layernorm_mlp_beta"] * experts(normed, at)
    hidden = norm(x, w["model.norm.weight"], config["rms_norm_eps"])
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return (hidden @ head.T).log_softmax(-1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 4, "rotary_dim": 16, "rope_theta": 10000},
        {"postnorm": False, "layernorm_mlp_beta": 0.5},
        {"shared_intermediate_size": 20, "num_experts_per_tok": 1},
        {"shared_intermediate_size": 7, "postnorm": False, "tie_word_embeddings": True},
        {"num_experts_per_tok": 4, "layernorm_linear_attention_alpha": 0.9, "layernorm_linear_attention_beta": 1.7},
        {"num_experts_per_tok": 3, "num_local_experts": 5, "num_key_value_heads": 6, "attn_type_list": [1, 0, 1]},
        {"layernorm_full_attention_alpha": 1.1, "layernorm_full_attention_beta": 0.4, "intermediate_size": 19},
    ],
    ids=lambda changes: ", ".join(changes) or "as it is",
)
def test_original_conventions_against_a_plain_float64_reference(changes: dict[str, Any], tmp_path: Path) -> None:
    """1e-5 in float32 and 1e-6 in float64, where the float32 slopes and angles are what is left."""
    config = {**ORIGINAL, **changes}
    weights = random_original(config, tmp_path)
    ids = tokens_of(45)
    expected = plain_original(config, weights, ids)
    with torch.no_grad():
        assert_close(logprobs(load_policy(tmp_path, torch.float64), ids), expected, 1e-6)
        assert_close(logprobs(load_policy(tmp_path), ids).double(), expected)


@pytest.mark.parametrize(
    "config",
    [{**LLAMA, "attention_dropout": 0.5}, {"model_type": "seed_oss", "residual_dropout": 0.5, **DENSE}],
    ids=["attention", "residual"],
)
def test_dropout_never_happens(config: dict[str, Any]) -> None:
    """The policy that trains must be the one that sampled; the config that is saved still names the dropout."""
    policy, plain = init_policy(config, 0), init_policy({k: v for k, v in config.items() if "dropout" not in k}, 0)
    policy.train()
    plain.eval()
    with torch.no_grad():
        assert torch.equal(logprobs(policy, tokens_of(40), [15, 25]), logprobs(plain, tokens_of(40), [15, 25]))
    assert 0.5 in policy.hf_config().values()


# --- names, saving and loading ---------------------------------------------------------------------------------------


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
        {"model_type": "mistral", "sliding_window": 16, **DENSE},
        {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16, **DENSE},
        {"model_type": "mixtral", "num_local_experts": 4, **DENSE},
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, **DENSE},
        {"model_type": "lfm2", **DENSE},
        {"model_type": "mamba", "vocab_size": 40, "hidden_size": 48, "num_hidden_layers": 2},
        {"model_type": "qwen3_next", **DENSE},
        {"model_type": "cohere", **DENSE},
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
