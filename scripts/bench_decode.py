"""A decode step of one engine: milliseconds of the host by part, with vLLM's scheduler and with ours, in one run.

    python scripts/bench_decode.py --model FOLDER [--sequences 512] [--tokens 512]
    python scripts/bench_decode.py --hybrid [--sequences 32] [--context 8192]       recipes/long_context, random weights
    python scripts/bench_decode.py --tiny                                           a tiny policy on a CPU
    python scripts/bench_decode.py ... --kernels                                    with a table of a step's kernels
    python scripts/bench_decode.py ... --check                                      the same completions with either

All sequences decode together. Once each has its first tokens the engine changes its scheduler every few steps, so that
both sides see the same batch, contexts and machine; medians of `--rounds` such stretches. On a GPU "wait" is the time
that the host is blocked until the device has sampled: where it is near zero, the host binds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml

from cispo.engines.drafts import Draft, start_drafts
from cispo.engines.serving import ServedEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.policies.loading import init_policy, save_policy
from cispo.runtime.start_parts import Parts
from cispo.types import Completion, RepetitionStop, Sampling

RECIPE = Path(__file__).parents[1] / "recipes" / "long_context.yaml"
PROMPT = 48
FIRST = 8
"""Tokens of each sequence before the clock starts."""
PROFILED = 16
"""Steps under torch's profiler."""
SHOWN = 30
"""Kernels of the table."""
CHECKED = 700
"""Completions of `--check`."""
TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
PARTS = ("schedule", "launch model", "launch sampler", "wait", "read tokens", "update", "take", "log-probabilities")


def times(parts: Parts, owner: object, method: str, name: str) -> None:
    """Counts calls of a method as a part; the method is looked up in the owner's class at each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(type(owner), method)(owner, *args, **kwargs)

    setattr(owner, method, parts.counted(name, call))


def watch(engine: VLLMEngine, parts: Parts) -> None:
    """Times the parts of the engine's steps."""
    core = engine._core.engine_core
    times(parts, core.scheduler, "schedule", "schedule")
    times(parts, core.scheduler, "update_from_output", "update")
    times(parts, core.model_executor, "execute_model", "launch model")
    times(parts, core.model_executor, "sample_tokens", "launch sampler")
    times(parts, engine, "_take", "take")
    if engine._pending is not None:
        times(parts, engine._pending, "arrived", "log-probabilities")
        times(parts, engine._pending, "fetch_due", "log-probabilities")
    if torch.cuda.is_available():
        from vllm.v1.worker.gpu.async_utils import AsyncOutput

        read = AsyncOutput.get_output

        def get_output(self: AsyncOutput) -> Any:
            with parts.timed("wait"):
                self.copy_event.synchronize()
            with parts.timed("read tokens"):
                return read(self)

        AsyncOutput.get_output = get_output


def schedulers(engine: VLLMEngine) -> dict[str, type]:
    """The engine's scheduler and vLLM's own, as classes; one may take over from the other between two steps."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    own = type(engine._core.engine_core.scheduler)
    vllms = AsyncScheduler if issubclass(own, AsyncScheduler) else Scheduler
    return {"vLLM's scheduler": vllms} | ({} if own is vllms else {"ours": own})


def started(engine: VLLMEngine, arguments: argparse.Namespace, vocabulary: int) -> list[Draft]:
    """Drafts in the engine, each with its first tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.sequences, arguments.context - arguments.tokens)
    prompts = torch.randint(3, vocabulary, shape, generator=generator).tolist()
    sampling = Sampling(max_tokens=arguments.tokens, eos_ids=(), repetition=RepetitionStop(run_length=0))
    drafts = start_drafts(prompts, sampling, 0, max_context=arguments.context)
    engine.submit(drafts)
    while engine.sampled < FIRST * len(drafts):
        engine.step()
    return drafts


def milliseconds(engine: VLLMEngine, parts: Parts, steps: int) -> dict[str, float]:
    """Of a step, whole and by part."""
    parts.clear()
    begun = time.perf_counter()
    for _ in range(steps):
        engine.step()
    whole = time.perf_counter() - begun
    return {name: 1e3 * seconds / steps for name, seconds in {**parts, "step": whole}.items()}


