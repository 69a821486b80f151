"""Tiles of lightning attention's kernels by card, pass, dtype and head dimension."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Pass = Literal["out", "dq", "dk_dv"]


class Tiles(NamedTuple):
    """A program's tokens a chunk, block of value dims, warps, pipeline stages; programs a multiprocessor.

    `overlapped`: in the kernel of `lightning_overlap`, for Hopper and bfloat16, with blocks of at least 64.
    """

    chunk: int
    block: int
    warps: int
    stages: int
    resident: int
    overlapped: bool = False


# By padded head dimension, measured on an H100. float32 products run on the ordinary units, out of registers: larger
# tiles would spill.
TILES = {
    torch.bfloat16: {
        16: Tiles(64, 16, 4, 3, 2),
        32: Tiles(64, 32, 4, 3, 2),
        64: Tiles(64, 64, 4, 3, 1),
        128: Tiles(64, 64, 4, 3, 1),
        256: Tiles(32, 64, 8, 3, 1),
    },
    torch.float32: {
        16: Tiles(16, 16, 4, 1, 2),
        32: Tiles(16, 32, 4, 1, 2),
        64: Tiles(16, 32, 4, 1, 2),
        128: Tiles(16, 16, 8, 1, 1),
        256: Tiles(16, 16, 8, 1, 1),
    },
}

# dk and dv: their programs are neighbours and read the same rows, and two on a multiprocessor beat a deeper pipeline.
_PAIRED = Tiles(64, 64, 4, 2, 2)

CARDS: dict[str, dict[tuple[Pass, int], Tiles]] = {
    "H200": {
        ("out", 64): Tiles(64, 64, 4, 3, 2),
        ("dq", 64): Tiles(64, 64, 4, 3, 2),
        ("dk_dv", 64): Tiles(64, 64, 4, 4, 1, overlapped=True),
        ("out", 128): Tiles(64, 64, 4, 3, 1, overlapped=True),
        ("dq", 128): Tiles(64, 64, 4, 3, 1, overlapped=True),
        ("dk_dv", 128): Tiles(64, 128, 8, 3, 1, overlapped=True),
        ("out", 256): Tiles(64, 128, 8, 2, 1, overlapped=True),
        ("dq", 256): Tiles(64, 128, 8, 2, 1, overlapped=True),
        ("dk_dv", 256): Tiles(64, 128, 8, 2, 1, overlapped=True),
    },
}
"""By a part of the device's name, for bfloat16: other tiles by pass and padded head dimension, measured with
`scripts/tune_lightning.py`."""


def tiles_of(card: str, kind: Pass, dtype: torch.dtype, padded: int) -> Tiles:
    """`card` is the device's name, "" for tiles of any card; `padded` the head dimension, a power of 2 from 16 on."""
    if dtype == torch.bfloat16:
        for name, own in CARDS.items():
            if name in card and (kind, padded) in own:
                return own[kind, padded]
        if kind == "dk_dv" and padded == 128:
            return _PAIRED
    return TILES[dtype][padded]
