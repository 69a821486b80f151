"""Keys and values that are made of latents where attention reads them, and once more for their gradient.

    latents [n, ...] --Expansion--> k [n, H, D], v [n, H, E]
    latents          --Recomputed--> the same in a backward pass, then the gradients of latents and weights
    q [T, H, D]      --Absorbed----> queries of the latents themselves, which are then keys and values of one head

A `torch.autograd.Function` gives gradients to its inputs alone, hence the weights of an expansion beside its function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Absorbed:
    """Attention to latents in the place of keys and values, the same function (arXiv 2405.04434, section 2.1.2).

    A key is linear in its latents, [first, second] of C = R + S numbers, and a value in the first.
    """

    queries: Callable[[Tensor], Tensor]
    """q [T, H, D] to [T, H, C]: products with a token's latents are those of q with its keys."""
    values: Callable[[Tensor], Tensor]
    """Sums of weighted first latents [T, H, R] to those of weighted values [T, H, E]."""


@dataclass(frozen=True, slots=True)
class Expansion:
    """Latents to keys and values; no rows to no rows."""

    function: Callable[..., tuple[Tensor, Tensor]]
    """Latents [n, ...] to keys [n, H, D] and values [n, H, E], each row of its own."""
    weights: Sequence[Tensor]
    """All that the function reads, which it finds unchanged in the backward pass. FSDP's are: it gathers a layer's
    weights into the same parameters once more before the layer's backward pass."""
    absorbed: Absorbed | None = None
    """The other way to the same attention, where there is one; it reads the weights as they are when it is called."""

    def __call__(self, *latents: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(*latents)

    @torch.no_grad()
    def shapes(self, *latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [0, H, D] and values [0, H, E] of none of the latents."""
        return self.function(*(x[:0] for x in latents))

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The weights that get a gradient: with adapters not all."""
        return tuple(weight for weight in self.weights if weight.requires_grad)


class Recomputed:
    """Keys and values of latents with a graph that ends at latents and weights."""

    def __init__(self, expand: Expansion, *latents: Tensor) -> None:
        self._inputs = (*(x.detach().requires_grad_() for x in latents), *expand.trained)
        self._latents = len(latents)
        with torch.enable_grad():
            self.keys, self.values = expand(*self._inputs[: self._latents])

    def gradients(self, grad_k: Tensor, grad_v: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(of the latents, of the trained weights) from those of keys and values, of any dtype; asked for once."""
        above = grad_k.to(self.keys.dtype), grad_v.to(self.values.dtype)
        found = torch.autograd.grad((self.keys, self.values), self._inputs, above)
        return found[: self._latents], found[self._latents :]
