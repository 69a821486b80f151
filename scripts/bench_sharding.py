"""Memory and speed of sharded learners beside whole copies: GiB a rank, tokens a second, weight sync.

    python scripts/bench_sharding.py --out FILE                  two GPUs, all policies
    python scripts/bench_sharding.py --device cpu --policies tiny --tokens 64

Each line is a policy of random weights and a form: `one` rank, `copies` on every rank, or `shards`. A form runs in
processes of its own (`bench_ranks.py`), which end before the next form starts. A step is
`Learner.update` on four micro-batches a rank of documents of 1,024 tokens, three quarters of them trained on, with
gradient checkpointing and CISPO's loss, bfloat16 weights and float32 masters. The first step warms up and is left out.

    state GiB     allocated after a step: weights, masters and moments      peak GiB   the most during a step
    sync GB/s     the weights in the engines' format over the time to gather and copy every bucket out of the buffer
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from bench_ranks import Cards, clock, kernels, run, slowest

QWEN3: dict[str, object] = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6}
POLICIES: dict[str, dict[str, object]] = {
    "hybrid-1.4b": {
        "model_type": "minimax",
        "vocab_size": 32768,
        "hidden_size": 2048,
        "intermediate_size": 1408,
        "num_hidden_layers": 15,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention" if n == 7 else "linear_attention" for n in range(15)],
        "tie_word_embeddings": True,
    },
    "qwen3-1.7b": {
        **QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        **QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
TINY: dict[str, object] = {
    **POLICIES["hybrid-1.4b"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
FORMS = {"one": (1, False), "copies": (2, False), "shards": (2, True)}
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Work:
    """One form of one policy."""

    policy: str
    form: str
    device: str
    tokens: int
    """Of a micro-batch."""
    micro_batches: int
    steps: int
    group: int = 0
    """Ranks, where the form is none of FORMS: those share the model."""
    learner: Mapping[str, object] = field(default_factory=dict)
    """Further keys of the learner."""
    shape: Mapping[str, object] | None = None
    """The policy's config.json, where it is none of POLICIES."""

    @property
    def ranks(self) -> int:
        return self.group or FORMS[self.form][0]

    @property
    def shard(self) -> bool:
        return self.form not in FORMS or FORMS[self.form][1]

    @property
    def config(self) -> Mapping[str, object]:
        return self.shape or (TINY if self.policy == "tiny" else POLICIES[self.policy])


def measure(work: Work, profile: int, rank: int, address: str) -> dict[str, Any]:
    """One rank's figures."""
    import torch

    from cispo.algorithms.losses import Cispo
    from cispo.algorithms.objective import Objective
    from cispo.learner.learner import Learner
    from cispo.policies.loading import policy_on_meta
    from cispo.recipe.schema import Learner as LearnerConfig

    cuda, now = work.device == "cuda", clock(work.device)
    if cuda:
        torch.cuda.set_device(0)
    options = {"shard": work.shard, "ranks": work.ranks, "gradient_checkpointing": True, **work.learner}
    config = LearnerConfig.model_validate(options)
    place = {"rank": rank, "world": work.ranks, "address": address, "device": work.device}
    started = time.perf_counter()
    with random_weights(work):
        learner = Learner("", config, dtype="bfloat16", **place)  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in policy_on_meta(work.config, None, torch.bfloat16).parameters())
    built = now() - started
    own = batch(work)[rank]
    objective = Objective(loss=Cispo(ratio_max=5.0))
    seconds = []
    for step in range(work.steps + 1):
        if cuda and step == 1:
            torch.cuda.reset_peak_memory_stats()
        before = now()
        result = learner.update(own, objective, lr=1e-6)
        seconds.append(now() - before)
        assert result.taken, "a gradient is not finite"
    state, peak = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if cuda else (0, 0)
    sync = sync_seconds(learner, now)
    tokens = work.ranks * sum(len(mb.tokens) for mb in own)
    done = {
        "parameters": parameters,
        "build_s": built,
        "tokens_per_s": tokens / statistics.median(seconds[1:]),
        "steps_s": seconds,
        "state_gib": state / GIB,
        "peak_gib": peak / GIB,
        "sync_s": sync,
        "sync_gb_per_s": 2 * parameters / sync / 1e9,
        "grad_norm": result.grad_norm,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": str(torch.__version__),
    }
    if profile:
        done["kernels_ms"] = kernels(lambda: learner.update(own, objective, lr=1e-6), profile)
    learner.close()
    return done


