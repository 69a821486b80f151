"""The gated delta rule over packed documents, in chunks: gated DeltaNet (a decay per head) and KDA (one per channel).

    tokens      | document 0        | document 1 | doc 2 |
    chunks      | C     | C     |pad| C      |pad| C |pad|         chunks start where documents start
    rule        S <- Diag(e^g) S ;  u = beta (v - S^T k) ;  S <- S + k u^T ;  o = S^T q
    inside      A_ij = beta_i (k_i . D_ij k_j) for i > j, P_ij = q_i . D_ij k_j for i >= j, D_ij = e^{g_j+1 + .. + g_i}
                (I + A) U = beta v ;  (I + A) W = beta e^cum k ;  u = U - W S
    across      o = e^cum q S + P u ;  S' = e^{cum_C} S + (e^{cum_C - cum} k)^T u

S is the state at the start of a chunk and cum the running sum of g in it. The scan over chunks is a loop as long as the
longest document has chunks; each step serves every document that still has one. Every exponent is a sum of decays, so
none is positive and none comes from a difference of large numbers.

That is the form for a CPU, and for float32 and float64 everywhere; bfloat16 on a GPU goes through `delta_fla`. An
engine keeps the states of its sequences in slots of a cache: `delta_prefill` and `delta_decode` read and write there.

Sources: arXiv 2412.06464 (gated DeltaNet), arXiv 2510.26692 (Kimi Linear), section 3.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from cispo.ops.backend import Backend, choose_backend
from cispo.ops.chunks import Layout, choose_chunk, lay_out, pad_chunks
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.slots import read_states, write_states

_LARGEST_FLA_KEY = 256


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule separately in each document and head; returns o [T, H, V] and the final states.

    q [T, G, K] normalised and scaled, k [T, G, K] normalised, v [T, H, V] with H a multiple of G: head h has the keys
    of head h // (H / G). g [T, H] or [T, H, K]: logarithms of the decay, at most 0; beta [T, H]. cu_seqlens [S + 1]
    int32 (documents may be empty); states [S, H, K, V], zero where `initial_state` is None. Computed in float32
    (float64 for float64); the output has v's dtype, the states that of the computation. `chunk_size`, a power of two,
    is the largest chunk: short documents get shorter ones. Equals `reference.delta_recurrence`; differentiable in all
    inputs and the initial state. `backend` "triton" names the kernels of flash-linear-attention, which take bfloat16.
    """
    if _uses_fla(q, k, v, g, backend):
        from cispo.ops import delta_fla

        return delta_fla.attend(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state)
    dtype = torch.promote_types(v.dtype, torch.float32)
    layout = lay_out(cu_seqlens, len(v), choose_chunk(cu_seqlens, k.shape[-1], chunk_size, power_of_two=True))
    with torch.autocast(v.device.type, enabled=False):
        operands = (pad_chunks(x.to(dtype), layout).transpose(1, 2).contiguous() for x in (q, k, v, g, beta))
        chunks = _inside(*operands)
        o, final_state = _across(chunks, layout, initial_state, output_final_state)
        flat = o.transpose(1, 2).flatten(0, 1).index_select(0, layout.rows)
    return flat.to(v.dtype), final_state


