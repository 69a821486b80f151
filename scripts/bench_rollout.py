"""Generation: tokens a second with the log-probability of every sampled token, beside plain vLLM.

    python scripts/bench_rollout.py --model FOLDER [--engines 1,2,4] [--sequences 512] [--tokens 512] [--skip-peer]
    python scripts/bench_rollout.py --hybrid [--context 512,8192]           recipes/lightning_30m beside a dense Qwen3

The first form shares `sequences` completions of exactly `tokens` tokens over engines in processes of their own, on one
GPU or CPU; the peer is `vllm.LLM.generate` with `logprobs=0`, the way TRL samples. The second builds both policies from
random weights, with as many parameters a token, and lets one engine decode up to each context; the time of the prompts
is taken off. bfloat16 on a GPU; medians of three calls after one that is not counted. Each row is printed once it is
measured, ours before the peer's.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cispo.engines.serving import make_engine
from cispo.policies.loading import init_policy, save_policy
from cispo.policies.policy import Policy
from cispo.recipe.load import load_recipe
from cispo.runtime.actors import RayRuntime, Resources
from cispo.runtime.watchdog import Activity
from cispo.types import RepetitionStop, Sampling

PROMPT = 48
RECIPE = Path(__file__).parents[1] / "recipes" / "lightning_30m.yaml"
VOCABULARY = 4096


class PlainVLLM:
    """vLLM as TRL drives it."""

    def __init__(self, model: str, *, dtype: str, max_context: int, max_sequences: int, memory: float) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            max_model_len=max_context,
            max_num_seqs=max_sequences,
            gpu_memory_utilization=memory,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> int:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(max_tokens=sampling.max_tokens, ignore_eos=True, logprobs=0, detokenize=False)
        inputs: Any = [tokens_input(list(prompt)) for prompt in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def close(self) -> None:
        del self.llm


def plain_vllm(model: str, **settings: Any) -> PlainVLLM:
    return PlainVLLM(model, **settings)


async def tokens_per_second(
    build: Callable[..., Any],
    args: Sequence[Any],
    engines: int,
    prompts: int,
    length: int,
    tokens: int,
    decode_only: bool = False,
    **kwargs: Any,
) -> float:
    """Of `engines` actors on one device that share the prompts; `decode_only` takes the prompts' time off."""
    runtime = RayRuntime(processes=engines, activity=Activity())
    try:
        gpus = 0.9 / engines if torch.cuda.is_available() else 0
        share = prompts // engines
        kwargs |= {"max_sequences": share, "concurrent": build is make_engine}
        handles = await asyncio.gather(
            *(
                runtime.start(build, *args, name=f"engine-{i}", resources=Resources(gpus=gpus), **kwargs)
                for i in range(engines)
            )
        )
        generator = torch.Generator().manual_seed(0)
        asked = torch.randint(3, 4000, (prompts, length), generator=generator).tolist()

        async def seconds(tokens: int) -> float:
            sampling = Sampling(max_tokens=tokens, eos_ids=(), repetition=RepetitionStop(run_length=0))
            times = []
            for seed in range(4):
                started = time.perf_counter()
                parts = (asked[i * share : (i + 1) * share] for i in range(engines))
                await asyncio.gather(
                    *(h.call("generate", part, sampling, seed) for h, part in zip(handles, parts, strict=True))
                )
                times.append(time.perf_counter() - started)
            return statistics.median(times[1:])

        if decode_only:
            return prompts * (tokens - 1) / (await seconds(tokens) - await seconds(1))
        return prompts * tokens / await seconds(tokens)
    finally:
        runtime.close()


def ours(
    model: str, engines: int, prompts: int, length: int, tokens: int, dtype: str, decode_only: bool = False
) -> float:
    settings: dict[str, Any] = {"tensor_parallel": 1, "sleeps": False, "engine_args": {}, "memory": 0.6 / engines}
    context = length + tokens
    return asyncio.run(
        tokens_per_second(
            make_engine,
            ("vllm", model),
            engines,
            prompts,
            length,
            tokens,
            decode_only,
            dtype=dtype,
            max_context=context,
            **settings,
        )
    )


def peer(model: str, prompts: int, length: int, tokens: int, dtype: str) -> float:
    context = length + tokens
    settings: dict[str, Any] = {"dtype": dtype, "max_context": context, "memory": 0.5}
    return asyncio.run(tokens_per_second(plain_vllm, (model,), 1, prompts, length, tokens, **settings))


