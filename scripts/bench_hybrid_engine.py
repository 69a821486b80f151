"""Decoding of the hybrid families: tokens a second of the policy inside vLLM, and of vLLM's own model where that runs.

    python scripts/bench_hybrid_engine.py [--families qwen3_next,kimi_linear] [--sequences 256] [--tokens 512] [--eager]

Eight layers at the head sizes of the released models, random weights that vLLM draws itself, bfloat16; the engine and
its settings are the same on both sides, each side in a process of its own. Processes start side by side (`--together`)
and measure one after the other: medians of three calls after one that is not counted. `--tiny` is a check of the script
on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cispo.engines.serving import ServedEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.policies.loading import shape_of
from cispo.types import RepetitionStop, Sampling

PROMPT = 48
READY = "ready"
SIDES = {"ours": {}, "vLLM's own": {"config_format": "hf", "mamba_ssm_cache_dtype": "float32"}}

COMMON: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GDN: dict[str, Any] = {
    "head_dim": 256,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
QWEN_MOE: dict[str, Any] = {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "intermediate_size": 5120,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
GROUPS: dict[str, Any] = {
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "minimax_m2": {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        "intermediate_size": 512,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "attn_type_list": [1] * 8,
    },
    "qwen3_next": {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", **GDN, **QWEN_MOE},
    "qwen3_5": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        **GDN,
        "intermediate_size": 6144,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    },
    "kimi_linear": {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        **MLA,
        "q_lora_rank": None,
        "num_local_experts": 64,
        "num_experts": 64,
        "n_shared_experts": 1,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "linear_head_dim": 128,
        "linear_num_heads": 16,
        "linear_conv_kernel_dim": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        # The names of the released code, which vLLM reads.
        "linear_attn_config": {
            "kda_layers": [1, 2, 3, 5, 6, 7],
            "full_attn_layers": [4, 8],
            "head_dim": 128,
            "num_heads": 16,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "num_experts_per_token": 8,
        "moe_router_activation_func": "sigmoid",
        "moe_renormalize": True,
        "num_expert_group": 1,
        "use_grouped_topk": True,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **MLA,
        **GROUPS,
        "q_lora_rank": 768,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "moe_layer_freq": 1,
        "rope_parameters": ROPE,
    },
    "ling": {
        "architectures": ["BailingMoeV2_5ForCausalLM"],
        "model_type": "bailing_hybrid",
        **MLA,
        **GROUPS,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": None,
        "num_experts": 64,
        "num_shared_experts": 1,
        "score_function": "sigmoid",
        "layer_group_size": 8,
        "group_norm_size": 4,
        "use_qk_norm": True,
    },
}
TINY: dict[str, Any] = {"hidden_size": 128, "vocab_size": 256, "num_hidden_layers": 8}


def measure(folder: Path, side: str, arguments: argparse.Namespace) -> float:
    """Tokens a second, timed once a line has come on the standard input."""
    on_gpu = torch.cuda.is_available()
    context = PROMPT + arguments.tokens
    extra: dict[str, Any] = {"load_format": "dummy"} | ({"enforce_eager": True} if arguments.eager else {})
    engine = ServedEngine(
        VLLMEngine(
            str(folder),
            dtype="bfloat16" if on_gpu else "float32",
            max_context=context,
            max_sequences=arguments.sequences,
            seed=0,
            memory=arguments.memory,
            engine_args={**extra, **SIDES[side]},
        )
    )
    try:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, 250, (arguments.sequences, PROMPT), generator=generator).tolist()
        sampling = Sampling(max_tokens=arguments.tokens, eos_ids=(), repetition=RepetitionStop(run_length=0))
        times = []
        print(READY, flush=True)
        sys.stdin.readline()
        for seed in range(4):
            started = time.perf_counter()
            asyncio.run(engine.generate(prompts, sampling, seed))
            times.append(time.perf_counter() - started)
        return arguments.sequences * arguments.tokens / statistics.median(times[1:])
    finally:
        engine.close()


class Side:
    """A process with one family's engine: it starts beside others and measures when it is asked."""

    def __init__(self, family: str, folder: Path, side: str, arguments: argparse.Namespace) -> None:
        self.name = f"{family:14} {side:12}"
        sizes = ["--sequences", str(arguments.sequences), "--tokens", str(arguments.tokens)]
        sizes += ["--memory", str(arguments.memory / arguments.together)]
        flags = ["--eager"] if arguments.eager else []
        command = [sys.executable, __file__, "--one", str(folder), "--side", side, *sizes, *flags]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the process has ended
        self._process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def ready(self) -> None:
        """Waits for the engine's start, or for its end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == READY:
                return

    def result(self) -> str:
        """A line of the table: the speed, or the first error."""
        output, _ = self._process.communicate("go\n" if self._process.poll() is None else None)
        self._errors.seek(0)
        if self._process.returncode:
            # A worker's warnings come after the error; the first error is the cause of the others.
            errors = re.findall(r"^.*\b\w*(?:Error|Exception): .*$", self._errors.read(), re.MULTILINE)
            return f"{self.name} does not run: {errors[0] if errors else 'no error was printed':.240}"
        return f"{self.name} {float(output.splitlines()[-1]):10,.0f} tokens/s"


def written(family: str, folder: Path, tiny: bool) -> str:
    """Writes a family's shape into a folder: a line about it."""
    config = COMMON | CONFIGS[family] | (TINY if tiny else {})
    policy = shape_of(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(policy.hf_config() | config))
    save_file({}, folder / "model.safetensors")  # vLLM draws the weights
    return f"{family}: {sum(p.numel() for p in policy.parameters()) / 1e6:,.0f} M parameters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(CONFIGS))
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--together", type=int, default=2, help="engines that start side by side; they measure in turn")
    parser.add_argument("--memory", type=float, default=0.8, help="share of the card for all of them")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(measure(arguments.one, arguments.side, arguments))
        return
    with tempfile.TemporaryDirectory() as name:
        families = arguments.families.split(",")
        print(f"{arguments.sequences} x {arguments.tokens} tokens")
        for family in families:
            print(written(family, Path(name) / family, arguments.tiny), flush=True)
        pairs = list(itertools.product(families, SIDES))
        for start in range(0, len(pairs), arguments.together):
            batch = pairs[start : start + arguments.together]
            sides = [Side(family, Path(name) / family, side, arguments) for family, side in batch]
            for side in sides:
                side.ready()
            for side in sides:
                print(side.result(), flush=True)


if __name__ == "__main__":
    main()
