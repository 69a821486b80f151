"""A kind of linear attention as a record: one recurrence in the two forms that a policy needs.

    packed    [T, ...] of packed documents -> outputs [T, ...], final states [S, ...]     forward pass, prompts
    step      [S, ...], one token a sequence; states [S, ...] in place -> outputs         decoding

`attention.Attention.recurrent` runs any of them: a new kind adds a record beside its op (`lightning.LIGHTNING`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentOp:
    """Both forms take the layer's inputs first, in one order."""

    token_inputs: int
    """How many inputs, from the first, have a row a token; the others are the layer's: decay slopes, say."""
    packed: Callable[..., tuple[Tensor, Tensor | None]]
    """(*inputs, cu_seqlens [S + 1] int32, output_final_state=False) -> outputs, final states or None.

    Documents may be empty. States have one shape a layer, at least float32, and are zero before the first token.
    """
    step: Callable[..., Tensor]
    """(*inputs, states) -> outputs: sequence i has its token in row i and its state in states[i]."""
    across: Literal["decay", "window", "heads"]
    """The coupling of the pieces of a document that ranks split.

    decay     the state: each token multiplies it by e^{-s}, s the layer's only input, and adds k^T v
    window    the last inputs, as many as the state has
    heads     nothing: heads are independent, and outputs have the third input's shape
    """
