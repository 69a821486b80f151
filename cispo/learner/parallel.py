"""Process group, mesh and device of the learner ranks; the only file that makes groups.

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
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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

    All are data-parallel, each with a whole copy, or with a share of it where there is an axis for `shards`.

    Example: Mesh(rank=0, world=2, device=torch.device("cpu"))
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    host: str = LOOPBACK
    """Address of rank 0's machine."""
    shards: DeviceMesh | None = None
    """The axis along which parameters are split, None where each rank has them whole."""
    collective: Collective = field(default_factory=Collective)

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


def shards(wanted: Literal["auto"] | bool, *, ranks: int, device: str) -> bool:
    """Whether a model is split over `ranks` of a device ("cpu" or "cuda"), given the recipe's `learner.shard`.

    `auto` splits on GPUs alone. There a copy a rank is the limit of the policy's size, and gathering a layer overlaps
    the layer before it. On a CPU memory is the host's and shared by its ranks, so that a gathered layer is only work.
    """
    return ranks > 1 and (device == "cuda" if wanted == "auto" else wanted)


def join(*, rank: int, world: int, device: torch.device, address: str, shard: bool = False) -> Mesh:
    """Enters the process group at `address` (tcp://host:port of rank 0's machine): gloo on a CPU, nccl on a GPU.

    `shard` gives the mesh an axis for shards.
    """
    host, port = host_and_port(address, 0) if address else (LOOPBACK, 0)
    axis = None
    if world > 1:
        if rank == 0:
            store = open_store(host, port, world, timeout=_MEETING)
        else:
            store = TCPStore(host, port, world, False, timeout=_MEETING)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        if shard:
            if device.type == "cuda":
                torch.cuda.set_device(device.index or 0)  # a mesh would choose the device by the rank
            axis = init_device_mesh(device.type, (world,), mesh_dim_names=("dp_shard",))
    return Mesh(rank=rank, world=world, device=device, host=host, shards=axis)


def to_device(mb: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on the device, itself on a CPU; copies to a GPU do not block the host."""
    if device.type == "cpu":
        return mb
    values = {field.name: getattr(mb, field.name) for field in fields(mb)}
    moved = {k: v.pin_memory().to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
    return replace(mb, **moved)
