"""Ranks of `test_context_parallel`: the cases that gloo groups of 2 and 4 processes run, and the same on one rank.

parent  run_group(world, folders) --> processes, each: every case --torch.save--> {case: result} of each rank
        Attended.whole, learner_result --> one rank's result, in the parent's process
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cispo.algorithms import ALGORITHMS
from cispo.algorithms.losses import Cispo
from cispo.algorithms.objective import Objective
from cispo.batch.packing import pack
from cispo.learner import critic as critic_module
from cispo.learner import learner as learner_module
from cispo.learner import parallel
from cispo.learner.adapters import Adapters
from cispo.learner.critic import Critic
from cispo.learner.learner import Learner
from cispo.learner.sharding import rows_of
from cispo.ops.collectives import Group
from cispo.ops.convolution import CONVOLUTION
from cispo.ops.cuts import Cut
from cispo.ops.delta import DELTA
from cispo.ops.expansion import Expansion
from cispo.ops.lightning import LIGHTNING
from cispo.ops.sparse_attention import Index
from cispo.policies import split_documents
from cispo.policies.attention import Attention, Documents, latent_attention
from cispo.policies.lora import AdaptedPolicy
from cispo.policies.pieces import Cost
from cispo.policies.split_documents import SoftmaxForm, SplitDocuments
from cispo.recipe.schema import Critic as CriticConfig
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Lora
from cispo.types import MicroBatch, Sample
from tests.rank_group import run_ranks
from tests.shard_group import F64, Case, gradients, prompts_shared
from tests.test_learner import samples

TOKEN = Objective(loss=Cispo(ratio_max=1.5))
SEQUENCE = Objective(loss=ALGORITHMS["gspo"].objective.loss)

# Attention alone

Pieces = list[list[tuple[int, int, int]]]


def contiguous(lengths: Sequence[int], ranks: int) -> Pieces:
    """The pack in equal slices, wherever documents begin and end."""
    total = sum(lengths)
    return _sliced(lengths, [total * rank // ranks for rank in range(ranks + 1)], list(range(ranks)), ranks)


def zigzag(lengths: Sequence[int], ranks: int) -> Pieces:
    """The pack in twice as many slices, the first and the last for one rank."""
    total, parts = sum(lengths), 2 * ranks
    owners = [*range(ranks), *reversed(range(ranks))]
    return _sliced(lengths, [total * part // parts for part in range(parts + 1)], owners, ranks)


def unequal(lengths: Sequence[int], ranks: int) -> Pieces:
    """Slices of 1, 2, 4, ... tokens for one rank after another, the first one left out: it has no token."""
    bounds, owners, step = [0], list[int](), 1
    while bounds[-1] < sum(lengths):
        bounds.append(min(bounds[-1] + step, sum(lengths)))
        owners.append(1 + len(owners) % (ranks - 1))
        step *= 2
    return _sliced(lengths, bounds, owners, ranks)


def _sliced(lengths: Sequence[int], bounds: Sequence[int], owners: Sequence[int], ranks: int) -> Pieces:
    starts = [0, *accumulate(lengths)]
    pieces: Pieces = [[] for _ in range(ranks)]
    for first, last, owner in zip(bounds, bounds[1:], owners, strict=False):
        for document, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
            if max(first, start) < min(last, end):
                pieces[owner].append((document, max(first, start) - start, min(last, end) - start))
    return pieces


LAYOUTS: dict[str, Callable[[Sequence[int], int], Pieces]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "unequal": unequal,
}
LENGTHS = {
    "one": [203],
    "ragged": [37, 90, 1, 50, 25],
    "boundaries on edges": [51, 51, 51, 51],
    "a token before an edge": [50, 100, 54],
    "tiny": [1, 2, 3, 4, 5, 6, 7],
    "fewer tokens than ranks": [3],
}

CUTS = [
    ("one", "zigzag"),
    ("ragged", "contiguous"),
    ("ragged", "unequal"),
    ("boundaries on edges", "contiguous"),
    ("a token before an edge", "zigzag"),
    ("tiny", "zigzag"),
    ("fewer tokens than ranks", "contiguous"),
]
"""(lengths, layout); numbers of fewer bits take the ragged ones alone."""


@dataclass(frozen=True)
class Attended:
    """One kind of attention on random inputs: outputs and gradients, by rank or whole."""

    kind: str
    dtype: torch.dtype = torch.float64
    form: SoftmaxForm | None = None

    @property
    def cuts(self) -> list[tuple[str, str]]:
        return CUTS if self.dtype == torch.float64 else [("ragged", "zigzag")]

    def inputs(self, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """[T, ...] inputs, and those of the layer; the last of the first is the gradient of the output."""
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        unit = torch.nn.functional.normalize
        if self.kind == "softmax":
            return [draw(tokens, 4, 8), draw(tokens, 2, 8), draw(tokens, 2, 8), draw(tokens, 4, 8)], []
        if self.kind == "lightning":
            return [draw(tokens, 4, 8) for _ in range(4)], [torch.tensor([0.9, 0.3, 1e-3, 1e-8])]
        if self.kind == "convolution":
            return [draw(tokens, 6), draw(tokens, 6)], [draw(6, 4)]
        if self.kind in ("gdn", "kda"):
            keys, heads = (3, 6) if self.kind == "gdn" else (3, 3)
            q, k = (unit(draw(tokens, keys, 8), dim=-1) for _ in range(2))
            g = -draw(tokens, heads, *([8] if self.kind == "kda" else [])).exp()
            return [q, k, draw(tokens, heads, 4), g, draw(tokens, heads).sigmoid(), draw(tokens, heads, 4)], []
        assert self.kind in ("sparse", "latent", "sparse latent")
        index = [draw(tokens, 2, 4), draw(tokens, 4), draw(tokens, 2)] if "sparse" in self.kind else []
        if self.kind == "sparse":
            return [draw(tokens, 4, 8), draw(tokens, 2, 8), draw(tokens, 2, 6), *index, draw(tokens, 4, 6)], []
        # Keys of variance 1, as of normed latents: the rounding of a probability grows with its score.
        expansion = draw(5, 44) / 5**0.5
        return [draw(tokens, 4, 8), draw(tokens, 5), draw(tokens, 1, 3), *index, draw(tokens, 4, 6)], [expansion]

    def run(self, attention: Attention, tokens: Sequence[Tensor], of_layer: Sequence[Tensor]) -> Tensor:
        if self.kind == "softmax":
            return attention.softmax(tokens[0], tokens[1], tokens[2])
        if self.kind in ("lightning", "convolution", "gdn", "kda"):
            op = {"lightning": LIGHTNING, "convolution": CONVOLUTION}.get(self.kind, DELTA)
            return attention.recurrent(op, *tokens, *of_layer)
        index = None
        if "sparse" in self.kind:
            queries, keys, weights = (x.detach() for x in tokens[3:])
            index = Index(queries=queries, keys=keys, weights=weights, top_k=7)
        if self.kind == "sparse":
            assert index is not None
            return attention.sparse_softmax(tokens[0], tokens[1], tokens[2], index)

        def expand(latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
            nope, v = (latent @ of_layer[0]).unflatten(-1, (4, 11)).split([5, 6], -1)
            return torch.cat([nope, rope.expand(-1, 4, -1)], -1), v

        return latent_attention(attention, tokens[0], tokens[1:3], Expansion(expand, of_layer), 0.4, index)

    def results(self, attention: Attention, rows: Tensor, total: int) -> list[Tensor]:
        """Output and gradients of all inputs at `rows` of the pack; the layer's at the end."""
        *tokens, above = (x[rows] for x in self.inputs(total)[0])
        of_layer = self.inputs(total)[1]
        differentiable = [x.clone().requires_grad_() for x in tokens]
        layer = [x.clone().requires_grad_(self.kind != "lightning") for x in of_layer]
        output = self.run(attention, differentiable, layer)
        output.backward(above)
        grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in (*differentiable, *layer)]
        return [output.detach(), *grads]

    def whole(self, lengths: Sequence[int]) -> list[Tensor]:
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        total = sum(lengths)
        return self.results(Documents(cu_seqlens, total), torch.arange(total), total)

    def pieces(self, lengths: Sequence[int], pieces: Pieces, group: Group) -> tuple[Tensor, list[Tensor]]:
        """The places of this rank's tokens in the pack, and the results there."""
        cut = Cut(lengths, pieces, group.rank, torch.device("cpu"))
        nothing = Documents(torch.zeros(1, dtype=torch.int32), 0, 1)
        attention = SplitDocuments(nothing, 0, cut, group, form=self.form)
        return cut.own_order, self.results(attention, cut.own_order, sum(lengths))


