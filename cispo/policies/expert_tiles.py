"""Tiles of vLLM's grouped products for few tokens, by card and shape, as `scripts/tune_experts.py` finds them.

vLLM has files of tuned tiles for the experts of well-known models; other shapes get one rule for all, which is
vLLM's choice here too where the table has no entry.
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


CARDS: dict[str, dict[ExpertShape, dict[int, ExpertTiles]]] = {}
"""By the largest number of tokens of a pass, ascending."""


def expert_tiles(card: str, shape: ExpertShape, tokens: int) -> ExpertTiles | None:
    """Tiles for a pass of so many tokens; None where vLLM's own choice is as good, or was not compared."""
    found = CARDS.get(card, {}).get(shape, {})
    return next((tiles for most, tiles in found.items() if tokens <= most), None)
