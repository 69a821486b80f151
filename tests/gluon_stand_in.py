"""Plain Python in place of Gluon, which has no interpreter: a kernel's arithmetic, indices and masks on a CPU.

Programs run one after the other, copies and products at once: waits and barriers do nothing, so races need a GPU.
Shared memory begins as NaN, so that a value nobody wrote shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Pointer:
    """A place in the storage of a tensor, or a tensor of places."""

    def __init__(self, storage: Tensor, offset: Any) -> None:
        self.storage, self.offset = storage, offset
        self.dtype = SimpleNamespace(element_ty=storage.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.storage, self.offset + offset)


class Integer(int):
    """A scalar of a kernel: an int with `to`."""

    def to(self, dtype: object) -> Integer:
        return self

    def __add__(self, other: Any) -> Any:
        return _scalar(int(self) + other)

    def __sub__(self, other: Any) -> Any:
        return _scalar(int(self) - other)

    def __mul__(self, other: Any) -> Any:
        return _scalar(int(self) * other)

    def __floordiv__(self, other: int) -> Any:
        return _scalar(int(self) // other)

    def __mod__(self, other: int) -> Any:
        return _scalar(int(self) % other)


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = values.shape

    def index(self, place: int) -> Shared:
        return Shared(self.values[place])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.values.permute(*order))

    def _reinterpret(self, dtype: object, shape: Sequence[int], layout: object) -> Shared:
        """Another tile at the same place."""
        return Shared(self.values.flatten()[: math.prod(shape)].view(*shape))

    def load(self, layout: object) -> Tensor:
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        self.values.copy_(values)


class Descriptor:
    """A matrix in global memory by tiles: reads beyond it are zero, writes beyond it are dropped."""

    def __init__(
        self, base: Pointer, shape: Sequence[int], strides: Sequence[int], block_shape: Sequence[int], layout: object
    ) -> None:
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape

    def places(self, corner: Sequence[int]) -> tuple[Tensor, Tensor]:
        row, column = (first + torch.arange(size) for first, size in zip(corner, self.block_shape, strict=True))
        row, column = row[:, None], column[None, :]
        inside = (row >= 0) & (row < self.shape[0]) & (column >= 0) & (column < self.shape[1])
        return self.base.offset + row * self.strides[0] + column * self.strides[1], inside


def kernel_of(file: Path, name: str) -> Callable[..., None]:
    """The kernel of a file, to be called once a program with arguments of `argument`."""
    text = file.read_text()
    code = text[text.index("\n@gluon.") :]
    code = re.sub(r"@gluon\.\w+\n", "", code)
    code = code.replace(": gl.constexpr", "")
    names: dict[str, Any] = {
        "gl": _language(),
        "tma": SimpleNamespace(
            make_tensor_descriptor=Descriptor,
            async_copy_global_to_shared=_read,
            async_copy_shared_to_global=_write,
            store_wait=_nothing,
        ),
        "mbarrier": SimpleNamespace(
            **dict.fromkeys(("MBarrierLayout", "init", "expect", "wait", "invalidate"), _nothing)
        ),
        "fence_async_shared": _nothing,
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda outstanding, deps: deps[0],
    }
    exec(compile(code, str(file), "exec"), names)
    return names[name]


class Launcher:
    """`kernel[grid](arguments, num_warps=..., constants)`, as Triton launches."""

    def __init__(self, file: Path, name: str) -> None:
        self.kernel = kernel_of(file, name)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: object, num_warps: int, **constants: object) -> None:
            language = self.kernel.__globals__["gl"]
            language.num_warps = lambda: num_warps
            for program in range(grid[0]):
                language.program_id = lambda axis, program=program: Integer(program)
                self.kernel(*map(_argument, arguments), **constants)

        return launch


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        size = value.untyped_storage().nbytes() // value.element_size()
        return Pointer(value.as_strided((size,), (1,), 0), value.storage_offset())
    return Integer(value) if isinstance(value, int) else value


def _scalar(value: Any) -> Any:
    return Integer(value) if isinstance(value, int) else value


def _nothing(*arguments: object, **options: object) -> None:
    pass


def _read(tiles: Descriptor, corner: Sequence[int], barrier: object, place: Shared, pred: bool = True) -> None:
    if pred:
        offsets, inside = tiles.places(corner)
        place.values.copy_(torch.where(inside, tiles.base.storage[offsets * inside], 0.0))


def _write(tiles: Descriptor, corner: Sequence[int], place: Shared) -> None:
    offsets, inside = tiles.places(corner)
    tiles.base.storage[offsets[inside]] = place.values[inside]


def _product(a: Any, b: Shared, sums: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Tensor:
    product = (a.values if isinstance(a, Shared) else a).float() @ b.values.float()
    return sums + product if use_acc else product


def _load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Any:
    if mask is not None:
        return torch.where(mask, pointer.storage[pointer.offset * mask], other)
    return _scalar(pointer.storage[int(pointer.offset)].item())


def _store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
    offsets, values, mask = torch.broadcast_tensors(pointer.offset, values, mask)
    pointer.storage[offsets[mask]] = values[mask]


def _either(of_tensors: Callable[..., Tensor], of_scalars: Callable[..., int]) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return of_tensors(torch.as_tensor(a), torch.as_tensor(b))
        return Integer(of_scalars(a, b))

    return apply


def _language() -> SimpleNamespace:
    def where(condition: Any, a: Any, b: Any) -> Any:
        return torch.where(condition, a, b) if isinstance(condition, Tensor) else (a if condition else b)

    return SimpleNamespace(
        **dict.fromkeys(("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout"), _nothing),
        NVMMASharedLayout=SimpleNamespace(get_default_for=_nothing),
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        arange=lambda first, end, layout: torch.arange(first, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(
            torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype)
        ),
        static_range=range,
        load=_load,
        store=_store,
        where=where,
        maximum=_either(torch.maximum, max),
        minimum=_either(torch.minimum, min),
        exp=lambda x: torch.exp(torch.as_tensor(x, dtype=torch.float32)),
        sum=lambda values, axis: Integer(values.sum()),
        convert_layout=lambda values, layout: values,
        thread_barrier=_nothing,
    )
