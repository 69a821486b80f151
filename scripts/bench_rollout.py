"""Generation: tokens a second with the log-probability of every sampled token, beside plain vLLM.

    python scripts/bench_rollout.py --model FOLDER [--engines 1,2,4] [--sequences 512] [--tokens 512] [--skip-peer]
    python scripts/bench_rollout.py --hybrid [--context 512,8192]           recipes/lightning_30m beside a dense Qwen3

The first form shares `sequences` completions of exactly `tokens` tokens over engines in processes of their own, on one
GPU or CPU; the peer is `vllm.LLM.generate` with `logprobs=0`, the way TRL samples. Ours start at once, then the peer;
one is measured while the others are idle, ours before the peer. Below a side of ours: where the time of a call goes,
the mean of its engines. The second form builds both policies from random weights, with as many parameters a token, and
lets one engine decode up to each context; the time of the prompts is taken off. bfloat16 on a GPU; medians of three
calls after a short one that is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cispo.engines.drafts import Draft
from cispo.engines.serving import ServedEngine, make_engine
from cispo.policies.loading import init_policy, save_policy
from cispo.policies.policy import Policy
from cispo.recipe.load import load_recipe
from cispo.runtime.actors import Handle, RayRuntime, Resources, Runtime
from cispo.runtime.start_parts import Parts
from cispo.runtime.watchdog import Activity
from cispo.types import Completion, RepetitionStop, Sampling

PROMPT = 48
RECIPE = Path(__file__).parents[1] / "recipes" / "lightning_30m.yaml"
VOCABULARY = 4096
WARM_UP = 16
"""Tokens of each completion of the call that is not counted."""
CALLS = 3
SHOWN = {
    "decode": "steps that only sample",
    "prefill": "steps that read prompts",
    "logprobs": "fetches of log-probabilities",
    "admission": "admission",
    "loop": "event loop between steps",
}
"""Part of a call in an engine -> its meaning."""


class CallParts(NamedTuple):
    """Where the time of an engine's last call went."""

    seconds: dict[str, float]
    """By part; `call` is the whole in the engine's process."""
    steps: dict[str, int]
    """By kind: "prefill" reads prompts, "decode" only samples."""


class TimedEngine(ServedEngine):
    """A served engine that counts the seconds of a call by part, one call at a time."""

    def __init__(self, served: ServedEngine) -> None:
        super().__init__(served.engine)
        engine: Any = served.engine
        self._spent, self._steps = Parts(), Counter[str]()
        scheduler, step = engine._core.engine_core.scheduler, engine.step
        schedule, orders = scheduler.schedule, []

        def watched(*args: object) -> Any:
            orders[:] = [schedule(*args)]
            return orders[0]

        def timed() -> list[Draft]:
            orders.clear()
            fetched, begun = self._spent.get("logprobs", 0.0), time.perf_counter()
            complete = step()
            seconds = time.perf_counter() - begun - self._spent.get("logprobs", 0.0) + fetched
            kind = "decode"
            if any(order.total_num_scheduled_tokens > len(order.num_scheduled_tokens) for order in orders):
                kind = "prefill"
            self._steps[kind] += 1
            self._spent[kind] = self._spent.get(kind, 0.0) + seconds
            return complete

        scheduler.schedule, engine.step = watched, timed
        engine.submit = self._spent.counted("admission", engine.submit)
        for method in () if engine._pending is None else ("fetch", "arrived"):
            setattr(engine._pending, method, self._spent.counted("logprobs", getattr(engine._pending, method)))

    async def _listen(self, **arguments: Any) -> None:
        with self._spent.timed("loop"):
            await super()._listen(**arguments)

    async def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        self._spent.clear()
        self._steps.clear()
        with self._spent.timed("call"):
            return await super().generate(*args, **kwargs)

    def call_parts(self) -> CallParts:
        return CallParts(dict(self._spent), dict(self._steps))


def timed_engine(*args: Any, **settings: Any) -> TimedEngine:
    return TimedEngine(make_engine(*args, **settings))


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


@dataclass(frozen=True, slots=True)
class Side:
    """A way to sample: engines of one kind that share the prompts."""

    name: str
    build: Callable[..., Any]
    model: str
    engines: int
    settings: Mapping[str, Any]

    @property
    def is_ours(self) -> bool:
        return self.build is timed_engine


def ours(name: str, model: str, engines: int, context: int, dtype: str, memory: float) -> Side:
    """`memory` is the share of a GPU for the caches of all its engines."""
    more = {"tensor_parallel": 1, "sleeps": False, "engine_args": {}, "memory": memory / engines}
    return Side(name, timed_engine, model, engines, {"dtype": dtype, "max_context": context, **more})


def peer(model: str, context: int, dtype: str, memory: float) -> Side:
    settings = {"dtype": dtype, "max_context": context, "memory": memory}
    return Side("vLLM's LLM.generate, logprobs=0", plain_vllm, model, 1, settings)


