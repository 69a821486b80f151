"""Process group, mesh and device of the learner ranks; the only file that makes groups.

One world of ranks, two views of it, the last axis of each the fastest:

    dense    (dp_replicate, dp_shard, cp)       the batch: dp shares, each with cp ranks; FSDP over dp_shard x cp
    sparse   (dp_replicate, edp, ep, etp)       the experts: edp * ep * etp = dp_shard * cp; FSDP over edp

No other file of the learner but `sharding` knows whether this is a CPU or a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cispo.ops.collectives import Group
from cispo.runtime.network import LOOPBACK, host_and_port, open_store
from cispo.types import MicroBatch

_MEETING = timedelta(minutes=10)

TIMEOUT = timedelta(hours=2)
"""Longest wait of a rank for another one in a collective. The watchdog of the run speaks before that, and knows in
which step each rank is; of a rank that has died the others learn at once."""


@dataclass(slots=True)
class Collective:
    """The step in which this rank is at the moment, for the watchdog: another rank may be missing in it."""

    step: str = ""
    since: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The ranks that train one model, from the view of one of them.

    Sizes and coordinates are arithmetic and need no group. Each rank has a whole copy of the model, or a share of it
    where there is an axis for `shards`; only then can there be axes for experts.

    Example: Mesh(rank=3, world=4, cp=2, ep=2, etp=2) has dp_rank 1, cp_rank 1, edp_rank 0, ep_rank 1, etp_rank 1
    """

    rank: int = 0
    world: int = 1
    cp: int = 1
    """Context parallelism: ranks that read one micro-batch together, neighbours by number."""
    ep: int = 1
    """Expert parallelism: ranks between which the experts of a layer are distributed, E / ep each."""
    etp: int = 1
    """Expert tensor parallelism: ranks that cut the width I of the same experts, I / etp each; neighbours by number."""
    device: torch.device = torch.device("cpu")
    host: str = LOOPBACK
    """Address of rank 0's machine."""
    shards: DeviceMesh | None = None
    """The axis dp_shard x cp, along which parameters are split; None where each rank has them whole."""
    cp_group: ProcessGroup | None = None
    """The `cp` ranks of this rank's share of the batch, in order; None where cp is 1."""
    expert_group: ProcessGroup | None = None
    """The ep x etp ranks that hold one set of experts, in order, etp the faster axis; None where that is 1."""
    expert_shards: DeviceMesh | None = None
    """The axis edp, along which one rank's experts are split; None where ep x etp is 1."""
    collective: Collective = field(default_factory=Collective)

    @property
    def dp(self) -> int:
        """Shares of a batch."""
        return self.world // self.cp

    @property
    def dp_rank(self) -> int:
        """Number of this rank's share of a batch."""
        return self.rank // self.cp

    @property
    def cp_rank(self) -> int:
        """This rank's place among the ranks that read the same micro-batch."""
        return self.rank % self.cp

    @property
    def context(self) -> Group | None:
        """The ranks that read the same micro-batch; None where this one reads its own."""
        return None if self.cp_group is None else Group(self.cp_group, self.cp_rank, self.cp)

    @property
    def experts(self) -> Group | None:
        """The ranks that hold one set of experts; None where each rank has all."""
        if self.expert_group is None:
            return None
        return Group(self.expert_group, self.rank % self.expert_ranks, self.expert_ranks)

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one set of experts: ep x etp."""
        return self.ep * self.etp

    @property
    def edp(self) -> int:
        """Sets of experts that see different tokens; their gradients are summed."""
        return self.world // self.expert_ranks

    @property
    def edp_rank(self) -> int:
        """Number of this rank's set of experts."""
        return self.rank // self.expert_ranks

    @property
    def ep_rank(self) -> int:
        """Number of this rank's share of the experts."""
        return self.rank // self.etp % self.ep

    @property
    def etp_rank(self) -> int:
        """Number of this rank's share of its experts' width."""
        return self.rank % self.etp

    def of_rank(self, rank: int) -> Mesh:
        """The same mesh from the view of another rank, for its coordinates: without groups."""
        return Mesh(rank=rank, world=self.world, cp=self.cp, ep=self.ep, etp=self.etp, device=self.device)

    @contextmanager
    def doing(self, step: str) -> Iterator[None]:
        """A block with collectives of all ranks; `waiting_in` names it while it lasts."""
        self.collective.step, self.collective.since = step, time.monotonic()
        try:
            yield
        finally:
            self.collective.step = ""

    def waiting_in(self) -> str:
        """The open step with its age, "" where there is none; may be asked from another thread."""
        step, since = self.collective.step, self.collective.since
        return f"{step} (for {time.monotonic() - since:.0f} s)" if step else ""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, in one collective."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def leave(self) -> None:
        """Ends this rank's membership in the process group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def release_memory(self) -> None:
        """Returns cached memory of torch's allocator to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def shards(wanted: Literal["auto"] | bool, *, ranks: int, device: str, expert_ranks: int = 1) -> bool:
    """Whether a model is split over `ranks` of a device ("cpu" or "cuda"), given the recipe's `learner.shard`.

    `auto` splits on GPUs alone. There a copy a rank is the limit of the policy's size, and gathering a layer overlaps
    the layer before it. On a CPU memory is the host's and shared by its ranks, so that a gathered layer is only work.
    Experts that are distributed over `expert_ranks` above 1 are one of its cases, on any device.
    """
    return ranks > 1 and (device == "cuda" or expert_ranks > 1 if wanted == "auto" else wanted)


