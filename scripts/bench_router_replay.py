"""Experts that engine and learner choose differently, and the error of log-probabilities with and without replay.

    python scripts/bench_router_replay.py            every family, as a table in Markdown; about a minute on one core
    python scripts/bench_router_replay.py ling       one

Tiny policies (4 layers, 8 experts, 2 of them a token) with weights that route sharply: gates N(0, 0.3), norms around 1,
correction biases N(0, 0.1). The torch engine samples with its cache, token by token; the learner reads the same tokens
in one packed pass. Each pair of number formats is engine / learner; the weights are those of the engine's format.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from cispo.engines.drafts import Draft, start_drafts
from cispo.engines.torch_engine import TorchEngine
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.policy import HFConfig, Policy
from cispo.policies.replay import differing, live_choices, routers_of, routes_of_turns
from cispo.types import RepetitionStop, Sampling, Turn

VOCAB, PROMPTS, TOKENS, CONTEXT = 64, 32, 96, 256
FORMATS = {"float32 / float32": ("float32", "float32"), "bfloat16 / bfloat16": ("bfloat16", "bfloat16"),
           "bfloat16 / float32": ("bfloat16", "float32")}  # fmt: skip

COMMON = {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.08, "rms_norm_eps": 1e-6,
          "tie_word_embeddings": False, "intermediate_size": 96, "num_experts_per_tok": 2}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MLA = {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
       "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_shared_experts": 1, "norm_topk_prob": True,
       "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "rope_parameters": ROPE}  # fmt: skip
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
CONFIGS: dict[str, HFConfig] = {
    "minimax": {**COMMON, "model_type": "minimax", "head_dim": 32, "num_local_experts": 8, "rope_parameters": ROPE,
                "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
    "minimax_m2": {**COMMON, "model_type": "minimax_m2", "head_dim": 32, "num_local_experts": 8, "use_qk_norm": True,
                   "rotary_dim": 16, "rope_theta": 10000.0, "scoring_func": "sigmoid", "use_routing_bias": True,
                   "qk_norm_type": "per_layer", "attn_type_list": [1] * 4, "intermediate_size": 64},
    "qwen3_next": {**COMMON, "model_type": "qwen3_next", "head_dim": 32, "num_experts": 8, "moe_intermediate_size": 32,
                   "shared_expert_intermediate_size": 48, "norm_topk_prob": True, "decoder_sparse_step": 1,
                   "mlp_only_layers": [], "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
                   "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
                   "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4},
    "kimi_linear": {**COMMON, **MLA, "model_type": "kimi_linear", "q_lora_rank": None, "num_local_experts": 8,
                    "n_group": 1, "topk_group": 1, "linear_head_dim": 32, "linear_num_heads": 4,
                    "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-5,
                    "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "deepseek_v3": {**COMMON, **MLA, **GROUPS, "model_type": "deepseek_v3", "moe_layer_freq": 1},
    "deepseek_v32": {**COMMON, **MLA, **GROUPS, "model_type": "deepseek_v32", "moe_layer_freq": 1, "index_topk": 16,
                     "index_head_dim": 32, "index_n_heads": 4},
    "ling": {**COMMON, **MLA, "model_type": "bailing_moe_v2_5", "q_lora_rank": None, "head_dim": 32, "num_experts": 8,
             "num_key_value_heads": 4, "num_shared_experts": 1, "n_group": 4, "topk_group": 2, "layer_group_size": 4,
             "group_norm_size": 2, "use_qk_norm": True, "partial_rotary_factor": 0.5, "rope_theta": 600000.0,
             "score_function": "sigmoid"},
    "qwen3_moe": {**COMMON, "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 8, "moe_intermediate_size": 32,
                  "norm_topk_prob": True, "rope_parameters": ROPE},
}  # fmt: skip


def sharp_policy(config: HFConfig) -> Policy:
    policy = init_policy(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_weights().items():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                weight.copy_(0.1 * noise)
            elif weight.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
                weight.add_(0.2 * noise)
        for router in routers_of(policy):
            router.weight.copy_(0.3 * torch.randn(router.weight.shape, generator=generator))
    return policy


def sample(folder: Path, dtype: str) -> list[Draft]:
    """Complete drafts of ragged prompts, with their experts."""
    torch.manual_seed(0)
    engine = TorchEngine(str(folder), dtype=dtype, max_context=CONTEXT, max_sequences=PROMPTS, record_routes=True)
    prompts = [torch.randint(VOCAB, (1 + 4 * number,)).tolist() for number in range(PROMPTS)]
    sampling = Sampling(max_tokens=TOKENS, eos_ids=(), repetition=RepetitionStop(run_length=0))
    drafts = start_drafts(prompts, sampling, 0, max_context=CONTEXT)
    for draft in drafts:
        draft.sampled_by(0)
    engine.submit(drafts)
    done: list[Draft] = []
    while len(done) < len(drafts):
        done += engine.step()
    return drafts


@torch.no_grad()
def compare(policy: Policy, drafts: list[Draft]) -> tuple[float, list[Tensor]]:
    """Share of tokens read with other experts in some layer, and |difference of log-probabilities| without and with."""
    sequences = [[*draft.prompt, *draft.tokens] for draft in drafts]
    tokens = torch.tensor([token for ids in sequences for token in ids[:-1]])
    targets = torch.tensor([token for ids in sequences for token in ids[1:]])
    lengths = [len(ids) - 1 for ids in sequences]
    positions = torch.cat([torch.arange(n) for n in lengths])
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    turns = [Turn(context_ids=tuple(d.prompt), completion=d.completion()) for d in drafts]
    rows = [routes for turn in turns if (routes := routes_of_turns([turn])) is not None]
    routes = torch.cat(rows)
    sampled = torch.cat([p >= len(d.prompt) - 1 for p, d in zip(positions.split(lengths), drafts, strict=True)])
    engine = torch.tensor([x for draft in drafts for x in draft.logprobs])
    differ, errors = 0.0, []
    for given in (None, routes):
        with live_choices(policy) as live:
            output = policy(tokens, positions, bounds, routes=given)
        if given is None:
            differ = float(differing(live, routes.long().unbind(1)).double().mean())
        logits = output.hidden[sampled].float() @ policy.lm_head_weight.float().T
        logprobs = logits.log_softmax(-1).gather(1, targets[sampled, None])[:, 0]
        errors.append((logprobs - engine).abs())
    return differ, errors


def main() -> None:
    torch.set_num_threads(1)
    print("| family | engine / learner | tokens that differ | error: mean, largest | replayed: mean, largest |")
    print("|---|---|---|---|---|")
    for name in sys.argv[1:] or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            save_policy(sharp_policy(CONFIGS[name]), folder)
            for formats, (engine, learner) in FORMATS.items():
                policy = load_policy(folder, dtype=getattr(torch, engine)).to(getattr(torch, learner)).eval()
                differ, (alone, replayed) = compare(policy, sample(Path(folder), engine))
                figures = [f"{float(e.mean()):.1e}, {float(e.max()):.1e}" for e in (alone, replayed)]
                print(f"| {name} | {formats} | {differ:.2%} | {figures[0]} | {figures[1]} |", flush=True)


if __name__ == "__main__":
    main()
