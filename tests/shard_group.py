"""Ranks of `test_sharding`: the cases that gloo groups of 2 and 4 processes run, and the same on one rank.

parent  run_group(world, folders) --> processes, each: every case --torch.save--> {case: result} of each rank
        whole_gradients, ...      --> one rank's result, in the parent's process
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cispo.algorithms import ALGORITHMS
from cispo.algorithms.losses import Cispo
from cispo.algorithms.objective import Objective
from cispo.batch.packing import pack
from cispo.learner import critic as critic_module
from cispo.learner import learner as learner_module
from cispo.learner import parallel, rank
from cispo.learner.critic import Critic
from cispo.learner.learner import Learner
from cispo.learner.rank import Rank
from cispo.learner.sharding import rows_of
from cispo.recipe.schema import Critic as CriticConfig
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch, Sample
from tests.rank_group import run_ranks
from tests.test_learner import samples

Dtype = Literal["float32", "bfloat16"]
F64: Any = "float64"  # of tests alone: no recipe may ask for it

TOKEN = Objective(loss=Cispo(ratio_max=1.5))
SEQUENCE = Objective(loss=ALGORITHMS["gspo"].objective.loss)
BUCKET = 8192
LR = 1e-2


@dataclass(frozen=True)
class Case:
    """A batch's loss and gradient."""

    name: str
    folder: str
    dtype: Any = F64
    objective: Objective = TOKEN
    checkpointing: bool = False
    share_prompts: bool = False
    aux: float = 0.0
    count: int = 13
    worlds: tuple[int, ...] = (2, 4)

    @property
    def config(self) -> LearnerConfig:
        return LearnerConfig(
            shard=True,
            gradient_checkpointing=self.checkpointing,
            share_prompts=self.share_prompts,
            router_aux_coef=self.aux,
            router_aux_tokens="all" if self.share_prompts else "completion",
        )


CASES = [
    Case("hybrid", "untied", aux=0.5, checkpointing=True),
    Case("hybrid float32", "untied", dtype="float32", aux=0.5),
    Case("tied, sequences, shared prompts", "tied", objective=SEQUENCE, share_prompts=True, aux=0.5),
    Case("tied float32, sequences", "tied", dtype="float32", objective=SEQUENCE, checkpointing=True),
    Case("layers gathered together", "deep", aux=0.5, checkpointing=True, worlds=(2,)),
    Case("rows that ranks do not divide", "uneven", aux=0.5),
    Case("ranks without a micro-batch", "untied", aux=0.5, share_prompts=True, count=1),
    Case("stored buffers", "minimax_m2", aux=0.5, share_prompts=True, worlds=(2,)),
    Case("gated DeltaNet", "qwen3_next", aux=0.5, checkpointing=True, worlds=(2,)),
    Case("latent attention", "deepseek_v3", dtype="float32", objective=SEQUENCE, worlds=(2,)),
    Case("dense", "dense", checkpointing=True, share_prompts=True, worlds=(2,)),
    Case("dense, tied, float32", "dense tied", dtype="float32", objective=SEQUENCE, worlds=(2,)),
]


def prompts_shared(given: list[Sample]) -> list[Sample]:
    """The samples with one prompt a group: those of a micro-batch are then read once."""
    first: dict[int, Tensor] = {}
    made = []
    for s in given:
        prompt = first.setdefault(s.group_id, s.token_ids[: int((~s.loss_mask).sum())])
        values = {}
        for name in ("loss_mask", "rollout_logprobs", "advantages", "versions"):
            value = getattr(s, name)
            values[name] = torch.cat([value.new_zeros(len(prompt)), value[s.loss_mask]])
        made.append(replace(s, token_ids=torch.cat([prompt, s.token_ids[s.loss_mask]]), **values))
    return made


def batch(world: int, *, count: int = 13, share_prompts: bool = False) -> list[list[MicroBatch]]:
    given = prompts_shared(samples(count)) if share_prompts else samples(count)
    options = {"max_tokens": 16, "tokens_per_micro_batch": 40, "share_prompts": share_prompts}
    return pack(given, reduction="prompt", ranks=world, **options)  # type: ignore[arg-type]


def critic_batch(world: int) -> list[list[MicroBatch]]:
    given = [replace(s, values=s.rollout_logprobs / 9, returns=s.loss_mask * s.index.bit_count()) for s in samples()]
    return pack(given, reduction="token", max_tokens=16, tokens_per_micro_batch=40, ranks=world)


def gradients(own: Rank) -> dict[str, tuple[int, Tensor]]:
    """(first row, this rank's rows) of every gradient."""
    named = zip(own.optimizer.names, own.optimizer.parameters, own.optimizer.gradients(), strict=True)
    return {name: (rows_of(p, own.mesh).first, g.clone()) for name, p, g in named}


