"""Memory and speed of experts distributed over ranks beside FSDP alone, in one run.

    python scripts/bench_experts.py --out FILE                   two GPUs: FSDP, ep 2, etp 2
    python scripts/bench_experts.py --ranks 4 --out FILE         four: FSDP, ep 4, etp 4, ep 2 x etp 2, ep 2, etp 2
    python scripts/bench_experts.py --device cpu --policies tiny --tokens 64

Policies are bench_sharding.py's hybrid of 1.4 B parameters (8 experts, 2 of them a token) and shapes of the same work
a token with more experts, random weights. A step is that script's: `Learner.update` on micro-batches of documents of
1,024 tokens, three quarters trained on, gradient checkpointing, bfloat16 weights and float32 masters. Each form runs
in processes of its own, and one rank alone first where the policy fits.

    state GiB     allocated after a step: weights, masters and moments      peak GiB   the most during a step
    MiB sent      of tokens of experts by a rank in a layer's forward pass, from shapes
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench_ranks import Cards, run, slowest
from bench_sharding import GIB, POLICIES, TINY, Work, measure

HYBRID = POLICIES["hybrid-1.4b"]
EXPERTS: dict[str, dict[str, object]] = {
    "hybrid-1.4b": HYBRID,
    "hybrid-16e": {**HYBRID, "num_local_experts": 16, "num_experts_per_tok": 2},
    "hybrid-64e": {**HYBRID, "num_local_experts": 64, "intermediate_size": 704, "num_experts_per_tok": 4},
}
GIB_OF_ONE = 14 / GIB
"""GiB of a parameter: a bfloat16 copy, a float32 master and two moments."""


def forms(ranks: int) -> Iterator[tuple[str, int, dict[str, object]]]:
    """(name, ranks, keys of the learner) of every mesh of the experts; edp is what ep and etp leave."""
    yield "one", 1, {}
    yield "fsdp", ranks, {}
    for etp in (1, *_divisors(ranks)):
        for ep in reversed((1, *_divisors(ranks // etp))):
            if ep * etp > 1:
                axes = {"ep": ep, "etp": etp, "edp": ranks // (ep * etp)}
                name = " ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1)
                yield name, ranks, {"expert_parallel": ep, "expert_tensor_parallel": etp}


def _divisors(number: int) -> list[int]:
    return [size for size in range(2, number + 1) if number % size == 0]


def sent_mib(config: Mapping[str, object], keys: Mapping[str, object], ranks: int, tokens: int) -> float:
    """Tokens of experts that a rank sends in a layer's forward pass."""
    from cispo.learner.parallel import Mesh
    from cispo.learner.traffic import traffic
    from cispo.policies.loading import shape_of

    ep, etp = (int(str(keys.get(key, 1))) for key in ("expert_parallel", "expert_tensor_parallel"))
    sent = traffic(shape_of(config), Mesh(world=ranks, ep=ep, etp=etp), tokens=tokens, width=2, sharded=True)
    return sent.experts / 2**20


def lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A table of all forms, with speed relative to FSDP alone."""
    yield "| policy | experts | state GiB | peak GiB | tokens/s | of FSDP alone | MiB sent | sync GB/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for policy, found in results.items():
        base = found.get("fsdp", {}).get("tokens_per_s")
        for form, r in found.items():
            if "failed" in r:
                yield f"| {policy} | {form} | {r['failed']} | | | | | |"
                continue
            speed = f"{r['tokens_per_s'] / base:.2f}" if base and form != "one" else ""
            yield (
                f"| {policy} | {form} | {r['state_gib']:.2f} | {r['peak_gib']:.1f} | {r['tokens_per_s']:,.0f} "
                f"| {speed} | {r['sent_mib']:.0f} | {r['sync_gb_per_s']:.1f} |"
            )


def measure_all(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of every policy and form; one rank is left out where its state alone exceeds `--memory`."""
    results: dict[str, dict[str, Any]] = {}
    for policy in args.policies.split(","):
        config = TINY if policy == "tiny" else EXPERTS[policy]
        for form, ranks, keys in forms(args.ranks):
            if form == "one" and parameters(config) * GIB_OF_ONE > args.memory:
                continue
            work = Work(
                policy=policy,
                form=form,
                device=args.device,
                tokens=args.tokens,
                micro_batches=args.micro_batches,
                steps=args.steps,
                group=ranks,
                learner=keys,
                shape=config,
            )
            started = time.monotonic()
            task = functools.partial(measure, work, args.profile)
            found = slowest(run(task, Cards.of(args), ranks=ranks)) | {
                "sent_mib": sent_mib(config, keys, ranks, args.tokens)
            }
            results.setdefault(policy, {})[form] = found
            print(f"{policy} {form} ({time.monotonic() - started:.0f} s): {found}", flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(results, indent=1))
    return results


def parameters(config: Mapping[str, object]) -> int:
    from cispo.policies.loading import shape_of

    return sum(p.numel() for p in shape_of(config).parameters())


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Cards.add_arguments(parser, limit=120.0)
    parser.add_argument("--policies", default="hybrid-1.4b,hybrid-16e")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches of a rank in a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory", type=float, default=70.0, help="GiB of a card that one rank's state may take")
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    return parser


def main() -> None:
    print("\n".join(lines(measure_all(arguments().parse_args()))))


if __name__ == "__main__":
    main()
