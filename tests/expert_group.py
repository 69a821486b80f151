"""Ranks of `test_expert_parallel`: cases that gloo groups of 2 and 4 processes run, each on meshes of its own.

parent  run_experts(world, folders) --> processes, each: every case on every mesh --torch.save--> {name: result}
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from cispo.batch.packing import pack
from cispo.learner import critic as critic_module
from cispo.learner import learner as learner_module
from cispo.learner import parallel
from cispo.learner.adapters import Adapters
from cispo.learner.critic import Critic
from cispo.learner.learner import Learner
from cispo.learner.rank import Rank
from cispo.learner.rows import Rows, rows_of
from cispo.policies.replay import routers_of
from cispo.recipe.schema import Critic as CriticConfig
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Lora
from cispo.types import MicroBatch
from tests.rank_group import run_ranks
from tests.shard_group import BUCKET, F64, LR, SEQUENCE, TOKEN
from tests.test_learner import samples


class Axes(NamedTuple):
    """Ranks, and the sizes of the axes for experts and of that for context; edp and dp are what is left."""

    world: int
    ep: int
    etp: int
    cp: int = 1


MESHES = [Axes(2, 2, 1), Axes(2, 1, 2), Axes(4, 4, 1), Axes(4, 1, 4), Axes(4, 2, 2), Axes(4, 2, 1), Axes(4, 1, 2)]
EP2, ETP2, EP4, ETP4, BOTH, EP2_TWICE, ETP2_TWICE = MESHES
EVERY_FORM = [Axes(4, 2, 1, cp=2), Axes(4, 1, 2, cp=2), Axes(4, 4, 1, cp=2), Axes(4, 2, 2, cp=2), Axes(4, 2, 2, cp=4)]
MESHES += [Axes(2, 2, 1, cp=2), Axes(2, 1, 2, cp=2), *EVERY_FORM]
LORA = Adapters(lora=Lora(rank=2, alpha=4.0), seed=3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch's loss and gradient on some meshes."""

    folder: str
    dtype: Any = F64
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the learner."""
    objective: Any = TOKEN
    count: int = 13
    routes: bool = False
    """Every token replays experts 0 and 1, so that the others have no token."""
    lora: bool = False
    meshes: Sequence[Axes] = (BOTH,)

    def config(self, axes: Axes | None) -> LearnerConfig:
        own = {}
        if axes is not None:
            own = {"expert_parallel": axes.ep, "expert_tensor_parallel": axes.etp, "context_parallel": axes.cp}
        return LearnerConfig(shard="auto", **{**self.options, **own})

    def batch(self, axes: Axes | None = None, layers: int = 0) -> list[list[MicroBatch]]:
        """[ranks][micro-batches]; where ranks share a micro-batch, long samples are in pieces."""
        world, _, _, cp = axes or Axes(1, 1, 1)
        given = samples(self.count)
        if self.routes:
            given = [replace(s, routes=torch.tensor([0, 1]).expand(len(s.token_ids) - 1, layers, 2)) for s in given]
        sizes = {"max_tokens": 16, "tokens_per_micro_batch": 40 // cp, "ranks": world // cp, "context": cp}
        share = bool(self.options.get("share_prompts"))
        return pack(given, reduction="prompt", share_prompts=share, **sizes)  # type: ignore[arg-type]


AUX = {"router_aux_coef": 0.5}
CHECKPOINTED = {**AUX, "gradient_checkpointing": True}
CASES = {
    # ep 2 is at most k: tokens are gathered; ep 4 is above it: rows are exchanged.
    "hybrid": Case(folder="hybrid", options=AUX, meshes=[EP2, ETP2, EP4, BOTH, EP2_TWICE, EVERY_FORM[3]]),
    "hybrid, recomputed": Case(folder="hybrid", options=CHECKPOINTED, objective=SEQUENCE, meshes=[EVERY_FORM[0]]),
    "hybrid float32": Case(folder="hybrid", dtype="float32", options=AUX),
    # One expert a token: rows are exchanged at any ep, with etp too.
    "one expert a token": Case(folder="one", options=CHECKPOINTED, meshes=[EP2, BOTH]),
    "one expert a token, float32": Case(folder="one", dtype="float32", options=AUX, meshes=[EP2]),
    "experts without tokens": Case(folder="hybrid", options=CHECKPOINTED, routes=True, meshes=[EP4]),
    "ranks without a sample": Case(folder="one", options={**AUX, "share_prompts": True}, count=1),
    "biased sigmoid router": Case(folder="minimax_m2", options={**AUX, "router_bias_rate": 0.01}, meshes=[EP2]),
    "groups of experts": Case(folder="deepseek_v3", dtype="float32", meshes=[ETP2]),
    "shared expert": Case(folder="qwen3_next", options=CHECKPOINTED, meshes=[EP2]),
    "adapter": Case(folder="hybrid", lora=True, meshes=[EP2]),
}
RUNS, PASSES, TRANSFERS = (BOTH,), (ETP2,), (EP2, ETP2, BOTH, EP2_TWICE)
CHECKPOINTS = {"float32": (BOTH, EP2), "bfloat16": (EP2_TWICE, ETP2)}
WRITTEN = (BOTH, EP2_TWICE)
"""Meshes of which the others of their number format read a checkpoint."""


def held(own: Rank, values: Sequence[Tensor] | None = None) -> dict[str, Rows]:
    """This rank's part of every parameter, or of tensors of the same shapes."""
    rows = {name: rows_of(p, own.mesh) for name, p in zip(own.optimizer.names, own.optimizer.parameters, strict=True)}
    given = [r.values for r in rows.values()] if values is None else values
    return {n: Rows(r.shape, r.first, v.clone(), r.share) for (n, r), v in zip(rows.items(), given, strict=True)}


