"""Parts of whole tensors that ranks hold: consecutive rows, and of distributed experts also a part of the width.

whole [E, 2I, d] --ep--> E / ep of the rows --edp--> some of those --etp--> gate and up of I / etp  =  Rows.values
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from cispo.learner.parallel import Mesh
from cispo.policies.policy import Place


@dataclass(frozen=True, slots=True)
class WidthShare:
    """The part of one axis that a rank holds of the weights of distributed experts.

    The axis consists of equal blocks, each cut into `parts` equal parts, of which this is number `part`. Gate and up
    are two blocks of one axis.

    Example: WidthShare(axis=1, part=1, parts=2, blocks=2) of [E, 2I, d] is [E, I, d], the second halves of gate and up
    """

    axis: int
    part: int
    parts: int
    blocks: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """The part of a tensor with the whole axis: a view with one block, else a copy."""
        blocks = [block.chunk(self.parts, self.axis)[self.part] for block in whole.chunk(self.blocks, self.axis)]
        return blocks[0] if self.blocks == 1 else torch.cat(blocks, self.axis)

    def put(self, values: Tensor, whole: Tensor) -> None:
        """Writes the part into its places in the whole."""
        for own, block in zip(values.chunk(self.blocks, self.axis), whole.chunk(self.blocks, self.axis), strict=True):
            block.chunk(self.parts, self.axis)[self.part].copy_(own)

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole, from that of the part."""
        return tuple(size * self.parts if axis == self.axis else size for axis, size in enumerate(shape))

    def of_expert(self, shape: Sequence[int], part: int | None = None) -> tuple[slice, ...]:
        """Where the part, or another one, lies in one expert's gate, up or down projection of that shape."""
        axis = self.axis - 1
        size, number = shape[axis] // self.parts, self.part if part is None else part
        return (*(slice(None),) * axis, slice(number * size, (number + 1) * size))


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a tensor that is split along its first axis over the ranks.

    Example: Rows((41, 8), 11, values) with values [11, 8] on rank 1 of 4
    """

    shape: tuple[int, ...]
    """Of the whole tensor."""
    first: int
    """Index of the first row in the whole tensor."""
    values: Tensor
    share: WidthShare | None = None
    """Of distributed experts: the part of each row that is here."""

    @property
    def width(self) -> int:
        """Elements of a row of the whole."""
        return torch.Size(self.shape[1:]).numel()

    @property
    def split(self) -> bool:
        """Whether other ranks have further rows, or parts of these."""
        return self.shape != tuple(self.values.shape)

    @property
    def narrow(self) -> WidthShare | None:
        """The share, where rows are not whole."""
        return self.share if self.share is not None and self.share.parts > 1 else None

    def on_host(self) -> Rows:
        """A copy in host memory."""
        return Rows(self.shape, self.first, self.values.detach().to("cpu", copy=True), self.share)

    def overlap(self, start: int, stop: int) -> tuple[int, int]:
        """The part of the elements [start, stop) of the flat whole tensor that is in these rows; it may be empty."""
        first = self.first * self.width
        held = len(self.values) * self.width if self.values.dim() else 1
        return max(start, first), min(stop, first + held)


def is_split(tensor: Tensor | None) -> bool:
    """Whether ranks hold rows of a tensor."""
    return tensor is not None and _rows_in(tensor) is not None


def local(tensor: Tensor) -> Tensor:
    """The rows of a split tensor that this rank holds, in their own memory and without gradient; else the tensor."""
    rows = _rows_in(tensor)
    return (tensor if rows is None else rows).detach()


def _rows_in(tensor: Tensor) -> Tensor | None:
    """This rank's rows of a split tensor, None of any other."""
    if type(tensor) in (Tensor, Parameter):
        return None
    # Takes a second to import, which a rank with whole parameters need not wait for.
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else None


# Attribute of a parameter of distributed experts.
_SHARE = "expert_share"


def set_share(parameter: Tensor, share: WidthShare) -> None:
    """Notes which part of the experts' width a parameter of distributed experts has."""
    setattr(parameter, _SHARE, share)


def rows_of(tensor: Tensor, mesh: Mesh) -> Rows:
    """This rank's rows of a parameter or buffer: all of them where it is not split."""
    share: WidthShare | None = getattr(tensor, _SHARE, None)
    if share is not None:
        shape = share.whole_shape((len(tensor) * mesh.ep, *tensor.shape[1:]))
        return Rows(shape, expert_range(shape[0], mesh, mesh.rank)[0], local(tensor), share)
    first = row_range(len(tensor), mesh.rank, mesh.world)[0] if is_split(tensor) else 0
    return Rows(tuple(tensor.shape), first, local(tensor))


def row_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """The rows [first, last) of `rows` that a rank holds, as torch.chunk cuts them."""
    each = -(-rows // world)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def expert_range(experts: int, mesh: Mesh, rank: int) -> tuple[int, int]:
    """The experts [first, last) of which a rank of the mesh holds weights, all of them or a part of their width."""
    place, per_rank = mesh.of_rank(rank), experts // mesh.ep
    first, last = row_range(per_rank, place.edp_rank, mesh.edp)
    return place.ep_rank * per_rank + first, place.ep_rank * per_rank + last


def extent(place: Place, shape: Sequence[int]) -> tuple[int, int]:
    """The elements [start, stop) of the flat parameter of that shape which a checkpoint's tensor fills."""
    view = place.of(torch.empty(*shape, device="meta"))
    assert view.is_contiguous(), f"a tensor of {place.parameter} is no range of its elements"
    start = int(view.storage_offset())
    return start, start + view.numel()


def own_part(rows: Rows, place: Place) -> Tensor | None:
    """This rank's part of one expert's projection, a view of its rows; None where it holds none of that expert."""
    assert place.expert is not None
    number = place.expert - rows.first
    return place._replace(expert=number).of(rows.values) if 0 <= number < len(rows.values) else None


def state_rows(tensors: Mapping[str, Tensor], whole: Mapping[str, Rows]) -> dict[str, Rows]:
    """Tensors of an optimizer under "parameter/entry", each with its place in the whole; scalars are not split.

    A tensor may have a number for several of a row: the scales of moments in 8 bits.
    """
    found = {}
    for key, values in tensors.items():
        rows = whole[key.rpartition("/")[0]]
        held, own = rows.values.shape, values.shape
        if own == held and own:
            found[key] = Rows(rows.shape, rows.first, values, rows.share)
        elif len(own) > 1 and own[:-1] == held[:-1]:
            shape = (*rows.shape[:-1], rows.shape[-1] * own[-1] // held[-1])
            found[key] = Rows(shape, rows.first, values, rows.share)
        else:
            found[key] = Rows(tuple(own), 0, values)
    return found
