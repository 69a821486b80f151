"""Adapters beside whole policies: a learner's memory and speed, and the accuracy that a recipe reaches with each.

    python scripts/bench_lora.py --out DIR                          memory and speed of one card, random weights
    python scripts/bench_lora.py --out DIR --model FOLDER --gpus 6  and SmolLM2's recipe with either, three seeds each
    ... --gpus 2 --runs-per-gpu 3 rollout.engines=1 rollout.gpu_memory=0.1           the same six runs on two cards
    python scripts/bench_lora.py --device cpu --policies tiny --tokens 64

Memory: shapes, work and measures are those of bench_sharding.py, on one rank; an adapter has rank 32 on every linear
layer but the head. `|dlogp|` is between the policy with its adapter and the merged bfloat16 weights that engines get.
The first step warms up and is left out. Accuracy: `--model` is a folder of SmolLM2-135M-Instruct; recipes
smollm2_chain_sum and smollm2_lora run side by side, one a card, and differ in the adapter and the learning rate alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_ranks import Cards, clock, run, slowest
from bench_sharding import GIB, POLICIES, Work, batch, random_weights, sync_seconds

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"whole": "smollm2_chain_sum", "adapter": "smollm2_lora"}
SMOLLM2: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
POLICIES["smollm2-135m"] = SMOLLM2
FORMS = ("whole", "adapter")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One form of one policy on one card."""

    work: Work
    form: str
    rank: int


def measure(job: Job, rank: int, address: str) -> dict[str, Any]:
    """Figures of a learner."""
    import torch

    from cispo.algorithms.losses import Cispo
    from cispo.algorithms.objective import Objective
    from cispo.learner.adapters import Adapters
    from cispo.learner.learner import Learner
    from cispo.recipe.schema import Learner as LearnerConfig
    from cispo.recipe.schema import Lora

    cuda, now = job.work.device == "cuda", clock(job.work.device)
    adapters = Adapters(lora=Lora(rank=job.rank, alpha=2.0 * job.rank), seed=0) if job.form == "adapter" else None
    with random_weights(job.work):
        config = LearnerConfig(gradient_checkpointing=True)
        learner = Learner("", config, dtype="bfloat16", device=job.work.device, adapters=adapters)
    own, objective = batch(job.work)[0], Objective(loss=Cispo(ratio_max=5.0))
    seconds = []
    for step in range(job.work.steps + 1):
        if cuda and step == 1:
            torch.cuda.reset_peak_memory_stats()
        before = now()
        result = learner.update(own, objective, lr=1e-4 if adapters else 1e-6)
        seconds.append(now() - before)
        assert result.taken, "a gradient is not finite"
    state, peak = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if cuda else (0, 0)
    figures = {
        "parameters": sum(p.numel() for p in learner.policy.parameters()),
        "trained": sum(p.numel() for p in learner.policy.parameters() if p.requires_grad),
        "state_gib": state / GIB,
        "peak_gib": peak / GIB,
        "tokens_per_s": sum(len(mb.tokens) for mb in own) / statistics.median(seconds[1:]),
        "sync_s": sync_seconds(learner, now),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": str(torch.__version__),
    }
    return figures | (_merged_gap(learner, own) if adapters else {})


def _merged_gap(learner: Any, micro_batches: Sequence[Any]) -> dict[str, float]:
    """|log-probability with the adapter - of the merged weights| of trained tokens; the policy stays merged."""
    import torch

    from cispo.policies.lora import merged_weight

    mask = torch.cat([mb.loss_mask for mb in micro_batches])
    own = torch.cat(learner.logprobs(micro_batches))
    with torch.no_grad():
        for layer in learner.policy.adapted.values():
            layer.get_base_layer().weight.copy_(merged_weight(layer))
    with learner.policy.as_frozen():
        gap = (torch.cat(learner.logprobs(micro_batches)) - own)[mask].abs()
    return {"dlogp_mean": float(gap.mean()), "dlogp_max": float(gap.max())}


