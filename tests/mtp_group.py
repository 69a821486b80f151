"""Ranks of `test_mtp_ranks`: learners with heads of multi-token prediction in gloo groups of 2 and 4 processes.

parent  run_group(world, folders) --> processes, each: every case --torch.save--> {case: Result} of each rank
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from cispo.batch.packing import pack
from cispo.learner import learner as learner_module
from cispo.learner import parallel
from cispo.learner.heads import Predictions
from cispo.learner.learner import Learner
from cispo.learner.optim import Optimizer
from cispo.learner.rank import Rank
from cispo.learner.rows import Rows, rows_of
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch
from tests.expert_group import Axes
from tests.rank_group import run_ranks
from tests.shard_group import BUCKET, F64, LR, TOKEN, prompts_shared
from tests.test_learner import samples


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch's gradient of heads on some meshes."""

    folder: str = "deepseek_v3"
    dtype: Any = F64
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the learner."""
    count: int = 13
    meshes: Sequence[Axes] = ()
    thorough: bool = True
    """Whether it runs behind the slow marker alone."""

    def config(self, axes: Axes) -> LearnerConfig:
        own = {"expert_parallel": axes.ep, "expert_tensor_parallel": axes.etp, "context_parallel": axes.cp}
        return LearnerConfig(**{"shard": True, **own, **self.options})

    def batch(self, axes: Axes) -> list[list[MicroBatch]]:
        """[ranks][micro-batches]; where ranks share a micro-batch, long samples are in pieces."""
        share = bool(self.options.get("share_prompts"))
        given = prompts_shared(samples(self.count)) if share else samples(self.count)
        sizes = {"max_tokens": 16, "tokens_per_micro_batch": 40 // axes.cp, "ranks": axes.world // axes.cp}
        return pack(given, reduction="prompt", share_prompts=share, context=axes.cp, **sizes)  # type: ignore[arg-type]


ALONE = Axes(1, 1, 1)
TWO, FOUR = Axes(2, 1, 1), Axes(4, 1, 1)
CP2, CP4, CP2_TWICE = Axes(2, 1, 1, cp=2), Axes(4, 1, 1, cp=4), Axes(4, 1, 1, cp=2)
EP2, ETP2, EP4, BOTH, EP2_CP2 = Axes(2, 2, 1), Axes(2, 1, 2), Axes(4, 4, 1), Axes(4, 2, 2), Axes(4, 2, 1, cp=2)
CASES = {
    "rows": Case(meshes=[TWO, FOUR]),
    "rows, shared prompts, recomputed": Case(
        folder="glm4_moe",
        options={"share_prompts": True, "gradient_checkpointing": True},
        meshes=[TWO, FOUR],
        thorough=False,
    ),
    "tied embedding": Case(folder="tied", options={"gradient_checkpointing": True}, meshes=[TWO]),
    "whole copies": Case(options={"shard": False}, meshes=[TWO, FOUR]),
    "a rank without a sample": Case(count=1, meshes=[TWO, FOUR]),
    "split documents": Case(meshes=[CP2, CP4, CP2_TWICE], thorough=False),
    "split documents, recomputed": Case(
        folder="glm4_moe", options={"share_prompts": True, "gradient_checkpointing": True}, meshes=[CP2, CP4]
    ),
    "split documents, an indexer": Case(folder="deepseek_v32", meshes=[CP4]),
    "one split document": Case(count=1, meshes=[CP2, CP4]),
    "experts": Case(meshes=[EP2, ETP2, EP4, BOTH], thorough=False),
    "experts, split documents, recomputed": Case(options={"gradient_checkpointing": True}, meshes=[EP2_CP2]),
}


class Result(NamedTuple):
    """One rank's report of a case."""

    predictions: Predictions
    gradients: dict[str, Rows]
    """Of the heads."""
    trunk: bool
    """Whether the policy's loss, gradients, norm and weights after two updates are those without heads, to the bit."""
    weights: dict[str, Rows]
    """Of the heads, after two updates."""
    sums: list[int | None]
    """Checksum of every bucket of weights for engines."""


