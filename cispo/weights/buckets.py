"""Weights in buckets: flat buffers on a device that learner and engines share or copy, one after another.

    learner   state --pack--> bucket 0 | bucket 1 | ...      each at most `bucket_bytes`, or one larger tensor
              cuda_ipc    a handle to the buffer, for processes on the same GPU
              broadcast   the buffer itself, through a group of its own: nccl between GPUs, gloo between CPUs
              direct      the buffer itself, in the same process
    engine    bucket --unpack--> (name, tensor) ... --> the model

The buffer is used again for the next bucket: the learner waits until every engine has taken one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, ProcessGroupGloo

from cispo.runtime.network import host_and_port, in_url, open_store

Transport = Literal["cuda_ipc", "broadcast", "direct"]

BUCKET_BYTES = 1 << 30

# Every tensor starts where any dtype may be viewed; a checksum reads rows of this many bytes.
_ALIGNMENT = 256
_ROW = 4096

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in a bucket.

    Example: Slot("model.norm.weight", "bfloat16", (576,), 0)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """In bytes."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def of(self, buffer: Tensor) -> Tensor:
        """The view of `buffer` [bytes] uint8 that this slot is."""
        part = buffer[self.offset : self.offset + self.bytes]
        return part.view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """The slots of one bucket, and its size in bytes."""

    slots: tuple[Slot, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketMessage:
    """What an engine is told about one bucket."""

    bucket: Bucket
    handles: Mapping[str, tuple[Any, ...]] | None = None
    """cuda_ipc: by the GPU's uuid, how to open the buffer there."""
    buffer: Tensor | None = None
    """direct: the buffer."""
    checksum: int | None = None
    """Of the bytes, where asked for."""


def plan_buckets(state: Mapping[str, Tensor], bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Cuts the weights into buckets, in order."""
    buckets, slots, end = [], [], 0
    for name, tensor in state.items():
        slot = Slot(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end)
        if slots and end + slot.bytes > bucket_bytes:
            buckets.append(Bucket(tuple(slots), _rounded(end, _ROW)))
            slots, slot = [], Slot(slot.name, slot.dtype, slot.shape, 0)
        slots.append(slot)
        end = _rounded(slot.offset + slot.bytes, _ALIGNMENT)
    return [*buckets, Bucket(tuple(slots), _rounded(end, _ROW))]


def _rounded(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def unpack(bucket: Bucket, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
    return ((slot.name, slot.of(buffer)) for slot in bucket.slots)


def checksum(buffer: Tensor) -> int:
    """Of [bytes] uint8, a multiple of 4096: 64-bit words summed in rows, rows weighted by odd numbers, modulo 2^64."""
    rows = buffer.view(torch.int64).view(-1, _ROW // 8).sum(1)
    return int((rows * (2 * torch.arange(len(rows), device=rows.device) + 1)).sum())


class WeightSender:
    """A learner's side: fills buckets from the weights and offers them."""

    def __init__(self, state: Mapping[str, Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
        """`state` holds views of the weights, under checkpoint names: their values now are what is sent."""
        self.state = state
        self.buckets = plan_buckets(state, bucket_bytes)
        device = next(iter(state.values())).device
        size = max(bucket.bytes for bucket in self.buckets)
        # Zeros, so that the gaps between tensors have the same checksum on both sides.
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self._group: BroadcastGroup | None = None

    def stage(self, number: int, transport: Transport, *, check: bool = False) -> BucketMessage:
        """Fills the buffer with a bucket and says how to get at it."""
        bucket = self.buckets[number]
        targets = [slot.of(self.buffer) for slot in bucket.slots]
        with torch.no_grad():
            for target, slot in zip(targets, bucket.slots, strict=True):
                target.copy_(self.state[slot.name])
        part = self.buffer[: bucket.bytes]
        if part.is_cuda:
            torch.cuda.synchronize(part.device)
        return BucketMessage(
            bucket=bucket,
            handles=_handles(self.buffer) if transport == "cuda_ipc" else None,
            buffer=part if transport == "direct" else None,
            checksum=checksum(part) if check else None,
        )

    def open_group(self, host: str, world: int) -> str:
        """Opens the meeting place of a broadcast group; returns its address."""
        self._group = BroadcastGroup.open(host, world, self.buffer.device)
        return self._group.address

    def join_group(self) -> None:
        assert self._group is not None, "open_group comes first"
        self._group.join()

    def broadcast(self, number: int) -> None:
        """Sends the staged bucket; returns when every engine has it."""
        assert self._group is not None, "open_group comes first"
        self._group.broadcast(self.buffer[: self.buckets[number].bytes])


def _handles(buffer: Tensor) -> dict[str, tuple[Any, ...]]:
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(buffer)
    return {gpu_uuid(buffer.device): arguments}


def gpu_uuid(device: torch.device) -> str:
    """The same in every process, whatever number it gives the GPU."""
    return str(torch.cuda.get_device_properties(device).uuid)


class WeightReceiver:
    """An engine's side: gets at the bytes of a bucket."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._opened: dict[tuple[Any, ...], Tensor] = {}
        self._group: BroadcastGroup | None = None
        self._buffer: Tensor | None = None

    def join_group(self, address: str, rank: int, world: int) -> None:
        self._group = BroadcastGroup.at(address, rank, world, self.device)
        self._group.join()

    def receive(self, message: BucketMessage) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a bucket, valid until the next one. Raises RuntimeError where its checksum differs."""
        buffer = self._bytes(message)
        if message.checksum is not None and checksum(buffer) != message.checksum:
            raise RuntimeError(f"a bucket of weights ({message.bucket.bytes} bytes) arrived damaged")
        return unpack(message.bucket, buffer)

    def _bytes(self, message: BucketMessage) -> Tensor:
        if message.buffer is not None:
            return message.buffer
        if message.handles is not None:
            return self._open(message.handles)[: message.bucket.bytes]
        assert self._group is not None, "the engine is not in the broadcast group"
        if self._buffer is None or len(self._buffer) < message.bucket.bytes:
            self._buffer = torch.empty(message.bucket.bytes, dtype=torch.uint8, device=self.device)
        self._group.broadcast(self._buffer[: message.bucket.bytes])
        return self._buffer[: message.bucket.bytes]

    def _open(self, handles: Mapping[str, tuple[Any, ...]]) -> Tensor:
        """The learner's buffer on this GPU; opened once, as long as it stays where it is."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        uuid = gpu_uuid(self.device)
        assert uuid in handles, f"no learner shares GPU {uuid}"
        arguments = list(handles[uuid])
        arguments[6] = self.device.index or 0  # the learner's number of the GPU need not be ours
        # The memory's handle and the place in it; the rest counts references and is new each time.
        key = (arguments[7], arguments[9])
        if key not in self._opened:
            self._opened = {key: rebuild_cuda_tensor(*arguments)}
        return self._opened[key]

    def close(self) -> None:
        self._opened.clear()
        self._group = None


class BroadcastGroup:
    """The learner (rank 0) and all workers of all engines, apart from torch's default group."""

    def __init__(self, store: TCPStore, rank: int, world: int, device: torch.device) -> None:
        self.store, self.rank, self.world, self.device = store, rank, world, device
        self._group: ProcessGroup | Any = None

    @classmethod
    def open(cls, host: str, world: int, device: torch.device) -> BroadcastGroup:
        return cls(open_store(host, 0, world, timeout=_TIMEOUT), 0, world, device)

    @classmethod
    def at(cls, address: str, rank: int, world: int, device: torch.device) -> BroadcastGroup:
        host, port = host_and_port(address, 0)
        return cls(TCPStore(host, port, world, False, timeout=_TIMEOUT), rank, world, device)

    @property
    def address(self) -> str:
        return f"tcp://{in_url(self.store.host)}:{self.store.port}"

    def join(self) -> None:
        """Returns once all ranks are here."""
        store = PrefixStore("weights", self.store)
        if self.device.type == "cuda":
            from torch.distributed.distributed_c10d import ProcessGroupNCCL  # where torch has CUDA

            self._group = ProcessGroupNCCL(store, self.rank, self.world, ProcessGroupNCCL.Options())
        else:
            self._group = ProcessGroupGloo(store, self.rank, self.world, _TIMEOUT)

    def broadcast(self, buffer: Tensor) -> None:
        self._group.broadcast(buffer, 0).wait()
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)


def merged(messages: Sequence[BucketMessage]) -> BucketMessage:
    """One message from those of all learner ranks, each of which offers its own GPU's buffer."""
    first = messages[0]
    if first.handles is None:
        return first
    handles = {uuid: handle for m in messages if m.handles for uuid, handle in m.handles.items()}
    return BucketMessage(bucket=first.bucket, handles=handles, checksum=first.checksum)
