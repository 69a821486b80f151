"""One training step of CISPO beside the same step of TRL's GRPOTrainer(loss_type="cispo"): seconds and their ratio.

    python scripts/bench_step.py [--policies dense,hybrid] [--lengths 32,16-512] [--steps 8]          a CPU, one thread
    python scripts/bench_step.py --device cuda --model FOLDER --prompts 64 --group 8 --tokens 512     a GPU

Ours is `Controller.step` of a recipe: an engine samples, reward functions score, the learner updates, the engine gets
the weights, metrics and samples are logged. Theirs is one step of `GRPOTrainer.train`. Each side runs in a process of
its own, and all get the same environment, initial weights, prompts, reward and number of tokens. On a CPU ours is
measured twice, "vllm" with `rollout.engine: vllm` and "torch" with `rollout.engine: torch` and
`learner.share_prompts: true`, and the sides take turns, step by step; on a GPU one side ends before the other starts,
so that each has the card to itself, and its figures are printed then.

Completions have the same lengths on both sides. A policy with random weights ends its completions at random, so the
end-of-sequence token is ignored and completion i has `lengths[i]` tokens in every step. Ours: `limits` of
`ServedEngine.generate`. TRL on a CPU: a logits processor bans the token until the length is reached and forces it
there; on a GPU, where TRL samples with vLLM too, `ignore_eos`.

Generation includes the update of the engine's weights, learning everything from advantages to the optimizer's step; the
rest of a step is rewards and logging. The first step warms up and is left out.

TRL is not among the project's dependencies: `pip install --target DIR --no-deps trl==1.16.0`, and DIR on PYTHONPATH.
Without it, or with --skip-peer, ours is measured alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench_jobs import Clock, Job, Seconds

if TYPE_CHECKING:
    from cispo.recipe.schema import Recipe
    from cispo.runtime.actors import Handle

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "recipes" / "tokenizers" / "chars"

COMMON: dict[str, object] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
POLICIES: dict[str, dict[str, object]] = {
    "dense": {"model_type": "qwen3", "intermediate_size": 384, "tie_word_embeddings": True, **COMMON},
    "hybrid": {
        "model_type": "minimax",
        "architectures": ["MiniMaxForCausalLM"],
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 64,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        **COMMON,
    },
}


# Ours


class Limited:
    """A runtime's handle to an engine that asks it for completions of the given lengths."""

    def __init__(self, remote: Handle, lengths: Sequence[int]) -> None:
        self.remote, self.lengths = remote, lengths

    @property
    def parts(self) -> Mapping[str, float]:
        return self.remote.parts

    async def call(self, method: str, *args: object, **kwargs: object) -> object:
        if method == "generate":
            prompts, sampling, seed, _, cache = args
            args = (prompts, sampling, seed, self.lengths, cache)
        return await self.remote.call(method, *args, **kwargs)

    async def ask(self, method: str) -> object:
        return await self.remote.ask(method)

    async def look(self, method: str) -> object:
        return await self.remote.look(method)

    def kill(self) -> None:
        self.remote.kill()


def recipe_of(job: Job) -> Recipe:
    from cispo.recipe.load import parse_recipe

    cuda = job.device == "cuda"
    rollout = {
        "engine": job.engine,
        "prompts_per_step": job.prompts,
        "group_size": job.group,
        "max_context": job.context,
        "max_tokens": max(job.lengths),
        "gpu_memory": job.memory,
        "engines": job.engines if cuda else 1,
        "placement": "split",
    }
    return parse_recipe(
        {
            "device": job.device,
            "runtime": "ray" if cuda else "local",
            "policy": {"model": job.model, "dtype": "bfloat16" if cuda else "float32"},
            "data": {"source": "bench_jobs:problems", "args": {"size": 512}},
            "reward": {"functions": [{"fn": "bench_jobs:digit_share"}]},
            "rollout": rollout,
            "algorithm": {"name": "cispo", "ratio_max": 5.0, "zero_variance": "keep"},
            "learner": {
                "lr": job.lr,
                "tokens_per_micro_batch": 16384 if cuda else 8192,
                "share_prompts": job.share_prompts,
            },
        }
    )


def run_ours(job: Job, pipe: Connection) -> None:
    """Steps of the controller, one for each message of the pipe."""
    asyncio.run(_steps(job, pipe))