ATTENDED = {
    "softmax": Attended("softmax"),
    "ring": Attended("softmax", form="ring"),
    "lightning": Attended("lightning"),
    "convolution": Attended("convolution"),
    "gdn": Attended("gdn"),
    "kda": Attended("kda"),
    "sparse": Attended("sparse"),
    "latent": Attended("latent"),
    "latent ring": Attended("latent", form="ring"),
    "sparse latent": Attended("sparse latent"),
    "softmax float32": Attended("softmax", torch.float32),
    "ring float32": Attended("softmax", torch.float32, form="ring"),
    "latent ring float32": Attended("latent", torch.float32, form="ring"),
    "lightning float32": Attended("lightning", torch.float32),
    "lightning bfloat16": Attended("lightning", torch.bfloat16),
    "ring bfloat16": Attended("softmax", torch.bfloat16, form="ring"),
    "latent ring bfloat16": Attended("latent", torch.bfloat16, form="ring"),
}


def rows_expanded(form: SoftmaxForm, group: Group) -> tuple[int, int]:
    """Latents of which keys and values are in memory together, at most, and of all ranks, in a pass with gradient."""
    lengths, made, most = LENGTHS["ragged"], list[tuple[StorageWeakRef, int]](), 0
    cut = Cut(lengths, zigzag(lengths, group.size), group.rank, torch.device("cpu"))
    weight = torch.randn(5, 44).requires_grad_()

    def expand(latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal most
        nope, v = (latent @ weight).unflatten(-1, (4, 11)).split([5, 6], -1)
        if len(latent):
            made.append((StorageWeakRef(v.untyped_storage()), len(latent)))
            most = max(most, sum(rows for storage, rows in made if not storage.expired()))
        return torch.cat([nope, rope.expand(-1, 4, -1)], -1), v

    q, latent, rope = (torch.randn(cut.tokens, *n).requires_grad_() for n in ((4, 8), (5,), (1, 3)))
    attention = SplitDocuments(Documents(torch.zeros(1, dtype=torch.int32), 0, 1), 0, cut, group, form=form)
    attention.latent_softmax(q, [latent, rope], Expansion(expand, [weight])).sum().backward()
    return most, sum(lengths)


# The learner


@dataclass(frozen=True)
class ContextCase(Case):
    """A batch's loss and gradient beside one rank's."""

    ring: bool = False
    """Softmax layers of split documents in a ring, whatever their keys and values are."""
    lora: bool = False
    """An adapter alone is trained, both of its halves off zero."""
    bound: float = 1e-6
    """On errors in float32. A tiny policy of latent attention has 2e-6 on one rank, from its own float64."""


MESHES = {2: [(1, 2)], 4: [(2, 2), (1, 4)]}
"""(shares, ranks of a group) by world."""


def meshes_of(case: ContextCase, world: int, every: bool = False) -> list[tuple[int, int]]:
    """`every` mesh for the table of `scripts/bench_context.py`; in tests all for two cases, fewer for the others."""
    if every or (world in case.worlds and "tied" in case.folder and case.dtype == F64):
        return MESHES[world]
    return MESHES[world][-1:] if world in case.worlds else []


CASES = [
    ContextCase("hybrid", "untied", aux=0.5, checkpointing=True),
    ContextCase("hybrid float32", "untied", dtype="float32", aux=0.5, worlds=(2,)),
    ContextCase("tied, sequences, shared prompts", "tied", objective=SEQUENCE, share_prompts=True, aux=0.5),
    ContextCase("sequences float32", "tied", dtype="float32", objective=SEQUENCE, checkpointing=True, worlds=(2,)),
    ContextCase("one sample", "untied", aux=0.5, share_prompts=True, count=1, worlds=(4,)),
    ContextCase("gated DeltaNet", "qwen3_next", aux=0.5, checkpointing=True),
    ContextCase("Kimi Delta", "kimi_linear", aux=0.5, worlds=(2,)),
    ContextCase("latent attention", "deepseek_v3", objective=SEQUENCE),
    ContextCase("sparse attention", "deepseek_v32", aux=0.5, checkpointing=True, worlds=(2,)),
    ContextCase("dense", "dense", share_prompts=True, objective=SEQUENCE, worlds=(2,)),
    ContextCase("latent ring", "deepseek_v3", objective=SEQUENCE, ring=True),
    ContextCase(
        "latent ring float32", "deepseek_v3", dtype="float32", objective=SEQUENCE, worlds=(2,), ring=True, bound=3e-6
    ),
    ContextCase("latent ring, recomputed layers", "deepseek_v3", aux=0.5, checkpointing=True, ring=True),
    ContextCase("Kimi Delta, latent ring", "kimi_linear", aux=0.5, ring=True),
    ContextCase("latent ring, adapter", "deepseek_v3", checkpointing=True, worlds=(2,), ring=True, lora=True),
]


def batch(shares: int, context: int, *, count: int = 13, share_prompts: bool = False) -> list[list[MicroBatch]]:
    return packed(prompts_shared(samples(count)) if share_prompts else samples(count), shares, context, share_prompts)


def packed(
    given: Sequence[Sample], shares: int, context: int, share_prompts: bool = False, reduction: Any = "prompt"
) -> list[list[MicroBatch]]:
    options = {"max_tokens": 16, "tokens_per_micro_batch": 40 // context, "share_prompts": share_prompts}
    return pack(given, reduction=reduction, ranks=shares, context=context, cost=Cost(quadratic=30.0), **options)  # type: ignore[arg-type]


def new_learner(root: Path, case: ContextCase, rank: int = 0, world: int = 1) -> Learner:
    adapters = Adapters(lora=Lora(rank=2, alpha=4.0), seed=3) if case.lora else None
    options = {"dtype": case.dtype, "rank": rank, "world": world, "adapters": adapters}
    learner = Learner(str(root / case.folder), case.config, **options)
    if isinstance(learner.policy, AdaptedPolicy):
        generator = torch.Generator().manual_seed(5)
        shapes = {name: half.shape for name, half in learner.policy.adapter().items()}
        learner.policy.load_adapter({n: 0.1 * torch.randn(s, generator=generator) for n, s in shapes.items()})
    return learner


def learner_result(learner: Learner, case: ContextCase, own: Sequence[MicroBatch]) -> dict[str, Any]:
    """Loss, gradients (this rank's rows), norm, and log-probabilities a micro-batch."""
    logprobs = learner.logprobs(own)
    result = learner.forward_backward(own, case.objective)
    slopes = gradients(learner.rank)
    assert result.tokens is not None
    entropy = float(result.tokens.entropy.double().sum())
    norm, _ = learner.rank.step(0.0)
    parts = {"loss": result.loss, "aux": result.aux_loss, "gradients": slopes, "norm": norm}
    return parts | {"logprobs": logprobs, "entropy": entropy, "ratio": float(result.tokens.ratio.double().sum())}


def critic_result(critic: Critic, own: Sequence[MicroBatch]) -> dict[str, Any]:
    with torch.no_grad():  # a new head gives 0 everywhere, and no gradient to the backbone
        head = rows_of(critic.model.head.weight, critic.rank.mesh).values
        head.copy_(torch.linspace(-1, 1, critic.model.head.weight.numel()).view(1, -1)[: len(head)])
    values = critic.values(own)
    losses = critic.rank.backward(critic.rank.to_device(own), critic._loss)
    return {"values": values, "loss": float(sum(losses)), "gradients": gradients(critic.rank)}


def critic_batch(shares: int, context: int) -> list[list[MicroBatch]]:
    given = [replace(s, values=s.rollout_logprobs / 9, returns=s.loss_mask * s.index.bit_count()) for s in samples()]
    return packed(given, shares, context, reduction="token")


def _entry(own: int, world: int, root: Path, address: str, every: bool) -> None:
    torch.set_num_threads(1)
    with mock.patch.object(parallel, "TIMEOUT", parallel.timedelta(seconds=60)):
        mesh = parallel.join(rank=own, world=world, device=torch.device("cpu"), address=address)
        # One process group serves all learners of a process; groups of an axis too have the timeout.
        meshes = {
            (context, shard): parallel.with_axes(mesh, shard=shard, cp=context)
            for _, context in MESHES[world]
            for shard in (False, True)
        }
    results: dict[str, Any] = {}
    group = meshes[world, False].context
    assert group is not None
    for name, attended in ATTENDED.items():
        for kind, layout in attended.cuts:
            pieces = LAYOUTS[layout](LENGTHS[kind], world)
            results[f"{name}, {kind}, {layout}"] = attended.pieces(LENGTHS[kind], pieces, group)
    forms: list[SoftmaxForm] = ["gather", "ring"]
    results |= {f"rows expanded, {form}": rows_expanded(form, group) for form in forms}
    for shares, context in MESHES[world]:
        for number, case in enumerate(CASES):
            if (shares, context) not in meshes_of(case, world, every):
                continue
            made = meshes[context, number % 2 == 0]
            most = 0 if case.ring else split_documents._GATHERED
            with (
                mock.patch.object(learner_module, "join", lambda made=made, **_: made),
                mock.patch.object(split_documents, "_GATHERED", most),
            ):
                mine = batch(shares, context, count=case.count, share_prompts=case.share_prompts)[own]
                learner = new_learner(root, case, own, world)
                results[f"{case.name}, {shares} x {context}"] = learner_result(learner, case, mine)
        made = meshes[context, True]
        with mock.patch.object(critic_module, "join", lambda made=made, **_: made):
            critic = Critic(
                str(root / "untied"), CriticConfig(value_clip=10.0), LearnerConfig(shard=True), rank=own, world=world
            )
        results[f"critic, {shares} x {context}"] = critic_result(critic, critic_batch(shares, context)[own])
    torch.save(results, root / f"results.{world}.{own}")
    os._exit(0)


def run_group(world: int, root: Path, every: bool = False) -> list[int | None]:
    """Runs the cases in `world` processes, which leave their results in `root`; the exit code of each."""
    return run_ranks(_entry, world, root, every, preload=["cispo.policies.dense.model"])
