"""AdamW's moments between two steps: in float32 or in 8 bits, on the device or in host memory.

    at rest                        --take, a piece of the parameters at a time-->   in a step
    float32                                                                         exp_avg, exp_avg_sq in float32
    codes uint8, scale float32 of each 64 numbers: exp_avg, sqrt(exp_avg_sq)        on the device

A step is torch's own AdamW in float32 either way, and its moments are rounded after it. The codes are those of
block-wise dynamic quantization (arXiv 2110.02861), as in torchao and bitsandbytes: a number is off by at most 0.71 % of
the largest of its block, a second moment's root by 0.36 %. Two departures keep steps bounded with any epsilon. The root
of the second moment is stored, which spans half as many powers of ten; and it is taken to be at least

    v >= m^2 / bound,    bound = (1 - b1)^2 / ((1 - b2) (1 - b1^2 / b2))

which exact moments always fulfil (Cauchy-Schwarz). Otherwise a number of which the second moment was rounded to zero
and the first was not would move by 1 / epsilon; so |m| / sqrt(v) is at most sqrt(bound), 1.17 with the default betas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from cispo.learner.offload import host_like

BLOCK = 64
"""Numbers with a common scale. It divides the rows of nearly every matrix, so that a row has scales of its own."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_CODES, _SCALE = "_codes", "_scale"
# Blocks that are rounded at a time.
_SLICE = 1 << 18
ROUNDING_BYTES = 12 * BLOCK * _SLICE
"""Memory of the rounding: scaled numbers, their places among the levels, and codes."""


class LowBit(NamedTuple):
    """A tensor [..., n] in 8 bits."""

    codes: Tensor
    """[..., n] uint8."""
    scale: Tensor
    """[..., n / BLOCK] float32: the largest absolute value of each block."""

    def to(self, device: torch.device) -> LowBit:
        """A copy on a device."""
        return LowBit(*(part.to(device, non_blocking=True, copy=True) for part in self))


Resting = Tensor | LowBit