async def _steps(job: Job, pipe: Connection) -> None:
    from rich.console import Console

    from cispo.algorithms.choice import algorithm_of
    from cispo.controller import Controller
    from cispo.engines.handle import EngineHandle
    from cispo.output.checkpoint import CheckpointFolder, CheckpointWriter
    from cispo.output.folder import RunLog
    from cispo.output.screen import Screen
    from cispo.rollout.prompt_source import PromptSource
    from cispo.rollout.rewards import rewards_of
    from cispo.rollout.rollout import sampling_of
    from cispo.run import load_task
    from cispo.runtime.interrupts import Interrupts
    from cispo.runtime.watchdog import Activity
    from cispo.start import running_workers

    recipe = recipe_of(job)
    task = load_task(recipe)
    log, rewards = RunLog(Path(job.folder)), rewards_of(recipe, {"data": task.prompts})
    with contextlib.closing(log), contextlib.closing(rewards):
        async with running_workers(recipe, job.model, activity=Activity()) as (workers, engines):
            await engines
            if job.device == "cpu":
                workers.engines[:] = [EngineHandle(Limited(engine.remote, job.lengths)) for engine in workers.engines]
            controller = Controller(
                recipe=recipe,
                algorithm=algorithm_of(recipe),
                workers=workers,
                renderer=task.renderer,
                sampling=replace(sampling_of(recipe, task.renderer), eos_ids=()),
                rewards=rewards,
                train_prompts=PromptSource(task.prompts, 0),
                held_out=[],
                log=log,
                screen=Screen(Console(quiet=True)),
                checkpoints=CheckpointWriter(
                    folder=CheckpointFolder(Path(job.folder), keep=1),
                    workers=workers,
                    save_tokenizer=task.renderer.tokenizer.save_pretrained,
                ),
                interrupts=Interrupts(print),
            )
            await controller.sync_weights()
            pipe.send("ready")
            for step in range(1, job.steps + 1):
                pipe.recv()
                clock = Clock()
                metrics = await controller.step(step)
                log.metrics(step, metrics)
                generation = metrics["time/rollout"] - metrics["time/reward"] + metrics["time/sync"]
                seconds = clock.read(generation, metrics["time/learn"])
                sync, mismatch = metrics["time/sync"], metrics["mismatch/logprob_mean"]
                pipe.send(seconds._replace(sync=sync, mismatch=mismatch))


# Both sides


class Side(NamedTuple):
    """One way to run a job."""

    run: Callable[[Job, Connection], None]
    engine: str = "vllm"
    share_prompts: bool = False


