"""Lightning attention over packed documents: linear attention with a fixed decay per head, in chunks.

    tokens      | document 0        | document 1 | doc 2 |
    chunks      | C     | C     |pad| C      |pad| C |pad|         chunks start where documents start
    inside      o_i  = sum_{j<=i} e^{-s(i-j)} (q_i . k_j) v_j      one batched matmul over all chunks
    across      o_i += e^{-s i} q_i S,  S' = e^{-s n} S + sum_j e^{-s(n-j)} k_j^T v_j

with i, j = 1..n inside a chunk that holds n tokens and S the state at its start. The scan over chunks is a loop as
long as the longest document has chunks; each step serves every document that still has one. Distances are integers
and no exponent is positive, so nothing overflows however long the document or steep the slope.

That is the form for a CPU, and for dtypes other than bfloat16 and float32; on a GPU `lightning_triton` runs. An engine
keeps the states of its sequences in slots of a cache: `lightning_prefill` and `lightning_decode` read and write there.

Source: arXiv 2401.04658 (Lightning Attention-2), for any document lengths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.backend import Backend, choose_backend
from cispo.ops.chunks import Layout, choose_chunk, lay_out, pad_chunks
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.slots import read_states, write_states

# Larger heads have no tiles in the table of the kernels.
_LARGEST_KERNEL_DIM = 256


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o_t = q_t S_t with S_t = exp(-s) S_{t-1} + k_t^T v_t, separately in each document and head.

    q, k, v [T, H, D]; slopes [H] float32, positive or zero; cu_seqlens [S + 1] int32 (documents may be empty);
    states [S, H, D, D] float32, zero where `initial_state` is None. Computed in float32 (float64 for float64), except
    that the kernels multiply bfloat16 operands as they are and round scores and states to bfloat16 for it; the output
    has q's dtype. `chunk_size` is the largest chunk of the torch form: short documents get shorter ones. Equals
    `reference.lightning_attention_recurrence`; differentiable in q, k, v and initial state.
    """
    if _uses_kernels(q, k, v, backend):
        from cispo.ops import lightning_triton

        return lightning_triton.attend(q, k, v, slopes, cu_seqlens, initial_state, output_final_state)
    dtype = torch.promote_types(q.dtype, torch.float32)
    layout = lay_out(cu_seqlens, q.shape[0], choose_chunk(cu_seqlens, q.shape[-1], chunk_size))
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (pad_chunks(x.to(dtype), layout).permute(2, 0, 1, 3).contiguous() for x in (q, k, v))
        slopes = slopes.to(dtype)
        place = torch.arange(layout.chunk, device=q.device)
        decay = _decay(slopes, place[:, None] - place).tril()[:, None]
        outputs = ((queries @ keys.transpose(-1, -2)) * decay) @ values
        final_state = None
        if len(layout.widths) > 1 or initial_state is not None or output_final_state:
            remaining = (layout.lengths[:, None] - 1 - place).clamp(min=0)
            updates = (keys * _decay(slopes, remaining)[..., None]).transpose(-1, -2) @ values
            states, final_state = _scan(updates, slopes, layout, initial_state)
            outputs = outputs + (queries * _decay(slopes, place + 1)[:, None, :, None]) @ states
        flat = outputs.permute(1, 2, 0, 3).reshape(-1, *q.shape[1:]).index_select(0, layout.rows)
    return flat.to(q.dtype), final_state if output_final_state else None