def weights(own: Rank) -> dict[str, tuple[int, Tensor]]:
    rows = {name: rows_of(p, own.mesh) for name, p in zip(own.optimizer.names, own.optimizer.parameters, strict=True)}
    return {name: (r.first, r.values.clone()) for name, r in rows.items()}


def joined(parts: list[dict[str, tuple[int, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors from the rows of all ranks."""
    names = parts[0]
    return {n: torch.cat([rows for _, rows in sorted((part[n] for part in parts), key=lambda r: r[0])]) for n in names}


def differ(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of all tensors; NaN stays."""
    assert ours.keys() == theirs.keys()
    scale = max(float(t.abs().max()) for t in theirs.values())
    assert scale > 1e-4
    return float(torch.stack([(ours[n] - t).abs().max() for n, t in theirs.items()]).max()) / scale


def new_critic(folder: Path, dtype: Dtype, own: int = 0, world: int = 1) -> Critic:
    made = Critic(
        str(folder), CriticConfig(value_clip=10.0), LearnerConfig(shard=True), dtype=dtype, rank=own, world=world
    )
    with torch.no_grad():  # a new head gives 0 everywhere, and no gradient to the backbone
        head = rows_of(made.model.head.weight, made.rank.mesh).values
        head.copy_(torch.linspace(-1, 1, made.model.head.weight.numel()).view(1, -1)[: len(head)])
    return made


class Allocations(TorchDispatchMode):
    """Bytes of new storages of all operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
                self.bytes += made.untyped_storage().nbytes()
        return result


@dataclass
class Group:
    """One process of a group, with the cases that it takes part in."""

    own: int
    world: int
    mesh: parallel.Mesh
    root: Path

    def learner(self, folder: str | Path, config: LearnerConfig | None = None, dtype: Dtype = "float32") -> Learner:
        config = config or LearnerConfig(shard=True)
        made = Learner(str(self.root / folder), config, dtype=dtype, rank=self.own, world=self.world)
        made.export.bucket_bytes = BUCKET
        return made

    def gradient(self, case: Case) -> tuple[float, float, dict[str, tuple[int, Tensor]]]:
        learner = self.learner(case.folder, case.config, case.dtype)
        own = batch(self.world, count=case.count, share_prompts=case.share_prompts)[self.own]
        result = learner.forward_backward(own, case.objective)
        return result.loss, result.aux_loss, gradients(learner.rank)

    def steps(self, dtype: Dtype, count: int) -> tuple[list[float], dict[str, tuple[int, Tensor]]]:
        learner = self.learner("untied", dtype=dtype)
        results = [learner.update(batch(self.world)[self.own], TOKEN, lr=LR) for _ in range(count)]
        return [r.grad_norm for r in results], weights(learner.rank)

    def values(self) -> Any:
        critic = new_critic(self.root / "untied", "float32", self.own, self.world)
        own = critic_batch(self.world)[self.own]
        before = critic.values(own)
        losses = self._critic_losses(critic, own)
        slopes = gradients(critic.rank)
        critic.rank.step(LR)
        return before, losses, slopes, critic.values(own)

    def _critic_losses(self, critic: Critic, own: list[MicroBatch]) -> float:
        return rank.total(critic.rank.backward(critic.rank.to_device(own), critic._loss))

    def references(self) -> Any:
        """Logprobs of policy and reference, before and after steps that a gathered root would hide."""
        learner = self.learner("untied")
        own = batch(self.world)[self.own]
        learner.freeze_reference()
        before = learner.logprobs(own)
        frozen = learner.logprobs(own, reference=True)
        with torch.no_grad():  # between two passes without gradient, as when a checkpoint is read
            for values in (
                rows.values for rows in map(lambda p: rows_of(p, self.mesh), learner.rank.optimizer.parameters)
            ):
                values.mul_(1.25)
        after = learner.logprobs(own)
        learner.load_reference(str(self.root / "untied other"))
        return before, frozen, after, learner.logprobs(own, reference=True), learner.logprobs(own)

    def far(self) -> list[Tensor]:
        """Logprobs in bfloat16 at positions from 3,000 on, where rounded rotary tables would be far off."""
        own = [replace(mb, positions=mb.positions + 3000) for mb in batch(self.world)[self.own]]
        return self.learner("untied", dtype="bfloat16").logprobs(own)

    def mixed(self) -> Any:
        """A bfloat16 policy with float32 decays and buffers: a step, its norm, the weights it sends and saves."""
        learner = self.learner("qwen3_next", dtype="bfloat16")
        own = batch(self.world)[self.own]
        before = learner.logprobs(own)
        norm = learner.update(own, TOKEN, lr=LR).grad_norm
        sent = [learner.stage_bucket(n, "broadcast", check=True).checksum for n in range(learner.num_buckets())]
        to = self.root / "mixed"
        self._save(learner, to)
        resumed = self.learner(to, dtype="bfloat16")
        resumed.restore(str(to))
        again = [resumed.stage_bucket(n, "broadcast", check=True).checksum for n in range(resumed.num_buckets())]
        return before, norm, sent, again

    def transfers(self, folder: str, dtype: Dtype) -> Any:
        """Checksum of every staged bucket, the bytes that staging allocates, and the published file's path."""
        learner = self.learner(folder, dtype=dtype)
        count = learner.num_buckets()
        with Allocations() as made:
            checks = [learner.stage_bucket(n, "broadcast", check=False) for n in range(count)]
        sums = [learner.stage_bucket(n, "broadcast", check=True).checksum for n in range(count)]
        target = self.root / f"published {self.world} {dtype}"
        target.mkdir(exist_ok=True)
        return sums, made.bytes / max(c.bucket.bytes for c in checks), learner.publish(str(target), 7), count

    def checkpoints(self, dtype: Dtype) -> Any:
        """A step after a checkpoint and one from it, which are the same; a copy of the checkpoint of one rank."""
        own, to = batch(self.world)[self.own], self.root / f"from {self.world} {dtype}"
        learner = self.learner("untied", dtype=dtype)
        for _ in range(2):
            learner.update(own, TOKEN, lr=LR)
        self._save(learner, to)
        learner.update(own, TOKEN, lr=LR)
        resumed = self.learner(to, dtype=dtype)
        resumed.restore(str(to))
        resumed.update(own, TOKEN, lr=LR)
        other = self.root / f"from 1 {dtype}"
        copied = self.learner(other, dtype=dtype)
        copied.restore(str(other))
        self._save(copied, self.root / f"from 1 by {self.world} {dtype}")
        return weights(learner.rank), weights(resumed.rank)

    def _save(self, learner: Learner, folder: Path) -> None:
        """Ends when every rank has written its part, as the driver waits for all learners."""
        (folder / "training").mkdir(parents=True, exist_ok=True)
        learner.start_save(str(folder))
        assert learner.saved(wait=True)
        dist.barrier()

    def hang(self) -> str:
        """The step that rank 0 names while rank 1 stays away."""
        learner = self.learner("untied")
        if self.own:
            time.sleep(3)
            return ""
        own = batch(self.world)[0]
        threading.Thread(target=learner.update, args=(own, TOKEN), kwargs={"lr": LR}, daemon=True).start()
        time.sleep(1.5)
        return learner.waiting_in()

    def killed(self, draft: Path) -> None:
        """Rank 1 is killed in the middle of its part of a checkpoint, the others end theirs."""
        learner = self.learner("untied")
        learner.update(batch(self.world)[self.own], TOKEN, lr=LR)
        kill = mock.patch.object(rank, "write_state", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with kill if self.own == 1 else mock.patch.object(time, "sleep"):
            learner.start_save(str(draft))
            assert learner.saved(wait=True)


def _entry(own: int, world: int, root: Path, address: str, draft: Path | None) -> None:
    torch.set_num_threads(1)
    with mock.patch.object(parallel, "TIMEOUT", parallel.timedelta(seconds=60)):
        mesh = parallel.join(rank=own, world=world, device=torch.device("cpu"), address=address, shard=True)
    group = Group(own, world, mesh, root)
    # One process group serves all learners of a process.
    with (
        mock.patch.object(learner_module, "join", lambda **_: mesh),
        mock.patch.object(critic_module, "join", lambda **_: mesh),
    ):
        if draft is not None:
            group.killed(draft)
            os._exit(0)
        results: dict[str, Any] = {c.name: group.gradient(c) for c in CASES if world in c.worlds}
        results["steps"] = group.steps(F64, 10)
        results["step float32"] = group.steps("float32", 1)
        results["critic"] = group.values()
        results["references"] = group.references()
        results["far"] = group.far()
        for folder in ("untied", "uneven", *(["dense tied"] if world == 2 else [])):
            results[f"transfer {folder}"] = group.transfers(folder, "float32")
        results["transfer bfloat16"] = group.transfers("untied", "bfloat16")
        if world == 2:
            results["mixed"] = group.mixed()
        for dtype in ("float32", "bfloat16"):
            results[f"checkpoint {dtype}"] = group.checkpoints(dtype)
        results["hang"] = group.hang() if world == 2 else ""
        torch.save(results, root / f"results.{world}.{own}")
    os._exit(0)  # a thread may still wait in a collective


def run_group(world: int, root: Path, draft: Path | None = None) -> list[int | None]:
    """Runs the cases in `world` processes, which leave their results in `root`; the exit code of each."""
    return run_ranks(_entry, world, root, draft, preload=["cispo.policies.dense.model"], timeout=300)
