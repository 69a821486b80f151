"""Combinations of parallel forms on four or more GPUs: plans, runs and prints every measurement.

    python scripts/bench_mesh.py --plan                        the meshes and commands, nothing is run
    python scripts/bench_mesh.py gradients --out FILE          every mesh of --ranks GPUs against one GPU
    python scripts/bench_mesh.py context experts runs --folder DIR
    python scripts/bench_mesh.py gradients --ranks 2 --device cpu --policies tiny

gradients   largest error of any gradient over the largest entry, and of the norm, against one rank that has the whole
            policy. Experts are replayed, so that no rounding flips a router's choice. bfloat16 beside one rank in
            bfloat16; the error of that one against float32 is the line `one`.
context     bench_context.py: steps and one layer's attention by all-gather, ring and heads at 64K, 256K and 1M tokens
experts     bench_experts.py: 16 and 64 experts, every mesh of ep x etp
runs        a reinforcement learning run of the recipe long_context: learners and engines on cards of their own,
            staleness 1; then one engine with tensor parallelism over all cards beside sharded learners
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

from bench_ranks import Cards, run, slowest
from bench_sharding import POLICIES, TINY, Work

HERE = Path(__file__).parent
FAMILIES: dict[str, dict[str, object]] = {
    "hybrid-1.4b": POLICIES["hybrid-1.4b"],
    "minimax-m2": {
        "model_type": "minimax_m2",
        "vocab_size": 32768,
        "hidden_size": 1536,
        "head_dim": 128,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
    },
    "hybrid-200m": {
        **POLICIES["hybrid-1.4b"],
        "vocab_size": 8192,
        "hidden_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    },
    "qwen3-next-100m": {
        "model_type": "qwen3_next",
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
    },
    "tiny": TINY,
}


@dataclass(frozen=True, slots=True)
class Axes:
    """Sizes of a mesh's axes; dp_shard and edp are what is left of the ranks."""

    cp: int
    ep: int
    etp: int

    def name(self, ranks: int) -> str:
        sizes = {"dp": ranks // self.cp, "cp": self.cp, "edp": ranks // (self.ep * self.etp)}
        return " ".join(f"{axis} {size}" for axis, size in {**sizes, "ep": self.ep, "etp": self.etp}.items())


def meshes(ranks: int) -> list[Axes]:
    """Every mesh of so many ranks."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    pairs = [(ep, etp) for ep in sizes for etp in sizes if ranks % (ep * etp) == 0]
    return [Axes(cp, ep, etp) for cp in sizes for ep, etp in pairs]


# Gradients


def batches(work: Work, axes: Axes, ranks: int) -> Any:
    """[ranks][micro-batches] of ragged samples, the longest split over cp, each token with experts drawn for it."""
    import torch

    from cispo.batch.packing import pack
    from cispo.policies.loading import shape_of
    from cispo.policies.replay import choices_of, routers_of
    from cispo.types import Sample

    generator = torch.Generator().manual_seed(0)
    vocabulary = int(str(work.config["vocab_size"]))
    policy = shape_of(work.config)
    layers, experts = policy.router_shape
    chosen = choices_of(routers_of(policy)[0])
    samples = []
    for number in range(13):
        length = int(torch.randint(work.tokens // 8, work.tokens, (), generator=generator)) + 2
        mask = torch.arange(length) > length // 4
        scores = torch.rand(length - 1, layers, experts, generator=generator)
        samples.append(
            Sample(
                token_ids=torch.randint(vocabulary, (length,), generator=generator),
                loss_mask=mask,
                rollout_logprobs=torch.where(mask, -10.4, 0.0),
                versions=mask.int(),
                advantages=mask * float(torch.randn((), generator=generator)),
                group_id=number // 4,
                index=number % 4,
                routes=scores.topk(chosen, dim=-1).indices.to(torch.int16),
            )
        )
    return pack(
        samples,
        reduction="prompt",
        max_tokens=work.tokens,
        tokens_per_micro_batch=work.tokens // axes.cp,
        ranks=ranks // axes.cp,
        context=axes.cp,
    )


def gradient(work: Work, axes: Axes, dtype: Any, folder: Path, rank: int, mesh: Any) -> tuple[Any, float]:
    """{name: this rank's part of the gradient}, float32 on the host, and the norm."""
    import torch

    from cispo.algorithms.losses import Cispo
    from cispo.algorithms.objective import Objective
    from cispo.learner import learner as learner_module
    from cispo.learner.learner import Learner
    from cispo.learner.rows import Rows, rows_of
    from cispo.recipe.schema import Learner as LearnerConfig

    gc.collect()  # FSDP's modules refer to each other
    if work.device == "cuda":
        torch.cuda.empty_cache()
    keys = {"context_parallel": axes.cp, "expert_parallel": axes.ep, "expert_tensor_parallel": axes.etp}
    options = {"shard": mesh.world > 1, "gradient_checkpointing": True, "router_aux_coef": 0.01, **keys}
    config = LearnerConfig.model_validate(options)
    with mock.patch.object(learner_module, "join", lambda **_: mesh):
        learner = Learner(str(folder), config, dtype=dtype, device=work.device, rank=rank, world=mesh.world)
    own = batches(work, axes, mesh.world)[mesh.rank]
    learner.forward_backward(own, Objective(loss=Cispo(ratio_max=5.0)))
    optimizer, found = learner.rank.optimizer, {}
    for name, parameter, slope in zip(optimizer.names, optimizer.parameters, optimizer.gradients(), strict=True):
        rows = rows_of(parameter, mesh)
        found[name] = Rows(rows.shape, rows.first, slope.float().cpu(), rows.share)
    return found, learner.rank.step(0.0)[0]


def compare(own: Any, whole: Any) -> float:
    """The largest difference of this rank's parts from the whole's, over the largest entry of the whole."""
    scale = max(float(rows.values.abs().max()) for rows in whole.values())
    worst = 0.0
    for name, rows in own.items():
        theirs = whole[name].values[rows.first : rows.first + len(rows.values)]
        theirs = theirs if rows.narrow is None else rows.narrow.of(theirs)
        if rows.values.numel():
            worst = max(worst, float((rows.values - theirs).abs().max()))
    return worst / scale


def errors(work: Work, rank: int, address: str) -> dict[str, Any]:
    """Errors of every mesh by name, the most of all ranks; each rank computes the reference on its own device."""
    import torch
    import torch.distributed as dist

    from cispo.learner.parallel import Mesh, join, with_axes

    device = torch.device(work.device)
    if work.device == "cuda":
        torch.cuda.set_device(0)
    folder, alone = Path(str(work.learner["folder"])), Mesh(device=device)
    single = Axes(1, 1, 1)
    exact, exact_norm = gradient(work, single, "float32", folder, 0, alone)
    base = join(rank=rank, world=work.ranks, device=device, address=address)
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        whole, norm = (exact, exact_norm) if dtype == "float32" else gradient(work, single, dtype, folder, 0, alone)
        if dtype == "bfloat16":
            found["bfloat16, one"] = {"gradient": compare(whole, exact), "norm": abs(norm / exact_norm - 1)}
        for axes in meshes(work.ranks):
            mesh = with_axes(base, shard=True, cp=axes.cp, ep=axes.ep, etp=axes.etp)
            own, ours = gradient(work, axes, dtype, folder, rank, mesh)
            worst = torch.tensor([compare(own, whole), abs(ours / norm - 1)], device=device)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            name = f"{dtype}, {axes.name(work.ranks)}"
            found[name] = dict(zip(("gradient", "norm"), worst.tolist(), strict=True))
            if rank == 0:
                print(f"gradients {work.policy}: {name}: {found[name]}", flush=True)
    base.leave()
    return found


def gradients(args: argparse.Namespace) -> dict[str, Any]:
    """policy -> mesh -> errors."""
    from cispo.policies.loading import init_policy, save_policy

    results: dict[str, Any] = {}
    for policy in args.policies.split(","):
        with tempfile.TemporaryDirectory() as folder:
            save_policy(init_policy(FAMILIES[policy], seed=0), folder)
            work = Work(
                policy=policy,
                form="gradients",
                device=args.device,
                tokens=args.tokens,
                micro_batches=1,
                steps=1,
                group=args.ranks,
                learner={"folder": folder},
                shape=FAMILIES[policy],
            )
            results[policy] = slowest(run(functools.partial(errors, work), Cards.of(args), ranks=args.ranks))
        print(f"gradients {policy}: {results[policy]}", flush=True)
    return results


def error_lines(results: Mapping[str, Any]) -> Iterator[str]:
    yield "| policy | mesh | gradient | norm |"
    yield "|---|---|---|---|"
    for policy, found in results.items():
        if "failed" in found:
            yield f"| {policy} | {found['failed']} | | |"
            continue
        for name, error in found.items():
            yield f"| {policy} | {name} | {error['gradient']:.1e} | {error['norm']:.1e} |"


# Other benches and runs


@dataclass(frozen=True, slots=True)
class Command:
    """A measurement of its own process."""

    name: str
    words: Sequence[str]
    run_name: str = ""
    """Folder of a training run in that of all files, to read its metrics."""


def commands(kind: str, args: argparse.Namespace) -> list[Command]:
    """The commands of a kind of measurement, in order."""
    python, out = sys.executable, args.folder
    if kind == "context":
        sizes = sorted({1 << n for n in range(args.ranks.bit_length()) if 1 << n <= args.ranks})
        found = [
            Command(
                f"context {ranks}",
                [python, str(HERE / "bench_context.py"), "steps", "--tokens", "65536,262144,1048576"]
                + ["--ranks", str(ranks), "--out", str(out / f"context_{ranks}.json")],
            )
            for ranks in sizes
            if ranks > 1
        ]
        words = [python, str(HERE / "bench_context.py"), "attention", "--tokens", "65536,262144,1048576"]
        words += ["--ranks", str(args.ranks), "--out", str(out / "attention.json")]
        return [*found, Command("attention", words)]
    if kind == "experts":
        words = [python, str(HERE / "bench_experts.py"), "--ranks", str(args.ranks), "--out", str(out / "experts.json")]
        return [Command("experts", [*words, "--policies", "hybrid-16e,hybrid-64e"])]
    keys = ["control.max_staleness=1", "rollout.placement=separate", "train.save_every=10"]
    found = []
    for learners in dict.fromkeys((args.ranks // 2, args.ranks - 1, 1)):
        engines, name = args.ranks - learners, f"runs/{learners}_{args.ranks - learners}"
        own = [f"learner.ranks={learners}", f"learner.context_parallel={learners}", f"rollout.engines={engines}"]
        found.append(Command(f"{learners} learners, {engines} engines", _long_run(out / name, [*keys, *own]), name))
    own = [f"learner.ranks={args.ranks}", f"learner.context_parallel={args.ranks}"]
    own += ["rollout.engines=1", f"rollout.tensor_parallel={args.ranks}"]
    name = "runs/tensor"
    found.append(Command(f"an engine over {args.ranks} cards", _long_run(out / name, own), name))
    return found


def _long_run(out: Path, keys: Sequence[str]) -> list[str]:
    words = [sys.executable, str(HERE / "bench_long_run.py"), "--out", str(out)]
    return [*words, "--tokens", "32768", "--steps", "20", "--prompts", "4", *keys]


def run_lines(folder: Path, name: str) -> str:
    """A table row of a run: means over its steps after the first two."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [m for m in map(json.loads, lines) if "time/step" in m][2:]
    if not steps:
        return f"| {name} | no step was finished | | | | |"
    of = {key: mean(m.get(key, 0.0) for m in steps) for key in ("rollout/tokens_per_s", "time/step", "time/learn")}
    waiting = mean(m["time/rollout"] / m["time/step"] for m in steps)
    mismatch = mean(m.get("mismatch/logprob_mean", 0.0) for m in steps)
    speed, step, learn = of.values()
    return f"| {name} | {speed:,.0f} | {step:.1f} | {learn / step:.0%} | {waiting:.0%} | {mismatch:.1e} |"


def execute(kind: str, args: argparse.Namespace) -> None:
    """Runs the commands of a kind, one after another; a failed one is named, and the others go on."""
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for command in commands(kind, args):
        started = time.monotonic()
        done = subprocess.run(command.words, cwd=HERE.parent, env={**os.environ}, check=False)
        print(f"{command.name}: exit code {done.returncode} after {time.monotonic() - started:.0f} s", flush=True)
        run_folder = args.folder / command.run_name / "long"
        if command.run_name and (run_folder / "metrics.jsonl").exists():
            rows.append(run_lines(run_folder, command.name))
    if rows:
        print("| cards | tokens/s | s a step | learning | waiting for rollouts | mismatch |\n|---|---|---|---|---|---|")
        print("\n".join(rows))


KINDS = ("gradients", "context", "experts", "runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all where none is given")
    parser.add_argument("--plan", action="store_true", help="print what would be run")
    Cards.add_arguments(parser, limit=540.0)
    parser.add_argument("--policies", default="hybrid-1.4b,minimax-m2", help="of the gradients")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="longest sample of the gradients")
    parser.add_argument("--folder", type=Path, default=Path("mesh"), help="of the other measurements' files")
    parser.add_argument("--out", type=Path, help="JSON file of the gradients' errors")
    args = parser.parse_args()
    for kind in args.kinds or KINDS:
        if args.plan and kind == "gradients":
            print("\n".join(f"gradients: {axes.name(args.ranks)}" for axes in meshes(args.ranks)))
        elif args.plan:
            print("\n".join(f"{kind}: {' '.join(map(str, c.words))}" for c in commands(kind, args)))
        elif kind == "gradients":
            results = gradients(args)
            if args.out is not None:
                args.out.write_text(json.dumps(results, indent=1))
            print("\n".join(error_lines(results)))
        else:
            execute(kind, args)


if __name__ == "__main__":
    main()
