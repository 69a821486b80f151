"""Device and process group of a learner rank: the one place that knows whether this is a CPU or a GPU."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cispo.types import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One rank's place among the data-parallel learners.

    Example: Ranks(rank=0, world=2, device=torch.device("cpu"))
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, in one collective."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a recipe's `device` key names; auto takes a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def join(*, rank: int, world: int, device: torch.device, address: str) -> Ranks:
    """Enters the process group at `address` (tcp://host:port): gloo on a CPU, nccl on a GPU."""
    if world > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=address,
            rank=rank,
            world_size=world,
            timeout=timedelta(minutes=10),
        )
    return Ranks(rank=rank, world=world, device=device)


def leave(ranks: Ranks) -> None:
    if ranks.world > 1 and dist.is_initialized():
        dist.destroy_process_group()


def to_device(mb: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on the device; itself on a CPU. A GPU gets them without being waited for."""
    if device.type == "cpu":
        return mb
    columns = {field.name: getattr(mb, field.name) for field in fields(mb)}
    moved = {k: v.pin_memory().to(device, non_blocking=True) for k, v in columns.items() if isinstance(v, Tensor)}
    return replace(mb, **moved)


def host_address() -> str:
    """This machine's address, as other machines of a cluster reach it; loopback where it has no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing: it asks for the route
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def release_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
