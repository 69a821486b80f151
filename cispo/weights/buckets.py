"""Weights in buckets: flat buffers on a device that learner and engines share or copy, one after another.

    learner   WeightSender      state --pack--> bucket 0 | bucket 1 | ...    each at most `bucket_bytes`, or one tensor
              cuda_ipc          a handle to the buffer, for processes on the same GPU
              broadcast         the buffer itself, through a group of its own: nccl between GPUs, gloo between CPUs
              direct            the buffer itself, in the same process
    engine    WeightReceiver    bucket --unpack--> (name, tensor) ... --> the model (`vllm_receiver`)

One buffer serves all buckets: the learner fills it again once every engine has taken the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from cispo.runtime.network import host_and_port, in_url, open_store

Transport = Literal["cuda_ipc", "broadcast", "direct"]

IpcHandle: TypeAlias = tuple[object, ...]
"""Arguments of torch's `rebuild_cuda_tensor`, which opens a buffer of another process on the same GPU."""

BUCKET_BYTES = 1 << 30

# Bytes. A multiple of the alignment can be viewed as any dtype; a checksum reads whole rows.
_ALIGNMENT = 256
_ROW = 4096

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Slot:
    """Place of one tensor in a bucket.

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
        """This slot's view of `buffer` [bytes] uint8."""
        part = buffer[self.offset : self.offset + self.bytes]
        return part.view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """The slots of one bucket, and its size in bytes."""

    slots: tuple[Slot, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketMessage:
    """One bucket, as announced to an engine."""

    bucket: Bucket
    handles: Mapping[str, IpcHandle] | None = None
    """cuda_ipc: the buffer of each GPU, by the GPU's uuid."""
    buffer: Tensor | None = None
    """direct: the buffer."""
    checksum: int | None = None
    """Checksum of the bytes, where asked for."""


def plan_buckets(state: Mapping[str, Tensor], bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Packs the weights into buckets of at most `bucket_bytes`, in order; a larger tensor has a bucket of its own."""
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
    """Names and tensors of a bucket, as views of its `buffer` [bytes] uint8."""
    return ((slot.name, slot.of(buffer)) for slot in bucket.slots)


def checksum(buffer: Tensor) -> int:
    """Checksum of [bytes] uint8, a multiple of 4096.

    Sum modulo 2^64 of the 64-bit words, those of row r of 4096 bytes weighted by 2 r + 1.
    """
    rows = buffer.view(torch.int64).view(-1, _ROW // 8).sum(1)
    return int((rows * (2 * torch.arange(len(rows), device=rows.device) + 1)).sum())


def tensor_checksum(tensor: Tensor) -> int:
    """Checksum of a tensor's bytes, on its device."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return checksum(torch.nn.functional.pad(flat, (0, -len(flat) % _ROW)))


class Source(Protocol):
    """Weights under checkpoint names, wherever they are."""

    @property
    def device(self) -> torch.device: ...

    @property
    def shapes(self) -> Mapping[str, Tensor]:
        """Tensors of the weights' shapes and number formats; their values are not read."""
        ...

    def fill(self, slots: Sequence[Slot], buffer: Tensor) -> None:
        """Writes the weights of the slots into `buffer` [bytes] uint8, as they are at the moment."""
        ...


class WholeWeights:
    """A `Source` of weights that are whole on this device."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """`state` holds views of the weights under checkpoint names."""
        self.shapes = state
        self.device = next(iter(state.values())).device

    @torch.no_grad()
    def fill(self, slots: Sequence[Slot], buffer: Tensor) -> None:
        for slot in slots:
            slot.of(buffer).copy_(self.shapes[slot.name])


class WeightSender:
    """The learner's side: fills buckets from the weights and offers them."""

    def __init__(self, weights: Mapping[str, Tensor] | Source, bucket_bytes: int = BUCKET_BYTES) -> None:
        """`weights` are a source, or views of whole weights; `stage` copies the values of its moment.

        Where the source gathers from several ranks, all of them call `fill`, `stage` and `pieces` alike.
        """
        self.source = WholeWeights(weights) if isinstance(weights, Mapping) else weights
        self.buckets = plan_buckets(self.source.shapes, bucket_bytes)
        size = max(bucket.bytes for bucket in self.buckets)
        # Zeros, so that the gaps between tensors have the same checksum on both sides.
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=self.source.device)
        self._group: BroadcastGroup | None = None

    def fill(self, number: int) -> Tensor:
        """Copies a bucket's tensors into the buffer; returns its filled part, [bytes] uint8."""
        bucket = self.buckets[number]
        self.source.fill(bucket.slots, self.buffer)
        return self.buffer[: bucket.bytes]

    def pieces(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(number, weights by name) of every bucket, views of the buffer that the next bucket overwrites."""
        for number, bucket in enumerate(self.buckets):
            yield number, dict(unpack(bucket, self.fill(number)))

    def stage(self, number: int, transport: Transport, *, check: bool = False) -> BucketMessage:
        """Copies a bucket's tensors into the buffer; returns the message that announces it to the engines."""
        bucket, part = self.buckets[number], self.fill(number)
        if part.is_cuda:
            torch.cuda.synchronize(part.device)
        return BucketMessage(
            bucket=bucket,
            handles=_handles(self.buffer) if transport == "cuda_ipc" else None,
            buffer=part if transport == "direct" else None,
            checksum=checksum(part) if check else None,
        )

    def open_group(self, host: str, world: int) -> str:
        """Opens the store at which a broadcast group of `world` ranks meets; returns its address."""
        self._group = BroadcastGroup.open(host, world, self.buffer.device)
        return self._group.address

    def join_group(self) -> None:
        assert self._group is not None, "open_group comes first"
        self._group.join()

    def broadcast(self, number: int) -> None:
        """Sends the staged bucket; returns when every engine has it."""
        assert self._group is not None, "open_group comes first"
        self._group.broadcast(self.buffer[: self.buckets[number].bytes])


def _handles(buffer: Tensor) -> dict[str, IpcHandle]:
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(buffer)
    return {gpu_uuid(buffer.device): arguments}


def gpu_uuid(device: torch.device) -> str:
    """The GPU's identity in every process; device numbers differ between processes."""
    return str(torch.cuda.get_device_properties(device).uuid)


class WeightReceiver:
    """An engine's side: opens or copies the bytes of each announced bucket."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._opened: dict[IpcHandle, Tensor] = {}
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

    def _open(self, handles: Mapping[str, IpcHandle]) -> Tensor:
        """The learner's buffer on this GPU; opened again only where the learner has moved it."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        uuid = gpu_uuid(self.device)
        assert uuid in handles, f"no learner shares GPU {uuid}"
        arguments = list(handles[uuid])
        arguments[6] = self.device.index or 0  # the learner's process may number the GPUs differently
        # The memory's handle and the offset in it; the rest counts references and is new each time.
        key = (arguments[7], arguments[9])
        if key not in self._opened:
            self._opened = {key: rebuild_cuda_tensor(*arguments)}
        return self._opened[key]

    def close(self) -> None:
        self._opened.clear()
        self._group = None


class BroadcastGroup:
    """A process group of the learner (rank 0) and all workers of all engines, apart from torch's default group."""

    def __init__(self, store: TCPStore, rank: int, world: int, device: torch.device) -> None:
        self.store, self.rank, self.world, self.device = store, rank, world, device
        self._group: Any = None  # torch's type stubs give no broadcast to the group of a backend

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
        """Returns once all ranks have joined."""
        store = PrefixStore("weights", self.store)
        if self.device.type == "cuda":
            from torch.distributed.distributed_c10d import ProcessGroupNCCL  # where torch has CUDA

            self._group = ProcessGroupNCCL(store, self.rank, self.world, ProcessGroupNCCL.Options())
        else:
            self._group = ProcessGroupGloo(store, self.rank, self.world, _TIMEOUT)

    def broadcast(self, buffer: Tensor) -> None:
        """Copies rank 0's `buffer` to all ranks' and returns once this rank has it."""
        self._group.broadcast(buffer, 0).wait()
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)


def merged(messages: Sequence[BucketMessage]) -> BucketMessage:
    """Merges the messages of all learner ranks, each with its own GPU's buffer, into one."""
    first = messages[0]
    if first.handles is None:
        return first
    handles = {uuid: handle for m in messages if m.handles for uuid, handle in m.handles.items()}
    return BucketMessage(bucket=first.bucket, handles=handles, checksum=first.checksum)
