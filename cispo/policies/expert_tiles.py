"""Tiles of vLLM's grouped products of a decode step, by card and shape, as `scripts/tune_experts.py` finds them.

vLLM has files of tuned tiles for the experts of well-known models; other shapes get one rule for all, which is
vLLM's choice here too where the table has no entry. Up to `ops.experts.FEW_TOKENS` tokens no product is vLLM's.
"""

from __future__ import annotations

from typing import NamedTuple


class ExpertShape(NamedTuple):
    """Experts of one MoE layer, or the rank's share of each."""

    experts: int
    hidden: int
    width: int
    top_k: int


class ExpertTiles(NamedTuple):
    """A program's rows of one expert, output columns and columns summed at a time; its warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def config(self) -> dict[str, int]:
        """As vLLM names them."""
        rows, columns, depth, warps, stages = self
        blocks = {"BLOCK_SIZE_M": rows, "BLOCK_SIZE_N": columns, "BLOCK_SIZE_K": depth, "GROUP_SIZE_M": 1, "SPLIT_K": 1}
        return blocks | {"num_warps": warps, "num_stages": stages}


CARDS: dict[str, dict[ExpertShape, dict[int, ExpertTiles]]] = {
    "NVIDIA H200": {
        # recipes/long_context: 0.83 of the time that vLLM's own choice takes
        ExpertShape(8, 2048, 1408, 2): {512: ExpertTiles(128, 128, 64, 8, 3)},
        # recipes/lightning_30m: 0.91
        ExpertShape(8, 512, 256, 2): {128: ExpertTiles(32, 64, 64, 8, 3)},
    },
}
"""By the number of tokens at which they were found."""


def expert_tiles(card: str, shape: ExpertShape, tokens: int) -> ExpertTiles | None:
    """Tiles found at so many tokens or up to twice as many; None where vLLM's own are as good, or were not compared."""
    found = CARDS.get(card, {}).get(shape, {})
    return next((tiles for at, tiles in found.items() if at // 2 < tokens <= at), None)
