"""The states of sequences in the slots of an engine's cache, in plain torch."""

from __future__ import annotations

from math import prod

from torch import Tensor


def read_states(cache: Tensor, slots: Tensor, fresh: Tensor | None = None) -> Tensor:
    """A copy of the states in `slots`, [S, ...]; zero where `fresh` [S] is True, even if the slot holds NaN.

    cache [N, ...], dense but for its first stride; slots [S] of any integer dtype.
    """
    rows = _rows(cache).index_select(0, slots.long())
    if fresh is not None:
        rows = rows.masked_fill(fresh[:, None], 0)
    return rows.view(len(slots), *cache.shape[1:])


def write_states(cache: Tensor, slots: Tensor, states: Tensor) -> None:
    """Stores states [S, ...] in distinct `slots`, in the cache's dtype."""
    _rows(cache).index_copy_(0, slots.long(), states.to(cache.dtype).flatten(1))


def _rows(states: Tensor) -> Tensor:
    # One row a state: torch copies rows several times faster than blocks. A view, or an error.
    return states.view(len(states), prod(states.shape[1:]))