def moment_bytes(shape: Sequence[int], *, low: bool) -> int:
    """Bytes of both moments of a parameter of that shape."""
    count = math.prod(shape)
    if low and _in_blocks(shape):
        return 2 * (count + 4 * count // BLOCK)
    return 8 * count


def _in_blocks(shape: Sequence[int]) -> bool:
    return len(shape) > 1 and shape[-1] % BLOCK == 0


def largest_square(betas: tuple[float, float]) -> float:
    """The largest m^2 / v over all gradients; beta1^2 must be below beta2."""
    first, second = betas
    return (1 - first) ** 2 / ((1 - second) * (1 - first**2 / second))


class Moments:
    """The moments in an optimizer's own state, in their form at rest."""

    def __init__(
        self,
        state: MutableMapping[Tensor, MutableMapping[str, Resting]],
        *,
        betas: tuple[float, float],
        low_bit: bool,
        host: bool,
    ) -> None:
        self._state, self._betas, self._low_bit, self._host = state, betas, low_bit, host
        self._places: dict[tuple[Parameter, str], Resting] = {}
        """Memory of the host, which is the same in every step: to pin it takes long."""

    def is_low(self, master: Parameter) -> bool:
        """Whether a parameter's moments are kept in 8 bits: those of matrices with rows of whole blocks."""
        return self._low_bit and _in_blocks(master.shape)

    @contextmanager
    def in_use(self, masters: Sequence[Parameter]) -> Iterator[None]:
        """A block in which the state has the parameters' moments in float32 on their device.

        A copy to the host is complete once the current stream is.
        """
        for master in masters:
            if _MOMENTS[0] in self._state[master]:
                self._take(master)
        yield
        for master in masters:
            if _MOMENTS[0] in self._state[master]:
                self._put_down(master)

    @torch.no_grad()
    def _take(self, master: Parameter) -> None:
        own = self._state[master]
        first, second = (self._in_float(own[name], master, signed=name == _MOMENTS[0]) for name in _MOMENTS)
        if self.is_low(master):
            second = torch.maximum(second.square_(), first.square().div_(largest_square(self._betas)))
        own.update(zip(_MOMENTS, (first, second), strict=True))

    def _in_float(self, resting: Resting, master: Parameter, *, signed: bool) -> Tensor:
        if isinstance(resting, LowBit):
            return decoded(resting.to(master.device) if self._host else resting, signed=signed).to(master.dtype)
        return resting.to(master.device, non_blocking=True, copy=True) if self._host else resting

    @torch.no_grad()
    def _put_down(self, master: Parameter) -> None:
        own = self._state[master]
        for name in _MOMENTS:
            values = own[name]
            assert isinstance(values, Tensor)
            if self.is_low(master):
                signed = name == _MOMENTS[0]
                own[name] = self._home(master, name, encoded(values if signed else values.sqrt(), signed=signed))
            else:
                own[name] = self._home(master, name, values)

    def _home(self, master: Parameter, name: str, resting: Resting) -> Resting:
        """The same on the host, if that is where moments rest."""
        if not self._host:
            return resting
        if isinstance(resting, LowBit):
            place = self._places.setdefault((master, name), LowBit(*map(host_like, resting)))
            for own, part in zip(place, resting, strict=True):
                own.copy_(part, non_blocking=part.is_cuda)
            return place
        place = self._places.setdefault((master, name), host_like(resting))
        assert isinstance(place, Tensor)
        return place.copy_(resting, non_blocking=resting.is_cuda)

    def stored(self, master: Parameter) -> dict[str, Tensor]:
        """A parameter's entries of the state as tensors: moments at rest and the count of steps."""
        found: dict[str, Tensor] = {}
        for name, value in self._state[master].items():
            if isinstance(value, LowBit):
                found |= {name + _CODES: value.codes, name + _SCALE: value.scale}
            else:
                found[name] = value
        return found

    @torch.no_grad()
    def restore(self, master: Parameter, entries: Mapping[str, Tensor]) -> bool:
        """Sets a parameter's entries from a result of `stored`; False where they are another parameter's.

        Moments that are stored in 8 bits and rest in float32, or the reverse, are converted.
        """
        own = self._state[master]
        for entry, value in entries.items():
            name = entry.removesuffix(_CODES)
            if entry == "step":
                own[entry] = value.to(master.device, copy=True)
            elif name in _MOMENTS:
                if value.shape != master.shape:
                    return False
                own[name] = self._home(master, name, self._resting(master, name, entries))
        return True

    def _resting(self, master: Parameter, name: str, entries: Mapping[str, Tensor]) -> Resting:
        signed, device = name == _MOMENTS[0], master.device
        if name in entries:
            values = entries[name].to(device, copy=True)
            return encoded(values if signed else values.sqrt(), signed=signed) if self.is_low(master) else values
        low = LowBit(entries[name + _CODES], entries[name + _SCALE]).to(device)
        if self.is_low(master):
            return low
        values = decoded(low, signed=signed).to(master.dtype)
        return values if signed else values.square_()


def encoded(values: Tensor, *, signed: bool) -> LowBit:
    """A tensor [..., n] in 8 bits, n a multiple of BLOCK; ties go up."""
    levels = _levels(values.device, signed=signed)
    between = (levels[1:] + levels[:-1]) / 2
    scale = torch.empty(*values.shape[:-1], values.shape[-1] // BLOCK, device=values.device)
    low = LowBit(torch.empty(values.shape, dtype=torch.uint8, device=values.device), scale)
    codes, scales, flat = low.codes.view(-1, BLOCK), low.scale.view(-1), values.float().reshape(-1, BLOCK)
    for rows in _slices(len(flat)):
        scales[rows] = flat[rows].abs().amax(1)
        # A block of zeros has no largest value to divide by.
        scaled = flat[rows] / scales[rows, None].clamp(min=torch.finfo(torch.float32).tiny)
        codes[rows] = torch.bucketize(scaled, between, out_int32=True, right=True).to(torch.uint8)
    return low


def decoded(low: LowBit, *, signed: bool) -> Tensor:
    """The float32 tensor [..., n] of its codes."""
    levels = _levels(low.codes.device, signed=signed)
    values = torch.empty(low.codes.shape, device=low.codes.device)
    codes, scales, flat = low.codes.view(-1, BLOCK), low.scale.view(-1), values.view(-1, BLOCK)
    for rows in _slices(len(flat)):
        torch.mul(levels[codes[rows].int()], scales[rows, None], out=flat[rows])
    return values


def _slices(blocks: int) -> Iterator[slice]:
    return (slice(start, start + _SLICE) for start in range(0, blocks, _SLICE))


@cache
def _levels(device: torch.device, *, signed: bool) -> Tensor:
    """[256] float32, rising: the number of each code in a block with largest absolute value 1.

    A power of ten below it, from 1 to 1e-6, has twice as many equally spaced levels as the next smaller one.
    """
    levels = [0.0, 1.0]
    for power in range(7):
        count = 2**power if signed else 2 ** (power + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        positive = (10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += positive + ([-level for level in positive] if signed else [])
    return torch.tensor(sorted(levels), device=device)