def sync_seconds(learner: Any, now: Any) -> float:
    """The fastest of three transfers of all buckets: gathered or copied, then copied out as an engine does."""
    import torch

    sender = learner.sender
    target = torch.empty_like(sender.buffer)
    found = []
    for _ in range(4):
        before = now()
        for number, bucket in enumerate(sender.buckets):
            learner.stage_bucket(number, "broadcast", check=False)
            target[: bucket.bytes].copy_(sender.buffer[: bucket.bytes])
        found.append(now() - before)
    return min(found[1:])


def random_weights(work: Work) -> Any:
    """A block in which policies are built from the work's config with random weights, and no file is read."""
    import contextlib

    import torch

    from cispo.learner import rank, sharding
    from cispo.policies.loading import policy_on_meta
    from cispo.policies.policy import Policy

    def draw(name: str, values: torch.Tensor, seed: int) -> None:
        if values.dim() > 1:
            values.normal_(std=0.02, generator=torch.Generator(values.device).manual_seed(seed))
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)

    def whole(folder: str, dtype: torch.dtype) -> Policy:
        policy = policy_on_meta(work.config, None, dtype)
        sharding.allocate(policy, torch.device(work.device))
        with torch.no_grad():
            for number, (name, parameter) in enumerate(policy.named_parameters()):
                draw(name, parameter, number)
        return policy

    def rows(policy: Policy, folder: str, mesh: Any, dtype: torch.dtype) -> None:
        for number, (name, parameter) in enumerate(policy.named_parameters()):
            draw(name, sharding.rows_of(parameter, mesh).values, number * mesh.world + mesh.rank)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(rank, "load_policy", whole))
    stack.enter_context(mock.patch.object(rank, "fill_from", rows))
    meta = lambda folder, dtype: policy_on_meta(work.config, None, dtype)  # noqa: E731
    stack.enter_context(mock.patch.object(sharding, "policy_without_weights", meta))
    stack.enter_context(mock.patch.object(sharding, "local_folder", Path))
    return stack


def batch(work: Work) -> Any:
    """[ranks][micro-batches] of equal sizes."""
    import torch

    from cispo.batch.packing import pack
    from cispo.types import Sample

    generator = torch.Generator().manual_seed(0)
    length = min(1024, work.tokens)
    vocabulary = int(str(work.config["vocab_size"]))
    samples = []
    for number in range(work.ranks * work.micro_batches * work.tokens // length):
        mask = torch.arange(length + 1) > length // 4
        samples.append(
            Sample(
                token_ids=torch.randint(vocabulary, (length + 1,), generator=generator),
                loss_mask=mask,
                rollout_logprobs=torch.where(mask, -11.9, 0.0),
                versions=mask.int(),
                advantages=mask * float(torch.randn((), generator=generator)),
                group_id=number // 8,
                index=number % 8,
            )
        )
    options = {"max_tokens": length, "tokens_per_micro_batch": work.tokens, "ranks": work.ranks}
    return pack(samples, reduction="token", **options)  # type: ignore[arg-type]


def lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A table of all forms, with ratios to one rank's memory and to copies' speed."""
    yield "| policy | form | state GiB | of one rank | peak GiB | tokens/s | of copies | sync GB/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for policy, forms in results.items():
        copies = forms.get("copies", {}).get("tokens_per_s")
        for form, r in forms.items():
            if "failed" in r:
                yield f"| {policy} | {form} | {r['failed']} | | | | | |"
                continue
            # Where one rank does not fit: bfloat16 weights, float32 masters and two moments.
            one = forms.get("one", {}).get("state_gib") or 14 * r["parameters"] / GIB
            speed = f"{r['tokens_per_s'] / copies:.2f}" if copies else ""
            yield (
                f"| {policy} | {form} | {r['state_gib']:.2f} | {r['state_gib'] / one:.2f} | {r['peak_gib']:.1f} "
                f"| {r['tokens_per_s']:,.0f} | {speed} | {r['sync_gb_per_s']:.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Cards.add_arguments(parser, limit=120.0)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches of a rank in a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    args = parser.parse_args()
    cards = Cards.of(args)
    results: dict[str, dict[str, Any]] = {}
    for policy in args.policies.split(","):
        for form in args.forms.split(","):
            work = Work(
                policy=policy,
                form=form,
                device=args.device,
                tokens=args.tokens,
                micro_batches=args.micro_batches,
                steps=args.steps,
            )
            started = time.monotonic()
            found = run(functools.partial(measure, work, args.profile), cards, ranks=work.ranks)
            results.setdefault(policy, {})[form] = slowest(found)
            print(f"{policy} {form} ({time.monotonic() - started:.0f} s): {results[policy][form]}", flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(results, indent=1))
    print("\n".join(lines(results)))


if __name__ == "__main__":
    main()