def memory_lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| policy | form | trained | state GiB | of whole | peak GiB | tokens/s | of whole | sync s | dlogp |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for policy, forms in results.items():
        whole = forms.get("whole", {})
        for form, r in forms.items():
            if "failed" in r:
                yield f"| {policy} | {form} | {r['failed']} | | | | | | | |"
                continue
            # Where it does not fit: bfloat16 weights, float32 masters and two moments.
            state = whole.get("state_gib") or 14 * r["parameters"] / GIB or math.nan
            speed = f"{r['tokens_per_s'] / whole['tokens_per_s']:.2f}" if "tokens_per_s" in whole else ""
            gap = f"{r['dlogp_mean']:.1e}, {r['dlogp_max']:.1e}" if "dlogp_mean" in r else ""
            yield (
                f"| {policy} | {form} | {r['trained'] / r['parameters']:.2%} | {r['state_gib']:.2f} "
                f"| {r['state_gib'] / state:.2f} | {r['peak_gib']:.1f} | {r['tokens_per_s']:,.0f} | {speed} "
                f"| {r['sync_s']:.2f} | {gap} |"
            )


# Accuracy


def learn(
    model: Path, out: Path, seeds: Sequence[int], cards: Sequence[int], keys: Sequence[str]
) -> dict[str, list[float]]:
    """Held-out accuracies of the recipes' last steps, one a seed; a run at a time on each of `cards`."""
    waiting = [(form, seed) for seed in seeds for form in RECIPES]
    running: dict[int, tuple[str, int, subprocess.Popen[bytes]]] = {}
    accuracies: dict[str, dict[int, float]] = {form: {} for form in RECIPES}
    while waiting or running:
        for place, card in enumerate(cards):
            if place not in running and waiting:
                form, seed = waiting.pop(0)
                running[place] = form, seed, _start(model, out, form, seed, card, keys)
        time.sleep(1)
        for place, (form, seed, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[place]
            file = out / f"{form}-{seed}" / "metrics.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()] if process.returncode == 0 else []
            found = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
            accuracies[form][seed] = found[-1] if found else math.nan
            curve = f"{found[0]:.3f} -> {found[-1]:.3f}" if found else f"exit code {process.returncode}"
            print(f"{form} seed {seed}: {curve}", flush=True)
    return {form: [found[seed] for seed in seeds] for form, found in accuracies.items()}


def _start(model: Path, out: Path, form: str, seed: int, card: int, keys: Sequence[str]) -> subprocess.Popen[bytes]:
    recipe = ROOT / "recipes" / f"{RECIPES[form]}.yaml"
    own = [f"policy.model={model.absolute()}", f"name={form}-{seed}", f"output_dir={out.absolute()}", f"seed={seed}"]
    command = [sys.executable, "-m", "cispo.cli", "train", str(recipe), *own, *keys]
    log = (out / f"{form}-{seed}.log").open("wb")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(card)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def accuracy_lines(accuracies: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """The mean of each form, and the interval of the paired difference (Student's t, 95 %)."""
    from cispo.compare.statistics import student_interval

    for form, values in accuracies.items():
        yield f"{form}: {statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"
    pairs = zip(accuracies["adapter"], accuracies["whole"], strict=True)
    differences = [adapter - whole for adapter, whole in pairs]
    if len(differences) > 1:
        low, high = student_interval(differences)
        yield f"adapter - whole: {statistics.mean(differences):+.3f} ({low:+.3f} .. {high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Cards.add_arguments(parser, limit=150.0)
    parser.add_argument("--policies", default="smollm2-135m,hybrid-1.4b,qwen3-1.7b,qwen3-8b", help="empty: none")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct: measure accuracies too")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--gpus", type=int, default=1, help="cards for runs side by side")
    parser.add_argument("--runs-per-gpu", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("lora"), help="folder of figures and runs")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="changes to both recipes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for policy in filter(None, args.policies.split(",")):
        sizes = {"tokens": args.tokens, "micro_batches": args.micro_batches, "steps": args.steps}
        work = Work(policy=policy, form="one", device=args.device, **sizes)
        for form in FORMS:
            task = functools.partial(measure, Job(work=work, form=form, rank=args.rank))
            results.setdefault(policy, {})[form] = slowest(run(task, Cards.of(args), ranks=1))
            print(f"{policy} {form}: {results[policy][form]}", flush=True)
            (args.out / "memory.json").write_text(json.dumps(results, indent=1))
    if results:
        print("\n".join(memory_lines(results)), flush=True)
    if args.model is not None:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        accuracies = learn(
            args.model, args.out, seeds, [*range(args.card, args.card + args.gpus)] * args.runs_per_gpu, args.keys
        )
        (args.out / "accuracy.json").write_text(json.dumps(accuracies, indent=1))
        print("\n".join(accuracy_lines(accuracies)))


if __name__ == "__main__":
    main()