def against_vllm(arguments: argparse.Namespace, dtype: str) -> None:
    sequences, tokens = arguments.sequences, arguments.tokens
    head = f"{arguments.model}: {sequences} completions of {tokens} tokens, {dtype}, log-probability of every token"
    print(head, flush=True)
    speeds: dict[int, float] = {}
    for engines in map(int, arguments.engines.split(",")):
        speeds[engines] = ours(arguments.model, engines, sequences, PROMPT, tokens, dtype)
        name = f"ours, {engines} engine{'s' if engines > 1 else ''}"
        print(f"  {name:<34}{speeds[engines]:11,.0f} tokens/s", flush=True)
    if arguments.skip_peer:
        return
    base = peer(arguments.model, sequences, PROMPT, tokens, dtype)
    name = "vLLM's LLM.generate, logprobs=0"
    print(f"  {name:<34}{base:11,.0f} tokens/s")
    for engines, speed in speeds.items():
        print(f"  {engines} engine{'s' if engines > 1 else ''}: {speed / base:.2f} x")


def hybrid_config() -> dict[str, Any]:
    """The recipe's policy with room for long contexts; random weights small enough for bfloat16 to follow."""
    config = load_recipe(RECIPE).policy.config
    assert config is not None
    return config | {"vocab_size": VOCABULARY, "max_position_embeddings": 16384, "initializer_range": 0.02}


def dense_config(hybrid: dict[str, Any]) -> dict[str, Any]:
    """A Qwen3 of the same depth and width, with as many parameters per layer as a token passes in the hybrid.

    A lightning layer has a gate beside q, k, v and o; a token passes its top-k experts: the dense layer is that wide.
    """
    size, layers = hybrid["hidden_size"], hybrid["num_hidden_layers"]
    inner = hybrid["num_attention_heads"] * hybrid["head_dim"]
    gates = hybrid["layer_types"].count("linear_attention") * size * inner
    experts = hybrid["num_experts_per_tok"] * hybrid["intermediate_size"]
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    shape = {key: hybrid[key] for key in (*kept, "max_position_embeddings", "initializer_range")}
    return shape | {
        "model_type": "qwen3",
        "intermediate_size": round((experts + gates / layers / (3 * size)) / 64) * 64,
    }


def active_parameters(policy: Policy, config: dict[str, Any]) -> float:
    """Parameters of the layers that one token passes."""
    layers = {name: p.numel() for name, p in policy.named_parameters() if ".layers." in f".{name}"}
    experts = sum(size for name, size in layers.items() if ".experts." in name)
    idle = 1 - config.get("num_experts_per_tok", 1) / config.get("num_local_experts", 1)
    return sum(layers.values()) - experts * idle


def hybrid_against_dense(arguments: argparse.Namespace, dtype: str) -> None:
    hybrid = hybrid_config()
    models = {"hybrid": hybrid, "dense": dense_config(hybrid)}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in models.items():
            policy = init_policy(config, seed=0)
            active = active_parameters(policy, config)
            print(
                f"{name}: {active / 1e6:.1f} M parameters a token in {config['num_hidden_layers']} layers", flush=True
            )
            save_policy(policy, Path(folder) / name)
        for context in map(int, arguments.context.split(",")):
            length = max(context - 256, PROMPT) if context > 1024 else PROMPT
            tokens = context - length
            for engines in map(int, arguments.engines.split(",")):
                print(f"{arguments.sequences} sequences on {engines} engine(s), prompt {length}, {tokens} tokens each")
                speeds = {}
                for name in models:
                    speeds[name] = ours(f"{folder}/{name}", engines, arguments.sequences, length, tokens, dtype, True)
                    print(f"  {name:<8}{speeds[name]:11,.0f} tokens/s", flush=True)
                print(f"  {speeds['hybrid'] / speeds['dense']:.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a policy")
    parser.add_argument("--engines", default="1,2,4")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--hybrid", action="store_true", help="the hybrid beside a dense policy")
    parser.add_argument("--context", default="512,8192", help="prompt and completion together, with --hybrid")
    arguments = parser.parse_args()
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    if arguments.hybrid:
        hybrid_against_dense(arguments, dtype)
    elif arguments.model:
        against_vllm(arguments, dtype)
    else:
        parser.error("give --model FOLDER or --hybrid")


if __name__ == "__main__":
    main()
