"""Short causal convolution over packed documents: the mixing of a few neighbouring tokens before a delta rule.

    y_t,c = silu(sum_{j < W} weight[c, W - 1 - j] x_{t - j, c})        x_{t - j} inside the document, else its state

The state of a document is its last W - 1 inputs, oldest first; zeros before the first token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.backend import Backend, choose_backend
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.slots import read_states, write_states


def convolve(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """SiLU of the causal convolution of each channel, separately in each document; returns y [T, C], final states.

    x [T, C], weight [C, W] with the newest token's tap last, cu_seqlens [S + 1] int32 (documents may be empty), states
    [S, W - 1, C]. Computed in float32 (float64 for float64); y has x's dtype, the states that of the computation.
    Differentiable in x, weight and initial state. No host read. On a GPU it is one kernel, and two for the gradient.
    """
    tokens, width = len(x), weight.shape[1]
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    documents = torch.repeat_interleave(lengths, output_size=tokens)
    places = torch.arange(tokens, device=x.device) - starts[documents]
    if choose_backend(backend, x) == "triton":
        from cispo.ops import convolution_triton

        y = convolution_triton.convolve(x, weight, cu_seqlens, documents, places, initial_state)
    else:
        dtype = torch.promote_types(x.dtype, torch.float32)
        states = None if initial_state is None or width == 1 else initial_state.to(dtype)
        y = F.silu(_sums(x.to(dtype), weight.to(dtype).t(), documents, places, states)).to(x.dtype)
    return y, _last_inputs(x, width, starts, lengths, initial_state) if output_final_state else None


def convolve_prefill(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, cache: Tensor, slots: Tensor, fresh: Tensor | None = None
) -> Tensor:
    """`convolve` from and to states in a cache, without gradient; returns the outputs [T, C].

    cache [N, W - 1, C], dense but for its first stride; slots [S] of any integer dtype, distinct: the slot that
    document i reads its state from and writes it to. fresh [S] bool: documents that start from zero instead, even where
    the slot holds NaN. No host read.
    """
    with torch.no_grad():
        output, states = convolve(x, weight, cu_seqlens, read_states(cache, slots, fresh), True)
    assert states is not None
    write_states(cache, slots, states)
    return output


def convolve_decode(
    x: Tensor,
    weight: Tensor,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """One token of each of S sequences, x [S, C], states read and written in a cache, without gradient; outputs [S, C].

    cache, slots and fresh as in `convolve_prefill`, but negative slots are padding: their outputs are zero. On a GPU it
    is one launch, which depends on shapes alone, so a CUDA graph can hold it.
    """
    if choose_backend(backend, x) == "triton":
        from cispo.ops import convolution_triton

        return convolution_triton.decode(x, weight, cache, slots, fresh)
    used = slots >= 0
    output = torch.zeros_like(x)
    with torch.no_grad():
        states = read_states(cache, slots[used], None if fresh is None else fresh[used])
        output[used] = convolve_step(x[used], weight, states)
        write_states(cache, slots[used], states)
    return output


def convolve_step(x: Tensor, weight: Tensor, states: Tensor) -> Tensor:
    """One token of each of S sequences, x [S, C]: states [S, W - 1, C] changed in place; returns y [S, C]."""
    dtype = states.dtype
    window = torch.cat((states, x.to(dtype)[:, None]), 1)
    states.copy_(window[:, 1:])
    return F.silu((window * weight.to(dtype).t()).sum(1)).to(x.dtype)


CONVOLUTION = RecurrentOp(token_inputs=1, packed=convolve, step=convolve_step, across="window")
"""Inputs x [T, C] and weight [C, W]; states [S, W - 1, C]."""


def _sums(inputs: Tensor, taps: Tensor, documents: Tensor, places: Tensor, states: Tensor | None) -> Tensor:
    """The convolution of inputs [T, C] with taps [W, C]; documents, places [T]: where each token is."""
    width = len(taps)
    zero = inputs.new_zeros(())
    total = inputs * taps[-1]
    for back in range(1, min(width, len(inputs))):
        # A selection, not a product: a document is not to see even the NaN of another.
        seen = torch.where((places[back:] >= back)[:, None], inputs[:-back], zero)
        total = total + F.pad(seen * taps[-1 - back], (0, 0, back, 0))
    if states is None or not len(inputs):
        return total
    # The states' part in the sums of each document's first W - 1 tokens.
    padded = F.pad(states, (0, 0, 0, width - 1))
    early = torch.stack([(padded[:, place : place + width - 1] * taps[:-1]).sum(1) for place in range(width - 1)], 1)
    rows = documents * (width - 1) + places.clamp(max=width - 2)
    return total + torch.where((places < width - 1)[:, None], early.flatten(0, 1).index_select(0, rows), zero)


def _last_inputs(x: Tensor, width: int, starts: Tensor, lengths: Tensor, states: Tensor | None) -> Tensor:
    """The last W - 1 inputs of each document, those before it included, [S, W - 1, C]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if states is None:
        states = torch.zeros(len(starts), width - 1, x.shape[1], dtype=dtype, device=x.device)
    if not len(x) or width == 1:
        return states.to(dtype, copy=True)
    places = lengths[:, None] - (width - 1) + torch.arange(width - 1, device=x.device)
    own = x[(starts[:, None] + places).clamp(0, len(x) - 1)].to(dtype)
    older = states.to(dtype).gather(1, (width - 1 + places).clamp(0, width - 2)[..., None].expand_as(states))
    return torch.where((places >= 0)[..., None], own, older)