class Contestant:
    """One side in a process of its own."""

    def __init__(self, side: Side, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        job = replace(job, engine=side.engine, share_prompts=side.share_prompts)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=side.run, args=(job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def step(self) -> Seconds:
        self.pipe.send("go")
        return self.pipe.recv()

    def close(self) -> None:
        self.process.join()


class MemoryWatch:
    """The most GPU memory in use, polled every fifth of a second."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = ["nvidia-smi", "-i", card, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._stop.wait(0.2):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            self.peak = max(self.peak, float(done.stdout.split()[0]) / 1024)


def measure(sides: dict[str, Side], job: Job) -> dict[str, list[Seconds]]:
    """Every side's steps without the first: in turns on a CPU, one side after the other on a GPU."""
    # The peer first, whose start takes minutes.
    turns = [[name] for name in reversed(sides)] if job.device == "cuda" else [list(sides)]
    seconds: dict[str, list[Seconds]] = {name: [] for name in sides}
    for names in turns:
        running = {}
        for name in names:
            folder = tempfile.mkdtemp(dir=job.folder)
            running[name] = Contestant(sides[name], replace(job, folder=folder))
        with MemoryWatch() if job.device == "cuda" else contextlib.nullcontext() as watch:
            for _ in range(job.steps):
                for name, side in running.items():
                    seconds[name].append(side.step())
        if watch is not None:
            print(f"{names[0]}: {watch.peak:.1f} GiB of the GPU in use at most", flush=True)
            report(f"{names[0]} alone", {names[0]: seconds[names[0]][1:]})
        for side in running.values():
            side.close()
    return {name: steps[1:] for name, steps in seconds.items()}


def report(title: str, seconds: dict[str, list[Seconds]]) -> None:
    """A row for each part of a step: median and minimum of every side, and the ratios of ours to the peer, the last."""
    print(f"\n{title}")
    ratios = [f"{name} / {list(seconds)[-1]}" for name in list(seconds)[:-1]]
    heads = "".join(f"{name:>20}" for name in seconds) + "".join(f"{ratio:>20}" for ratio in ratios)
    print(f"{'seconds: median, min':<22}{heads}", flush=True)
    parts: dict[str, Callable[[Seconds], float]] = {
        "step": lambda s: s.step,
        "step, processor time": lambda s: s.processor,
        "generation": lambda s: s.generation,
        "learning": lambda s: s.learning,
        "rest": lambda s: s.step - s.generation - s.learning,
        "weights to engines": lambda s: s.sync,
    }
    for part, pick in parts.items():
        values = [[pick(s) for s in steps] for steps in seconds.values()]
        figures = [(statistics.median(v), min(v)) for v in values]
        cells = "".join(f"{median:>12.3f}{least:>8.3f}" for median, least in figures)
        peer = figures[-1]
        cells += "".join(f"{a / peer[0]:>13.2f}{b / peer[1]:>7.2f}" for a, b in figures[:-1])
        print(f"{part:<22}{cells}", flush=True)
    for name, steps in seconds.items():
        mismatch = statistics.fmean(s.mismatch for s in steps)
        if math.isfinite(mismatch):
            print(f"{name}: mean |sampler - learner| log-probability {mismatch:.2e}", flush=True)


def lengths_of(text: str, count: int) -> tuple[int, ...]:
    """`count` lengths: all alike for "32", uniform at random for "16-512"."""
    low, _, high = text.partition("-")
    rng = random.Random(0)
    return tuple(rng.randint(int(low), int(high or low)) for _ in range(count))


def prepare_model(source: Path | None, config: dict[str, object], folder: Path) -> Path:
    """The source, or a copy completed by random weights and a tokenizer of one token a character."""
    from cispo.policies.loading import init_policy, save_policy

    if source is None or not any(source.glob("*.safetensors")):
        if source is not None:
            config = json.loads((source / "config.json").read_text())
        save_policy(init_policy(config, seed=0), folder)
        tokenizer = source if source is not None and (source / "tokenizer.json").exists() else TOKENIZER
        for file in tokenizer.glob("*token*"):
            shutil.copy(file, folder)
        return folder
    return source


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--policies", default="dense,hybrid", help="tiny policies; --model wins")
    parser.add_argument("--model", type=Path, help="a policy's folder; without weights in it they are random")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--lengths", default="32,16-512", help="tokens of the completions; one table each")
    parser.add_argument("--tokens", help="the same, for one table")
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--lr", type=float, help="learning rate: 1e-3, with --model 1e-6")
    parser.add_argument("--memory", type=float, default=0.3, help="share of a GPU's memory for each side's engine")
    parser.add_argument(
        "--peer-batch", type=int, help="completions of a forward pass of TRL (all of them; on a GPU 64)"
    )
    parser.add_argument("--engine", default="vllm,torch", help="of ours, on a CPU; each is a side of its own")
    parser.add_argument("--engines", type=int, default=2, help="of ours, on a GPU")
    parser.add_argument("--skip-peer", action="store_true")
    return parser.parse_args()


def main() -> None:
    from cispo.runtime.host import CPU_ENV

    args = arguments()
    sides = {"ours": Side(run_ours)}
    if args.device == "cpu":
        sides = {"vllm": Side(run_ours), "torch": Side(run_ours, "torch", share_prompts=True)}
        sides = {name: side for name, side in sides.items() if name in args.engine.split(",")}
    if not args.skip_peer and importlib.util.find_spec("trl") is None:
        print("trl is not installed (see --help), so ours is measured alone.")
    elif not args.skip_peer:
        from bench_step_trl import run_peer

        sides["TRL"] = Side(run_peer)
    if args.device == "cpu":
        # As an actor has it; both sides inherit it.
        malloc = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}
        os.environ.update(CPU_ENV | malloc)
    count = args.prompts * args.group
    for name in [str(args.model)] if args.model else args.policies.split(","):
        for lengths in [args.tokens] if args.tokens else args.lengths.split(","):
            with tempfile.TemporaryDirectory() as folder:
                model = prepare_model(args.model, POLICIES.get(name, {}), Path(folder) / "model")
                job = Job(
                    model=str(model),
                    device=args.device,
                    prompts=args.prompts,
                    group=args.group,
                    lengths=lengths_of(lengths, count),
                    steps=args.steps + 1,
                    lr=args.lr or (1e-6 if args.model else 1e-3),
                    folder=folder,
                    memory=args.memory,
                    peer_batch=args.peer_batch or (64 if args.device == "cuda" else count),
                    engines=args.engines,
                )
                report(f"{name}, {count} completions of {lengths} tokens", measure(sides, job))


if __name__ == "__main__":
    main()