def compare(engine: VLLMEngine, parts: Parts, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by scheduler."""
    sides = schedulers(engine)
    scheduler: Any = engine._core.engine_core.scheduler
    spare = 2 * FIRST + (PROFILED if arguments.kernels else 0)
    steps = (arguments.tokens - spare) // (arguments.rounds * len(sides))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, kind in sides.items():
            scheduler.__class__ = kind
            rounds[name].append(milliseconds(engine, parts, steps))
    return {
        name: {part: statistics.median(r.get(part, 0.0) for r in found) for part in ("step", *PARTS)}
        for name, found in rounds.items()
    }


class Kernel(NamedTuple):
    """A kernel's share of a step."""

    name: str
    launches: float
    microseconds: float
    """Of all of them together."""


def kernels(engine: VLLMEngine) -> list[Kernel]:
    """Of one step, longest first; those inside CUDA graphs count one by one."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            engine.step()
        torch.cuda.synchronize()
    found = [(event.key, event.count, event.self_device_time_total) for event in profiler.key_averages()]
    ordered = sorted(found, key=lambda event: -event[2])
    return [Kernel(name, count / PROFILED, total / PROFILED) for name, count, total in ordered if total]


def kernel_lines(found: list[Kernel], step: float) -> Iterator[str]:
    """A table of the longest kernels; `step` in milliseconds, without the profiler."""
    rows, rest = found[:SHOWN], found[SHOWN:]
    for name, part in ((f"{len(rest)} others", rest), ("all", found)):
        rows = [*rows, Kernel(name, sum(k.launches for k in part), sum(k.microseconds for k in part))]
    yield "| kernel | launches a step | us each | us a step | of the step |"
    yield "|---" * 5 + "|"
    for name, launches, total in rows:
        short = name if len(name) <= 100 else f"{name[:70]}...{name[-27:]}"
        yield f"| {short} | {launches:.1f} | {total / max(launches, 1):.2f} | {total:.1f} | {total / step / 10:.1f} % |"


def check(engine: VLLMEngine, arguments: argparse.Namespace) -> Iterator[str]:
    """Completions of ragged prompts with each scheduler and with all taking turns, against those of the first."""
    engine.drop(list(engine._requests.values()))
    engine.settle()
    served, scheduler, draw = ServedEngine(engine), cast(Any, engine._core.engine_core.scheduler), random.Random(0)
    prompts = [[draw.randrange(3, 128) for _ in range(draw.randrange(1, PROMPT))] for _ in range(CHECKED)]
    limits = [draw.randrange(1, arguments.tokens) for _ in prompts]
    eos = tuple(range(0, engine._engine.vllm_config.model_config.get_vocab_size(), 150))
    sampling = Sampling(max_tokens=arguments.tokens, eos_ids=eos, repetition=RepetitionStop(run_length=0))
    names, kinds = zip(*schedulers(engine).items(), strict=True)

    def completions(kinds: Sequence[type]) -> list[Completion]:
        def schedule(*args: Any) -> Any:
            scheduler.__class__ = draw.choice(kinds)
            return type(scheduler).schedule(scheduler, *args)

        scheduler.schedule = schedule
        return asyncio.run(served.generate(prompts, sampling, 5, limits))

    first = completions(kinds[:1])
    for name, side in (*zip(names, ([kind] for kind in kinds), strict=True), ("taking turns", kinds)):
        same = sum(one == other for one, other in zip(first, completions(side), strict=True))
        yield f"{name}: {same} of {CHECKED} completions are those of {names[0]}, to the bit"


def lines(found: dict[str, dict[str, float]], sequences: int) -> Iterator[str]:
    """A table: a row a part, a column a scheduler."""
    rows: dict[str, Callable[[dict[str, float]], float]] = {
        part: lambda ms, part=part: ms[part] for part in ("step", *PARTS)
    }
    rows["rest"] = lambda ms: ms["step"] - sum(ms[part] for part in PARTS)
    rows["host: step without wait"] = lambda ms: ms["step"] - ms["wait"]
    rows["tokens/s"] = lambda ms: 1e3 * sequences / ms["step"]
    yield "| ms a step | " + " | ".join(found) + " |"
    yield "|---" * (len(found) + 1) + "|"
    for name, value in rows.items():
        form = ",.0f" if name == "tokens/s" else ".3f"
        yield f"| {name} | " + " | ".join(format(value(ms), form) for ms in found.values()) + " |"


def written(config: dict[str, Any], folder: Path) -> None:
    """A policy's folder with the weights that a training begins with.

    Weights that vLLM draws (`load_format: dummy`) are all within 1e-3, norms' too: router logits vanish behind a few
    layers, every token goes to the same experts, and a step reads a part of the weights.
    """
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    save_policy(init_policy(config, 0, dtype, device), folder)
    if cuda:
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--model", type=Path, help="folder of a policy; prompts have 48 tokens")
    kind.add_argument("--hybrid", action="store_true", help="the policy of recipes/long_context, random weights")
    kind.add_argument("--tiny", action="store_true", help="one small layer: little but the host's part")
    parser.add_argument("--sequences", type=int, help="512; --hybrid: 32")
    parser.add_argument("--tokens", type=int, help="of each sequence: 512; --hybrid: 256; --tiny: 176")
    parser.add_argument("--context", type=int, help="prompt and completion together: 48 more; --hybrid: 8192")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--memory", type=float, default=0.6, help="share of the card for the cache")
    parser.add_argument(
        "--kernels", action="store_true", help="also the kernels of a step, by torch's profiler; on a GPU"
    )
    parser.add_argument("--check", action="store_true", help="also compares completions with either scheduler")
    arguments = parser.parse_args()
    arguments.sequences = arguments.sequences or (32 if arguments.hybrid else 512)
    arguments.tokens = arguments.tokens or (256 if arguments.hybrid else 176 if arguments.tiny else 512)
    arguments.context = arguments.context or (8192 if arguments.hybrid else PROMPT + arguments.tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.model or Path(name)
        if arguments.hybrid:
            written({**yaml.safe_load(RECIPE.read_text())["policy"]["config"], "vocab_size": 128}, folder)
        if arguments.tiny:
            written(TINY, folder)
        begun = time.perf_counter()
        engine = VLLMEngine(
            str(folder),
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
            max_context=arguments.context,
            max_sequences=arguments.sequences,
            seed=0,
            memory=arguments.memory,
        )
        try:
            parts, ready = Parts(), time.perf_counter()
            watch(engine, parts)
            started(engine, arguments, vocabulary=128)
            print(f"start {ready - begun:.0f} s, prompts {time.perf_counter() - ready:.0f} s", flush=True)
            found = compare(engine, parts, arguments)
            print("\n".join(lines(found, arguments.sequences)))
            if arguments.kernels:
                step = min(ms["step"] for ms in found.values())
                print("\n".join(kernel_lines(kernels(engine), step)))
            if arguments.check:
                print("\n".join(check(engine, arguments)))
        finally:
            engine.close()


if __name__ == "__main__":
    main()