def held(own: Rank, optimizer: Optimizer, values: Sequence[Tensor] | None = None) -> dict[str, Rows]:
    """This rank's part of an optimizer's parameters, or of tensors of the same shapes."""
    rows = {n: rows_of(p, own.mesh) for n, p in zip(optimizer.names, optimizer.parameters, strict=True)}
    given = [r.values for r in rows.values()] if values is None else values
    return {n: Rows(r.shape, r.first, v.clone(), r.share) for (n, r), v in zip(rows.items(), given, strict=True)}


def result_of(root: Path, name: str, axes: Axes, own: int = 0) -> Result:
    case = CASES[name]

    def learner(*, heads: bool, folder: Path = root / case.folder) -> Learner:
        options = {"dtype": case.dtype, "heads": heads, "rank": own, "world": axes.world, "temperature": 1.3}
        made = Learner(str(folder), case.config(axes), **options)  # type: ignore[arg-type]
        made.export.bucket_bytes = BUCKET
        return made

    mine, policies = case.batch(axes)[own], [learner(heads=heads) for heads in (False, True)]
    passes = [one.forward_backward(mine, TOKEN) for one in policies]
    slopes = [one.rank.optimizer.gradients() for one in policies]
    same = passes[0].loss == passes[1].loss and all(map(torch.equal, *slopes))
    rank = policies[1].rank
    assert rank.heads is not None and passes[1].predictions is not None
    gradients = held(rank, rank.heads, rank.heads.gradients())
    for one in policies:
        one.rank.step(LR)
    norms = [one.update(mine, TOKEN, lr=LR).grad_norm for one in policies]
    parts = [held(one.rank, one.rank.optimizer) for one in policies]
    same = same and norms[0] == norms[1]
    same = same and all(torch.equal(r.values, parts[1][n].values) for n, r in parts[0].items())
    policies[1].freeze_reference()
    references = policies[1].logprobs(mine, reference=True)
    same = same and all(map(torch.equal, policies[1].logprobs(mine), references))
    sent = policies[1]
    sums = [sent.stage_bucket(n, "direct", check=True).checksum for n in range(sent.num_buckets())]
    to = root / f"{name} {axes}"
    save(sent, to, axes)
    resumed = learner(heads=True, folder=to)
    resumed.restore(str(to))
    again = [one.update(mine, TOKEN, lr=LR).batch.predictions for one in (sent, resumed)]
    assert again[0] == again[1], "a resumed run is another"
    return Result(passes[1].predictions, gradients, same, held(rank, rank.heads), sums)


def save(learner: Learner, folder: Path, axes: Axes) -> None:
    """Ends when every rank has written its part."""
    (folder / "training").mkdir(parents=True, exist_ok=True)
    learner.start_save(str(folder))
    assert learner.saved(wait=True)
    if axes.world > 1:
        dist.barrier()


def meshes_of(case: Case, world: int, *, thorough: bool) -> list[Axes]:
    """The meshes of a group of that size on which a case runs."""
    own = [axes for axes in case.meshes if axes.world == world]
    return own if thorough else own[: 0 if case.thorough else 1]


def _entry(own: int, world: int, root: Path, address: str, thorough: bool) -> None:
    torch.set_num_threads(1)
    with mock.patch.object(parallel, "TIMEOUT", parallel.timedelta(seconds=60)):
        base = parallel.join(rank=own, world=world, device=torch.device("cpu"), address=address)
    known: dict[tuple[bool, int, int, int], parallel.Mesh] = {}

    def join(*, shard: bool, ep: int = 1, etp: int = 1, cp: int = 1, **_: object) -> parallel.Mesh:
        key = shard, ep, etp, cp
        if key not in known:
            known[key] = parallel.with_axes(base, shard=shard, ep=ep, etp=etp, cp=cp)
        return known[key]

    results: dict[str, Result] = {}
    with mock.patch.object(learner_module, "join", join):
        for name, case in CASES.items():
            for axes in meshes_of(case, world, thorough=thorough):
                results[f"{name} {axes}"] = result_of(root, name, axes, own)
    torch.save(results, root / f"results.{world}.{own}")
    os._exit(0)


def run_group(world: int, root: Path, *, thorough: bool) -> list[int | None]:
    """Runs the cases, all of them if `thorough`, in `world` processes, which leave their results in `root`; the exit
    code of each."""
    return run_ranks(_entry, world, root, thorough)