def lightning_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`lightning_attention` from and to states in a cache, without gradient; returns the outputs [T, H, D].

    cache [N, H, D, D] float32, dense but for its first stride; slots [S] of any integer dtype, distinct: the slot that
    document i reads its state from and writes it to. fresh [S] bool: documents that start from zero instead.
    """
    if _uses_kernels(q, k, v, backend):
        from cispo.ops import lightning_triton

        return lightning_triton.prefill(q, k, v, slopes, cu_seqlens, cache, slots, fresh)
    state = read_states(cache, slots, fresh)
    with torch.no_grad():
        output, state = lightning_attention(q, k, v, slopes, cu_seqlens, state, True, backend="torch")
    assert state is not None
    write_states(cache, slots, state)
    return output


def lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None = None,
    silu: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """One token of each of S sequences: S = e^-s S + k^T v in the cache, o = q S; without gradient.

    q, k, v [S, H, D], of which `silu` takes the SiLU first; cache, slots and fresh as in `lightning_prefill`, but
    negative slots are padding: their outputs are zero. On a GPU it is one launch, which depends on shapes alone, so a
    CUDA graph can hold it.
    """
    if _uses_kernels(q, k, v, backend):
        from cispo.ops import lightning_triton

        return lightning_triton.decode(q, k, v, slopes, cache, slots, fresh, silu)
    if silu:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    used = slots >= 0
    state = read_states(cache, slots[used], None if fresh is None else fresh[used])
    dtype = state.dtype
    state = state * torch.exp(-slopes.to(dtype))[:, None, None] + k[used, :, :, None].to(dtype) * v[used, :, None, :]
    write_states(cache, slots[used], state)
    output = torch.zeros_like(q)
    output[used] = (q[used, :, None, :].to(dtype) @ state).squeeze(2).to(q.dtype)
    return output


def lightning_step(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, states: Tensor) -> Tensor:
    """`lightning_decode` where sequence i has its state in row i: states [S, H, D, D], changed in place.

    q, k, v [S, H, D]; returns the outputs, [S, H, D]. One launch on a GPU.
    """
    if _uses_kernels(q, k, v, None):
        from cispo.ops import lightning_triton

        return lightning_triton.decode(q, k, v, slopes, states, torch.arange(len(q), device=q.device))
    dtype = states.dtype
    states.mul_(torch.exp(-slopes.to(dtype))[:, None, None])
    states.addcmul_(k[..., None].to(dtype), v[..., None, :].to(dtype))
    return (q[..., None, :].to(dtype) @ states).squeeze(2).to(q.dtype)


LIGHTNING = RecurrentOp(token_inputs=3, packed=lightning_attention, step=lightning_step, across="decay")
"""Inputs q, k, v [T, H, D] and slopes [H] float32; states [S, H, D, D]."""


def _uses_kernels(q: Tensor, k: Tensor, v: Tensor, backend: Backend | None) -> bool:
    return choose_backend(backend, q, k, v) == "triton" and q.shape[-1] <= _LARGEST_KERNEL_DIM


def _decay(slopes: Tensor, distance: Tensor) -> Tensor:
    """exp(-slope * distance), [H, *distance.shape]; distances below 0 count as 0 (the caller masks them)."""
    return torch.exp(-slopes.view(-1, *[1] * distance.ndim) * distance.clamp(min=0))


def _scan(updates: Tensor, slopes: Tensor, layout: Layout, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk [H, N, D, D] and at the end of every document [S, H, D, D]."""
    heads, _, dim, _ = updates.shape
    documents = len(layout.order)
    if initial_state is None:
        state = updates.new_zeros(heads, documents, dim, dim)
    else:
        state = initial_state.to(updates.dtype).index_select(0, layout.order).transpose(0, 1)
    decays = _decay(slopes, layout.lengths)[..., None, None]
    # split, not slices: the gradient of each slice would be a tensor of the whole size.
    steps = zip(updates.split(layout.widths, 1), decays.split(layout.widths, 1), layout.widths, strict=True)
    starts, ends = [], []
    for update, decay, width in steps:
        ends.append(state[:, width:])
        state = state[:, :width]
        starts.append(state)
        state = decay * state + update
    ends.append(state)
    final = torch.cat(ends[::-1], 1).index_select(1, layout.rank).transpose(0, 1)
    return torch.cat(starts, 1) if starts else updates, final
