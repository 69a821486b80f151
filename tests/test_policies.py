"""Both policy kinds: packing, and exactness against transformers, the original code's outputs, a plain reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.minimax.names import place_of
from tests.tiny_policies import (
    DENSE,
    EVERY_KIND,
    LLAMA,
    MINIMAX,
    ORIGINAL,
    QWEN3,
    assert_close,
    bounds,
    logprobs,
    tokens_of,
)

ORACLE = Path(__file__).parents[2] / "shared/oracle/m1_like"

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
    """Single unpadded sequences in float32; one longer than transformers' lightning block of 256.

    2e-5: sums of other orders reach 1.03e-5 over 300 tokens on some processors; a wrong norm or angle is above 1e-3.
    """
    from transformers import AutoModelForCausalLM

    policy = init_policy(config, seed=3)
    save_policy(policy, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        for length in (1, 7, 64, 300):
            tokens = tokens_of(length)
            expected = stock(tokens[None], use_cache=False).logits[0].log_softmax(-1)
            assert_close(logprobs(policy, tokens), expected, 2e-5)


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