def join(
    *,
    rank: int,
    world: int,
    device: torch.device,
    address: str,
    shard: bool = False,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
) -> Mesh:
    """Enters the process group at `address` (tcp://host:port of rank 0's machine): gloo on a CPU, nccl on a GPU.

    `shard` gives the mesh an axis for shards, `cp`, `ep` and `etp` are the sizes of further axes.
    """
    host, port = host_and_port(address, 0) if address else (LOOPBACK, 0)
    if world == 1:
        return Mesh(rank=rank, device=device, host=host)
    if rank == 0:
        store = open_store(host, port, world, timeout=_MEETING)
    else:
        store = TCPStore(host, port, world, False, timeout=_MEETING)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    if device.type == "cuda" and (shard or cp > 1):
        torch.cuda.set_device(device.index or 0)  # a mesh would choose the device by the rank
    return with_axes(Mesh(rank=rank, world=world, device=device, host=host), shard=shard, cp=cp, ep=ep, etp=etp)


def with_axes(mesh: Mesh, *, shard: bool, cp: int = 1, ep: int = 1, etp: int = 1) -> Mesh:
    """The mesh of all ranks with axes of these sizes and their groups; every rank must call it."""
    assert mesh.world % cp == 0 and mesh.world % (ep * etp) == 0, "the axes do not divide the ranks"
    assert shard or ep * etp == 1, "experts are distributed over shards"
    kind, world, expert_ranks = mesh.device.type, mesh.world, ep * etp
    shards = init_device_mesh(kind, (world,), mesh_dim_names=("dp_shard",)) if shard else None
    cp_group = expert_group = expert_shards = None
    if cp > 1:
        cp_group = init_device_mesh(kind, (world // cp, cp), mesh_dim_names=("dp", "cp")).get_group("cp")
    if expert_ranks > 1:
        sparse = init_device_mesh(kind, (world // expert_ranks, expert_ranks), mesh_dim_names=("edp", "ep_etp"))
        expert_group, expert_shards = sparse.get_group("ep_etp"), sparse["edp"]
    return replace(
        mesh,
        cp=cp,
        ep=ep,
        etp=etp,
        shards=shards,
        cp_group=cp_group,
        expert_group=expert_group,
        expert_shards=expert_shards,
    )


def to_device(mb: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on the device, itself on a CPU; copies to a GPU do not block the host."""
    if device.type == "cpu":
        return mb
    values = {field.name: getattr(mb, field.name) for field in fields(mb)}
    moved = {k: v.pin_memory().to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
    return replace(mb, **moved)