def delta_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`delta_rule` from and to states in a cache, without gradient; returns the outputs [T, H, V].

    cache [N, H, K, V] float32, dense but for its first stride; slots [S] of any integer dtype, distinct: the slot that
    document i reads its state from and writes it to. fresh [S] bool: documents that start from zero instead, even where
    the slot holds NaN. On a GPU it is one launch and no host read.
    """
    if choose_backend(backend, q, k, v) == "triton":
        from cispo.ops import delta_triton

        return delta_triton.prefill(q, k, v, g, beta, cu_seqlens, cache, slots, fresh)
    state = read_states(cache, slots, fresh)
    with torch.no_grad():
        output, state = delta_rule(q, k, v, g, beta, cu_seqlens, state, True, backend="torch")
    assert state is not None
    write_states(cache, slots, state)
    return output


def delta_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """One token of each of S sequences, states read and written in a cache, without gradient; outputs [S, H, V].

    q, k [S, G, K], v [S, H, V], g [S, H] or [S, H, K], beta [S, H]; cache, slots and fresh as in `delta_prefill`, but
    negative slots are padding: their outputs are zero. On a GPU it is one launch, which depends on shapes alone, so a
    CUDA graph can hold it.
    """
    if choose_backend(backend, q, k, v) == "triton":
        from cispo.ops import delta_triton

        return delta_triton.decode(q, k, v, g, beta, cache, slots, fresh)
    used = slots >= 0
    output = torch.zeros_like(v)
    with torch.no_grad():
        states = read_states(cache, slots[used], None if fresh is None else fresh[used])
        output[used] = delta_step(q[used], k[used], v[used], g[used], beta[used], states)
        write_states(cache, slots[used], states)
    return output


def delta_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor) -> Tensor:
    """One token of each of S sequences: states [S, H, K, V] changed in place; returns the outputs, [S, H, V].

    q, k [S, G, K], v [S, H, V], g [S, H] or [S, H, K], beta [S, H], as in `delta_rule`.
    """
    dtype, ratio = states.dtype, v.shape[1] // k.shape[1]
    q, k = (x.to(dtype).repeat_interleave(ratio, 1) if ratio > 1 else x.to(dtype) for x in (q, k))
    states.mul_((g[..., None] if g.ndim == 2 else g).to(dtype).exp()[..., None])
    update = (v.to(dtype) - (k[..., None, :] @ states).squeeze(-2)) * beta.to(dtype)[..., None]
    states.addcmul_(k[..., None], update[..., None, :])
    return (q[..., None, :] @ states).squeeze(-2).to(v.dtype)


DELTA = RecurrentOp(token_inputs=5, packed=delta_rule, step=delta_step, across="heads")
"""Inputs q, k [T, G, K], v [T, H, V], g [T, H] or [T, H, K], beta [T, H]; states [S, H, K, V]."""


def _uses_fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, backend: Backend | None) -> bool:
    """flash-linear-attention, where it is installed, for bfloat16 alone: it multiplies float32 as TF32."""
    if choose_backend(backend, q, k, v) != "triton" or v.dtype != torch.bfloat16 or not len(v):
        return False
    if k.shape[-1] > _LARGEST_FLA_KEY or find_spec("fla") is None:
        return False
    from cispo.ops import delta_fla

    # Only a decay a head: the backward pass of a decay a channel has kernels of its own.
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return not trained or g.ndim == 3 or delta_fla.has_backward(v.device)


class _Chunks(NamedTuple):
    """The N chunks by themselves: everything that does not depend on the state."""

    q: Tensor
    """[N, H, C, K], decayed from the start of the chunk."""
    k: Tensor
    """[N, H, C, K], decayed to the end of the chunk."""
    scores: Tensor
    """P [N, H, C, C]."""
    u: Tensor
    """U [N, H, C, V]."""
    w: Tensor
    """W [N, H, C, K]."""
    decay: Tensor
    """e^{cum_C}: [N, H, K or 1, 1]."""


def _inside(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> _Chunks:
    ratio = v.shape[1] // k.shape[1]
    per_head = g.ndim == 3
    if per_head:
        scores = torch.stack((k, q)) @ k.mT
    q, k = (x.repeat_interleave(ratio, 1) if ratio > 1 else x for x in (q, k))
    if per_head:
        # float64 sums: the difference of two is exact to the last digit of float32.
        cum = g.double().cumsum(-1)
        to_end = (cum[..., -1:] - cum).to(g.dtype)
        between = (cum[..., :, None] - cum[..., None, :]).to(g.dtype)
        later = torch.ones(between.shape[-2:], dtype=torch.bool, device=g.device).triu(1)
        decays = between.masked_fill(later, -torch.inf).exp()
        from_start, total = cum.to(g.dtype).exp()[..., None], cum[..., -1].to(g.dtype).exp()[..., None, None]
        to_end = to_end.exp()[..., None]
        scores = (scores.repeat_interleave(ratio, 2) if ratio > 1 else scores) * decays
    else:
        scores, from_start, to_end = _channel_scores(torch.stack((k, q)), k, g)
        from_start, to_end = from_start.exp(), to_end.exp()
        total = from_start[..., -1, :, None]
    known = torch.cat((v, k * from_start), -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(scores[0] * beta[..., None], known, upper=False, unitriangular=True)
    u, w = solved.split((v.shape[-1], k.shape[-1]), -1)
    return _Chunks(q * from_start, k * to_end, scores[1], u, w, total)


def _channel_scores(rows: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_i . D_ij k_j for i >= j, [2, N, H, C, C], of both rows x [2, N, H, C, K]; sums of g from start and to end.

    Blocks of one token are joined in pairs until they are chunks. Between the halves of a block D_ij is the product of
    the decays from j to the end of the first half and from its end to i: a matrix product, with no exponent above 0.
    """
    chunk = k.shape[-2]
    blocks = (rows * k).sum(-1)[..., None, None]
    start, end = g[..., None, :], torch.zeros_like(g)[..., None, :]
    size = 1
    rows, k = rows[..., None, :], k[..., None, :]
    while size < chunk:
        first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        before, after = end[..., 0::2, :, :], start[..., 1::2, :, :]
        left = (k[..., 0::2, :, :] * before.exp()).mT
        cross = (rows[..., 1::2, :, :] * after.exp()) @ left
        top = torch.cat((first, torch.zeros_like(first)), -1)
        blocks = torch.cat((top, torch.cat((cross, second), -1)), -2)
        start, end = (
            torch.cat((start[..., 0::2, :, :], after + start[..., 0::2, -1:, :]), -2),
            torch.cat((before + start[..., 1::2, -1:, :], end[..., 1::2, :, :]), -2),
        )
        size *= 2
        rows, k = (x.reshape(*x.shape[:-3], -1, size, x.shape[-1]) for x in (rows, k))
    return blocks[..., 0, :, :], start[..., 0, :, :], end[..., 0, :, :]


def _across(
    chunks: _Chunks, layout: Layout, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """o [N, H, C, V] and the final states [S, H, K, V]: the scan over the places of chunks in their documents."""
    q, k, scores, u, w, decay = chunks
    documents, (_, heads, _, key), value = len(layout.order), q.shape, u.shape[-1]
    if initial_state is None and len(layout.widths) <= 1 and not output_final_state:
        return scores @ u, None
    if initial_state is None:
        state = q.new_zeros(documents, heads, key, value)
    else:
        state = initial_state.to(q.dtype).index_select(0, layout.order)
    starts, updates, ends = [], [], []
    # split, not slices: the gradient of each slice would be a tensor of the whole size.
    steps = zip(*(x.split(layout.widths) for x in (k.mT, u, w, decay)), layout.widths, strict=True)
    for keys, known, reads, fade, width in steps:
        ends.append(state[width:])
        state = state[:width]
        starts.append(state)
        updates.append(known - reads @ state)
        if output_final_state or len(starts) < len(layout.widths):
            state = fade * state + keys @ updates[-1]
    ends.append(state)
    final = torch.cat(ends[::-1]).index_select(0, layout.rank) if output_final_state else None
    if not starts:
        return u, final
    return q @ torch.cat(starts) + scores @ torch.cat(updates), final
