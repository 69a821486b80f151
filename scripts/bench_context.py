"""Context parallelism: speed, memory and the longest context on GPUs; exactness against one rank on CPUs.

    python scripts/bench_context.py --check                          a table of errors, gloo groups of 2 and 4 processes
    python scripts/bench_context.py --out FILE                       two GPUs, everything below
    python scripts/bench_context.py steps --tokens 65536,1048576     a training step on documents of such lengths
    python scripts/bench_context.py attention --tokens 131072        one layer's attention, forward and backward
    python scripts/bench_context.py latents --tokens 8192,65536      one layer's latent attention, forward and backward
    python scripts/bench_context.py --device cpu --policy tiny --tokens 256

steps       one      1 rank, one document a micro-batch          dp       ranks with a document each, sharded weights
            gather   ranks that share each document, keys and values all-gathered      ring     the same in a ring
            A step is `Learner.update` on as many documents, gradient checkpointing, CISPO's loss, bfloat16 weights and
            float32 masters; tokens/s are those of all ranks. One that does not fit says so.
attention   whole    all tokens on one rank                      lasp, heads      lightning: LASP+, heads by all-to-all
            gather, ring                                         softmax
            Milliseconds of one document split over the ranks, bfloat16, shapes of the policy's layers.
latents     whole, gather, ring                                  as many heads as the policy's, of DeepSeek-V3's shape
            Milliseconds, memory, and up to 8,192 tokens the largest error of output and gradients, over their largest
            entry, beside float32 on one rank.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from bench_ranks import Cards, clock, kernels, run, slowest
from bench_sharding import GIB, POLICIES, TINY, random_weights

FORMS = {
    "steps": ("one", "dp", "gather", "ring"),
    "attention": ("whole lightning", "lasp", "heads", "whole softmax", "gather", "ring"),
    "latents": ("whole", "gather", "ring"),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One measurement."""

    kind: str
    form: str
    policy: str
    device: str
    tokens: int
    """Of a document."""
    world: int
    steps: int
    profile: int = 0
    documents: int = 0
    """Of a step; 0 for one a rank."""

    @property
    def ranks(self) -> int:
        return 1 if self.form.startswith(("one", "whole")) else self.world

    @property
    def context(self) -> int:
        return self.ranks if self.form in ("gather", "ring") else 1

    @property
    def config(self) -> Mapping[str, object]:
        return TINY if self.policy == "tiny" else POLICIES[self.policy]


def step(work: Work, rank: int, address: str) -> dict[str, Any]:
    """Figures of training steps."""
    import torch

    from cispo.algorithms.losses import Cispo
    from cispo.algorithms.objective import Objective
    from cispo.learner import loss
    from cispo.learner.learner import Learner
    from cispo.policies.split_documents import SplitDocuments
    from cispo.recipe.schema import Learner as LearnerConfig

    config = LearnerConfig(
        shard=work.ranks > 1, ranks=work.ranks, context_parallel=work.context, gradient_checkpointing=True
    )
    options = {"rank": rank, "world": work.ranks, "address": address, "device": work.device}
    form = "ring" if work.form == "ring" else "gather"
    with random_weights(work), mock.patch.object(loss, "SplitDocuments", functools.partial(SplitDocuments, form=form)):  # type: ignore[arg-type]
        learner = Learner("", config, dtype="bfloat16", **options)  # type: ignore[arg-type]
        own = documents(work)[rank]
        objective, now, seconds = Objective(loss=Cispo(ratio_max=5.0)), clock(work.device), []
        for number in range(work.steps + 1):
            if work.device == "cuda" and number == 1:
                torch.cuda.reset_peak_memory_stats()
            before = now()
            result = learner.update(own, objective, lr=1e-6)
            seconds.append(now() - before)
            assert result.taken, "a gradient is not finite"
        peak = torch.cuda.max_memory_allocated() if work.device == "cuda" else 0
        profile = kernels(lambda: learner.update(own, objective, lr=1e-6), work.profile) if work.profile else None
    tokens = work.tokens * (work.documents or work.world)
    median = statistics.median(seconds[1:] or seconds)
    learner.close()
    done = {"seconds": median, "tokens_per_s": tokens / median, "peak_gib": peak / GIB, "grad_norm": result.grad_norm}
    return done | ({"kernels_ms": profile} if profile else {})