def joined(parts: Sequence[Mapping[str, Rows]]) -> dict[str, Tensor]:
    """Whole tensors from the parts of all ranks; NaN where no rank has an element."""
    found = {}
    for name, first in parts[0].items():
        whole = first.values.new_full(first.shape, torch.nan)
        for rows in (part[name] for part in parts):
            place = whole[rows.first : rows.first + len(rows.values)]
            if rows.share is None:
                place.copy_(rows.values)
            else:
                rows.share.put(rows.values, place)
        found[name] = whole
    return found


@dataclass
class Group:
    """One process of a group, on one mesh after another; a world of 1 is the parent."""

    own: int
    world: int
    root: Path

    def learner(
        self, folder: str | Path, config: LearnerConfig, dtype: Any = "float32", *, lora: bool = False
    ) -> Learner:
        options = {"rank": self.own, "world": self.world, "adapters": LORA if lora else None}
        made = Learner(str(self.root / folder), config, dtype=dtype, **options)
        made.export.bucket_bytes = BUCKET
        return made

    def gradient(self, case: Case, axes: Axes | None = None) -> Any:
        """Loss, balancing loss, gradients, norm and the weights after the step."""
        learner = self.learner(case.folder, case.config(axes), case.dtype, lora=case.lora)
        own = case.batch(axes, len(routers_of(learner.policy)))[self.own]
        result = learner.forward_backward(own, case.objective)
        slopes = held(learner.rank, learner.rank.optimizer.gradients())
        logprobs = [values[mb.loss_mask] for mb, values in zip(own, learner.logprobs(own), strict=True)]
        return result.loss, result.aux_loss, slopes, learner.rank.step(LR)[0], torch.cat(logprobs)

    def run(self, folder: str, axes: Axes | None, dtype: Any, count: int) -> Any:
        """Norms of some steps, and the weights after them."""
        learner = self.learner(folder, CASES["hybrid"].config(axes), dtype)
        own = CASES["hybrid"].batch(axes)[self.own]
        return [learner.update(own, TOKEN, lr=LR).grad_norm for _ in range(count)], held(learner.rank)

    def passes(self, axes: Axes | None) -> Any:
        """Logprobs of policy and references, and values of a critic that starts from published weights."""
        config = CASES["hybrid"].config(axes)
        learner = self.learner("hybrid", config)
        own = CASES["hybrid"].batch(axes)[self.own]
        learner.freeze_reference()
        learner.update(own, TOKEN, lr=LR)
        found = [learner.logprobs(own), learner.logprobs(own, reference=True)]
        learner.load_reference(str(self.root / "one of another seed"))
        found.append(learner.logprobs(own, reference=True))
        folder = self.root / f"published {axes}"
        folder.mkdir(exist_ok=True)
        path = learner.publish(str(folder), 7)
        self.wait()
        options = {"rank": self.own, "world": self.world}
        critic = Critic(str(self.root / "hybrid"), CriticConfig(value_clip=10.0), config, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            head = rows_of(critic.model.head.weight, critic.rank.mesh).values
            head.copy_(torch.linspace(-1, 1, critic.model.head.weight.numel()).view(1, -1)[: len(head)])
        critic.load_backbone(path)
        return [*found, critic.values(own)], path

    def transfers(self, folder: str, axes: Axes | None, dtype: Any, *, lora: bool = False) -> list[int | None]:
        """Checksum of every staged bucket; twice, so that gaps hold the bytes of earlier buckets in any group."""
        learner = self.learner(folder, CASES["hybrid"].config(axes), dtype, lora=lora)
        for _ in range(2):
            sums = [learner.stage_bucket(n, "direct", check=True).checksum for n in range(learner.num_buckets())]
        return sums

    def checkpoints(self, axes: Axes, dtype: Any) -> Any:
        """A step after a checkpoint and one from it; copies of the checkpoints that other meshes wrote."""
        config = CASES["hybrid"].config(axes)
        own, to = CASES["hybrid"].batch(axes)[self.own], self.root / f"from {axes} {dtype}"
        learner = self.learner("hybrid", config, dtype)
        learner.update(own, TOKEN, lr=LR)
        self.save(learner, to)
        learner.update(own, TOKEN, lr=LR)
        resumed = self.learner(to, config, dtype)
        resumed.restore(str(to))
        resumed.update(own, TOKEN, lr=LR)
        for name in (f"from 1 {dtype}", *(f"from {other} {dtype}" for other in WRITTEN)):
            if (self.root / name / "config.json").exists() and self.root / name != to:
                copied = self.learner(name, config, dtype)
                copied.restore(str(self.root / name))
                self.save(copied, self.root / f"{name} by {axes}")
        return held(learner.rank), held(resumed.rank)

    def save(self, learner: Learner, folder: Path) -> None:
        (folder / "training").mkdir(parents=True, exist_ok=True)
        learner.start_save(str(folder))
        assert learner.saved(wait=True)
        self.wait()

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def meshes_of(base: parallel.Mesh) -> Iterator[None]:
    """A block in which learners and critics of a process join the group that it is in, with axes of their own."""
    known: dict[tuple[int, int, int], parallel.Mesh] = {}

    def join(*, ep: int = 1, etp: int = 1, cp: int = 1, **_: object) -> parallel.Mesh:
        if (ep, etp, cp) not in known:
            known[ep, etp, cp] = parallel.with_axes(base, shard=True, ep=ep, etp=etp, cp=cp)
        return known[ep, etp, cp]

    with mock.patch.object(learner_module, "join", join), mock.patch.object(critic_module, "join", join):
        yield


def _entry(own: int, world: int, root: Path, address: str, thorough: bool) -> None:
    torch.set_num_threads(1)
    with mock.patch.object(parallel, "TIMEOUT", parallel.timedelta(seconds=120)):
        base = parallel.join(rank=own, world=world, device=torch.device("cpu"), address=address)
    group = Group(own, world, root)
    results: dict[str, Any] = {}
    with meshes_of(base):
        for axes in (axes for axes in MESHES if axes.world == world):
            for name, case in CASES.items():
                if thorough or axes in case.meshes:
                    results[f"{name} {axes}"] = group.gradient(case, axes)
            if thorough or axes in TRANSFERS:
                results[f"transfer hybrid {axes}"] = group.transfers("hybrid", axes, "float32")
            if thorough or axes in RUNS:
                results[f"run {axes}"] = group.run("hybrid", axes, F64, 3)
            if thorough or axes in PASSES:
                results[f"passes {axes}"] = group.passes(axes)
                results[f"transfer qwen3_next {axes}"] = group.transfers("qwen3_next", axes, "bfloat16")
                results[f"transfer adapter {axes}"] = group.transfers("hybrid", axes, "float32", lora=True)
            for dtype, meshes in CHECKPOINTS.items():
                if thorough or axes in meshes:
                    results[f"checkpoint {dtype} {axes}"] = group.checkpoints(axes, dtype)
    results["seconds"] = time.process_time()
    torch.save(results, root / f"experts.{world}.{own}")
    os._exit(0)


def run_experts(world: int, root: Path, *, thorough: bool = False) -> list[int | None]:
    """Runs the cases in `world` processes, which leave their results in `root`; the exit code of each.

    `thorough`: every case on every mesh.
    """
    return run_ranks(_entry, world, root, thorough, timeout=1200)
