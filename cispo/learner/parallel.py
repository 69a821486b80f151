"""Process group and device of the learner ranks; no other file of the learner knows whether this is a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from cispo.runtime.network import LOOPBACK, host_and_port, open_store
from cispo.types import MicroBatch

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The ranks that train one model, from the view of one of them: all data-parallel, each with a whole copy.

    Example: Mesh(rank=0, world=2, device=torch.device("cpu"))
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    host: str = LOOPBACK
    """Address of rank 0's machine."""

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


def join(*, rank: int, world: int, device: torch.device, address: str) -> Mesh:
    """Enters the process group at `address` (tcp://host:port of rank 0's machine): gloo on a CPU, nccl on a GPU."""
    host, port = host_and_port(address, 0) if address else (LOOPBACK, 0)
    if world > 1:
        if rank == 0:
            store = open_store(host, port, world, timeout=_TIMEOUT)
        else:
            store = TCPStore(host, port, world, False, timeout=_TIMEOUT)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    return Mesh(rank=rank, world=world, device=device, host=host)


def to_device(mb: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on the device, itself on a CPU; copies to a GPU do not block the host."""
    if device.type == "cpu":
        return mb
    values = {field.name: getattr(mb, field.name) for field in fields(mb)}
    moved = {k: v.pin_memory().to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
    return replace(mb, **moved)