async def start(runtime: Runtime, side: Side, prompts: int, gpus: float) -> list[Handle]:
    """Its engines, each for its share of the prompts and with a fraction of the GPU in Ray's books."""
    settings: dict[str, Any] = {**side.settings, "max_sequences": prompts // side.engines, "concurrent": side.is_ours}
    args = ("vllm", side.model) if side.is_ours else (side.model,)
    return await asyncio.gather(
        *(
            runtime.start(side.build, *args, name=f"engine-{number}", resources=Resources(gpus=gpus), **settings)
            for number in range(side.engines)
        )
    )


class Measured(NamedTuple):
    calls: list[float]
    """Seconds of each."""
    parts: list[CallParts]
    """Of each call in each engine of ours."""


async def measure(side: Side, handles: Sequence[Handle], prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
    """Calls one after another, the prompts shared by the engines."""
    share, found = len(prompts) // len(handles), Measured([], [])
    shares = [prompts[i * share : (i + 1) * share] for i in range(len(handles))]
    for seed in range(CALLS + 1):
        length = tokens if seed else min(tokens, WARM_UP)
        sampling = Sampling(max_tokens=length, eos_ids=(), repetition=RepetitionStop(run_length=0))
        begun = time.perf_counter()
        await asyncio.gather(
            *(handle.call("generate", own, sampling, seed) for handle, own in zip(handles, shares, strict=True))
        )
        seconds = time.perf_counter() - begun
        if seed:
            found.calls.append(seconds)
            found.parts.extend([await handle.call("call_parts") for handle in handles if side.is_ours])
    return found


def lines(measured: Measured) -> Iterator[str]:
    """Where the time of a call goes, means."""
    whole, found = statistics.mean(measured.calls), measured.parts
    seconds = {part: statistics.mean(one.seconds.get(part, 0.0) for one in found) for part in (*SHOWN, "call")}
    known = sum(seconds[part] for part in SHOWN)
    seconds |= {"rest": seconds["call"] - known, "transport": whole - seconds["call"]}
    for part, meaning in {**SHOWN, "rest": "drafts, completions", "transport": "between the processes"}.items():
        steps = statistics.mean(one.steps.get(part, 0) for one in found)
        each = f", {steps:.0f} of {1e3 * seconds[part] / steps:.2f} ms" if steps else ""
        yield f"{meaning:<30}{100 * seconds[part] / whole:6.1f} % {1e3 * seconds[part]:9.1f} ms{each}"


def random_prompts(count: int, length: int) -> list[list[int]]:
    return torch.randint(3, 4000, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


async def against_vllm(arguments: argparse.Namespace, dtype: str) -> None:
    sequences, tokens, model = arguments.sequences, arguments.tokens, arguments.model
    print(f"{model}: {sequences} completions of {tokens} tokens, {dtype}, log-probability of every token", flush=True)
    counts = [int(number) for number in arguments.engines.split(",")]
    context, memory = PROMPT + tokens, 0.4 / len(counts)
    names = [f"ours, {engines} engine{'s' if engines > 1 else ''}" for engines in counts]
    sides = [ours(n, model, engines, context, dtype, memory) for n, engines in zip(names, counts, strict=True)]
    sides += [] if arguments.skip_peer else [peer(model, context, dtype, 0.45)]
    processes = sum(side.engines for side in sides)
    gpus = 0.9 / processes if torch.cuda.is_available() else 0
    runtime, begun = RayRuntime(processes=processes, activity=Activity()), time.perf_counter()
    try:
        # None is measured beside the start of another. The peer fails where free memory changes while it starts.
        engines = await asyncio.gather(*(start(runtime, side, sequences, gpus) for side in sides if side.is_ours))
        engines += [await start(runtime, side, sequences, gpus) for side in sides if not side.is_ours]
        print(f"  started in {time.perf_counter() - begun:.0f} s", flush=True)
        speeds: list[float] = []
        for side, handles in zip(sides, engines, strict=True):
            found = await measure(side, handles, random_prompts(sequences, PROMPT), tokens)
            speeds.append(sequences * tokens / statistics.median(found.calls))
            print(f"  {side.name:<34}{speeds[-1]:11,.0f} tokens/s", flush=True)
            for line in lines(found) if side.is_ours else ():
                print(f"    {line}", flush=True)
        for side, speed in zip(sides, speeds, strict=True) if not sides[-1].is_ours else ():
            print(f"  {side.name:<34}{speed / speeds[-1]:11.2f} x")
    finally:
        runtime.close()


async def decoded(side: Side, prompts: int, length: int, tokens: int) -> float:
    """Tokens a second, the time of the prompts taken off; the side is alone on the device."""
    runtime = RayRuntime(processes=side.engines, activity=Activity())
    try:
        gpus = 0.9 / side.engines if torch.cuda.is_available() else 0
        handles, asked = await start(runtime, side, prompts, gpus), random_prompts(prompts, length)
        seconds = [statistics.median((await measure(side, handles, asked, n)).calls) for n in (tokens, 1)]
        return prompts * (tokens - 1) / (seconds[0] - seconds[1])
    finally:
        runtime.close()


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
                    side = ours(name, f"{folder}/{name}", engines, context, dtype, memory=0.6)
                    speeds[name] = asyncio.run(decoded(side, arguments.sequences, length, tokens))
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
        asyncio.run(against_vllm(arguments, dtype))
    else:
        parser.error("give --model FOLDER or --hybrid")


if __name__ == "__main__":
    main()