def documents(work: Work) -> Any:
    """[ranks][micro-batches], a document in each."""
    import torch

    from cispo.batch.packing import pack
    from cispo.types import Sample

    generator = torch.Generator().manual_seed(0)
    vocabulary = int(str(work.config["vocab_size"]))
    mask = torch.arange(work.tokens + 1) > work.tokens // 16
    samples = [
        Sample(
            token_ids=torch.randint(vocabulary, (work.tokens + 1,), generator=generator),
            loss_mask=mask,
            rollout_logprobs=torch.where(mask, -10.4, 0.0),
            versions=mask.int(),
            advantages=mask * (1.0 - 2 * (number % 2)),
            group_id=number,
            index=0,
        )
        for number in range(work.documents or work.world)
    ]
    return pack(
        samples,
        reduction="token",
        max_tokens=work.tokens,
        tokens_per_micro_batch=work.tokens // work.context,
        ranks=work.ranks // work.context,
        context=work.context,
    )


def attention(work: Work, rank: int, address: str) -> dict[str, Any]:
    """Milliseconds of forward and backward of one layer's attention."""
    import torch

    from cispo.learner.parallel import join
    from cispo.ops.cuts import Cut
    from cispo.ops.lightning import LIGHTNING, lightning_attention
    from cispo.ops.recurrent import RecurrentOp
    from cispo.policies.attention import Documents
    from cispo.policies.pieces import Cost, split_plan
    from cispo.policies.split_documents import SplitDocuments, by_heads

    device = torch.device(work.device)
    mesh = join(rank=rank, world=work.ranks, device=device, address=address, cp=work.ranks)
    heads, keys, dim = (int(str(work.config[k])) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    plan = split_plan([work.tokens], work.ranks, Cost())
    lightning = work.form in ("whole lightning", "lasp", "heads")
    counts = (heads, heads, heads) if lightning else (heads, keys, keys)
    own = sum(p.end - p.start for p in plan.pieces[rank]) if work.ranks > 1 else work.tokens
    q, k, v = (torch.randn(own, n, dim, device=device, dtype=torch.bfloat16).requires_grad_() for n in counts)
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)
    nothing = Documents(torch.zeros(1, dtype=torch.int32, device=device), 0, 1)
    if work.ranks == 1:
        whole = Documents(torch.tensor([0, work.tokens], dtype=torch.int32, device=device), work.tokens, work.tokens)
        run = (lambda: whole.recurrent(LIGHTNING, q, k, v, slopes)) if lightning else (lambda: whole.softmax(q, k, v))
    else:
        cut, group = Cut([work.tokens], plan.pieces, rank, device), mesh.context
        assert group is not None
        form = "ring" if work.form == "ring" else "gather"
        split = SplitDocuments(nothing, 0, cut, group, form=form)
        bounds = [heads * r // work.ranks for r in (rank, rank + 1)]
        part = RecurrentOp(
            token_inputs=3,
            packed=lambda q, k, v, cu: lightning_attention(q, k, v, slopes[slice(*bounds)], cu),
            step=LIGHTNING.step,
            across="heads",
        )
        run = {
            "lasp": lambda: split.recurrent(LIGHTNING, q, k, v, slopes),
            "heads": lambda: by_heads(part, [q, k, v], cut, group),
        }.get(work.form, lambda: split.softmax(q, k, v))
    now, seconds = clock(work.device), []
    for _ in range(work.steps + 2):
        before = now()
        output = run()
        output.backward(torch.ones_like(output))
        seconds.append(now() - before)
    mesh.leave()
    return {"ms": 1e3 * statistics.median(seconds[2:] or seconds)}


def latents(work: Work, rank: int, address: str) -> dict[str, Any]:
    """Milliseconds, GiB and errors of one layer's latent attention, forward and backward."""
    import torch
    import torch.distributed as dist

    from cispo.learner.parallel import join
    from cispo.ops.cuts import Cut
    from cispo.policies.attention import Documents
    from cispo.policies.pieces import Cost, split_plan
    from cispo.policies.split_documents import SplitDocuments

    device, heads = torch.device(work.device), int(str(work.config["num_attention_heads"]))
    mesh = join(rank=rank, world=work.ranks, device=device, address=address, cp=work.ranks)
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    whole = [draw(work.tokens, *shape).bfloat16() for shape in ((heads, 192), (512,), (1, 64), (heads, 128))]
    weight = (draw(heads * 256, 512) / 512**0.5).bfloat16()
    bounds = torch.tensor([0, work.tokens], dtype=torch.int32, device=device)
    attention, rows = Documents(bounds, work.tokens, work.tokens), slice(None)
    expected = latent_results(attention, [x.float() for x in (*whole, weight)]) if work.tokens <= 8192 else []
    if mesh.context is not None:
        cut = Cut([work.tokens], split_plan([work.tokens], work.ranks, Cost()).pieces, rank, device)
        nothing, rows = Documents(bounds[:1], 0, 1), cut.own_order
        attention = SplitDocuments(nothing, 0, cut, mesh.context, form="ring" if work.form == "ring" else "gather")
    own, now, seconds = [x[rows] for x in whole], clock(work.device), []
    del whole
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(work.steps + 2):
        before = now()
        found = latent_results(attention, [*own, weight])
        seconds.append(now() - before)
    peak = torch.cuda.max_memory_allocated() if work.device == "cuda" else 0
    figures = {"ms": 1e3 * statistics.median(seconds[2:]), "peak_gib": peak / GIB}
    if expected:
        found = [x.float() for x in found]
        if mesh.context is not None:
            dist.all_reduce(found[-1], group=mesh.context.processes)
        pairs = zip(found, [*(x[rows] for x in expected[:-1]), expected[-1]], expected, strict=True)
        errors = [float((ours - theirs).abs().max() / of_all.abs().max()) for ours, theirs, of_all in pairs]
        figures |= {"output error": errors[0], "gradient error": max(errors[1:])}
    mesh.leave()
    return figures


def latent_results(attention: Any, inputs: Sequence[Any]) -> list[Any]:
    """Output, gradients of q, latents, rotary keys, and last of the expansion's weight.

    inputs: q, latents, rotary keys, the gradient of the output, the weight.
    """
    import torch

    from cispo.ops.expansion import Expansion
    from cispo.policies.attention import latent_attention

    q, latent, rope, weight = (x.detach().requires_grad_() for x in (*inputs[:3], inputs[4]))

    def keys(latent: Any, rope: Any) -> tuple[Any, Any]:
        nope, v = (latent @ weight.mT).unflatten(-1, (q.shape[1], -1)).split(128, -1)
        return torch.cat([nope, rope.expand(-1, q.shape[1], -1)], -1), v

    output = latent_attention(attention, q, [latent, rope], Expansion(keys, [weight]))
    output.backward(inputs[3])
    return [output.detach(), q.grad, latent.grad, rope.grad, weight.grad]


def table(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(n for figures in results.values() for n in figures if n != "kernels_ms"))
    yield f"| measurement | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for key, figures in results.items():
        cells = (figures.get(n, "") for n in names)
        yield f"| {key} | {' | '.join(c if isinstance(c, str) else cell(c) for c in cells)} |"


def cell(figure: float) -> str:
    return f"{figure:,.2f}" if not figure or abs(figure) >= 0.1 else f"{figure:.1e}"


def check() -> None:
    """Prints the errors of every mesh of `tests/context_group.py` against one rank."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with contextlib.ExitStack() as stack:
        import tempfile

        from tests import test_context_parallel

        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print("\n".join(test_context_parallel.error_table(root)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*FORMS, []], help="steps and attention where none is given")
    parser.add_argument("--check", action="store_true")
    Cards.add_arguments(parser, limit=180.0)
    parser.add_argument("--policy", default="hybrid-1.4b")
    parser.add_argument("--forms", help="names of forms, separated by commas")
    parser.add_argument("--tokens", default="65536", help="lengths of documents, separated by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--documents", type=int, default=0, help="of a step; one a rank where it is left out")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    args = parser.parse_args()
    if args.check:
        return check()
    cards, results = Cards.of(args), dict[str, dict[str, Any]]()
    for kind in args.kinds or ["steps", "attention"]:
        for tokens in map(int, args.tokens.split(",")):
            for form in [f for f in FORMS[kind] if args.forms is None or f in args.forms.split(",")]:
                options = {"policy": args.policy, "device": args.device, "world": args.ranks, "steps": args.steps}
                options |= {"profile": args.profile, "documents": args.documents}
                work = Work(kind=kind, form=form, tokens=tokens, **options)
                key = f"{kind} {tokens} {form}"
                task = functools.partial({"steps": step, "attention": attention, "latents": latents}[kind], work)
                results[key] = slowest(run(task, cards, ranks=work.ranks))
                print(f"{key}: {results[key]}", flush=True)
                if args.out is not None:
                    args.out.write_text(json.dumps(results, indent=1))
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
