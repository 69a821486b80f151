"""The Triton kernels of lightning attention; `lightning_triton` launches them and is the one to import.

    document    | segment 0           | segment 1           | 2    |    one program a segment, head and block of value
    segment     | C | C | C | C | C   |                              dims; its state S stays in registers
    chunk       o_i = e^{-s(i+1)} q_i S + sum_{j<=i} e^{-s(i-j)} (q_i . k_j) v_j
                S   = e^{-s n} S + sum_j e^{-s(n-1-j)} k_j^T v_j          (n tokens, i and j from 0)

One kernel does it all, since each gradient is lightning attention of other operands (G_t is the gradient of S_t):

    out    o  = attend(q, k, v)     forwards, from the initial state; ends with the final state
    dq     dq = attend(do, v, k)    forwards, from the initial state transposed
    dk_dv  dk = attend(v, do, q)    backwards, from the final state's gradient transposed
           dv = attend(k, q, do)    backwards, from the final state's gradient; ends with the initial state's gradient

Backwards, i and j count from the end, and a token sees the incoming state before its own decay: o_i takes e^{-s i} S
and the update e^{-s(n-j)}. No exponent is ever positive. Sums are float32; products have the operands' dtype.

Sources: arXiv 2401.04658 (Lightning Attention-2), algorithms 1 and 2; segments as in arXiv 2312.06635, section 4.
"""

# pyright: reportAttributeAccessIssue=false
# Values in a kernel are Triton's; the checker applies the annotations of Python's own operators.

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _locate(cu_seqlens, documents, slot, segment_tokens, SEGMENTED: tl.constexpr):
    """(document, segment in it) of a grid slot: document d owns the slots from cu_seqlens[d] // segment_tokens + d on.

    That is room for all its segments, and for one if it is empty, without a prefix sum; the surplus ends up beyond the
    document's last token.
    """
    document, segment = slot, slot * 0
    if SEGMENTED:
        started = 0
        for first in range(0, documents, 128):
            index = first + tl.arange(0, 128)
            offset = tl.load(cu_seqlens + index, mask=index < documents, other=0) // segment_tokens + index
            started += tl.sum(((offset <= slot) & (index < documents)).to(tl.int32), 0)
        document = started - 1
        segment = slot - tl.load(cu_seqlens + document) // segment_tokens - document
    return document, segment


@triton.jit
def _state_block(block, transposed, D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """Offsets [BD, BV] of a block of value dims of a [D, D] state (of its transpose), and their mask."""
    key = tl.arange(0, BD)[:, None]
    value = block * BV + tl.arange(0, BV)[None, :]
    return tl.where(transposed, value * D + key, key * D + value), (key < D) & (value < D)


@triton.jit
def _rows(x, stride, first, step, count, dims, D: tl.constexpr, BT: tl.constexpr):
    """Pointers and mask of `count` rows from token `first` on in steps of 1 or -1, [BT, len(dims)]."""
    i = tl.arange(0, BT)
    # Offsets within the tile do not change from chunk to chunk, so the loop only moves the base.
    pointers = x + first.to(tl.int64) * stride + (step * i[:, None] * stride + dims[None, :])
    return pointers, (i < count)[:, None] & (dims < D)[None, :]


@triton.jit
def _attend(
    q, k, v, out, q_row, k_row, v_row, out_row, state, slope, token, length, block,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk over `length` tokens from `token` on, `out` a block of dims; returns the state after them."""
    step: tl.constexpr = -1 if BACKWARDS else 1
    lag: tl.constexpr = 0 if BACKWARDS else 1
    i = tl.arange(0, BT)
    all_dims, dims = tl.arange(0, BD), block * BV + tl.arange(0, BV)
    distance = i[:, None] - i[None, :]
    mask = tl.where(distance >= 0, tl.exp(-slope * tl.maximum(distance, 0)), 0.0)
    carry = tl.exp(-slope * (i + lag))
    for start in range(0, length, BT):
        count = tl.minimum(length - start, BT)
        first = token + step * start
        q_rows, valid = _rows(q, q_row, first, step, count, all_dims, D, BT)
        k_rows, _ = _rows(k, k_row, first, step, count, all_dims, D, BT)
        v_rows, narrow = _rows(v, v_row, first, step, count, dims, D, BT)
        b_q = tl.load(q_rows, mask=valid, other=0.0)
        b_k = tl.load(k_rows, mask=valid, other=0.0)
        b_v = tl.load(v_rows, mask=narrow, other=0.0)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * mask
        b_out = tl.dot(b_q, state.to(b_q.dtype), input_precision="ieee") * carry[:, None]
        b_out = tl.dot(scores.to(b_v.dtype), b_v, b_out, input_precision="ieee")
        out_rows, _ = _rows(out, out_row, first, step, count, dims, D, BT)
        tl.store(out_rows, b_out.to(out.dtype.element_ty), mask=narrow)
        # Rows beyond the document hold zeros, so their clamped exponent does not matter.
        fade = tl.exp(-slope * tl.maximum(count - lag - i, 0))
        faded = (b_v * fade[:, None]).to(b_v.dtype)
        state = tl.dot(tl.trans(b_k), faded, state * tl.exp(-slope * count), input_precision="ieee")
    return state


@triton.jit
def attend_kernel(
    q, k, v, grad, out, out_2, slopes, cu_seqlens, incoming, outgoing, owners, fresh, local,
    documents, heads, segment_tokens, row, head_row, owner_stride,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One segment, head and block of dims of o, of dq, or (neighbours in the grid read the same rows) of dk or dv.

    q, k, v with strides (row, head_row, 1); grad and the outputs dense [T, H, D]; incoming and outgoing states of
    document d at owners[d] (d without `owners`), zero where fresh[d]; local from `local_kernel`, or None where a
    document is one segment.
    """
    blocks: tl.constexpr = (D + BV - 1) // BV
    jobs: tl.constexpr = 2 if MODE == "dk_dv" else 1
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    job, rest = rest % jobs, rest // jobs
    head, slot = rest % heads, rest // heads
    document, segment = _locate(cu_seqlens, documents, slot, segment_tokens, local is not None)
    begin, end = tl.load(cu_seqlens + document), tl.load(cu_seqlens + document + 1)
    passed = segment * segment_tokens
    if (segment > 0) & (passed >= end - begin):
        return
    slope = tl.load(slopes + head)
    owner = document.to(tl.int64)
    if owners is not None:
        owner = tl.load(owners + document).to(tl.int64)

    transposed = job == (1 if MODE == "out" else 0)
    offsets, inside = _state_block(block, transposed, D, BD, BV)
    state = tl.zeros((BD, BV), tl.float32)
    if incoming is not None:
        known = inside
        if fresh is not None:
            known = inside & (tl.load(fresh + document) == 0)
        state += tl.load(incoming + owner * owner_stride + head * D * D + offsets, mask=known, other=0.0)
    if local is not None:
        for earlier in range(0, segment):
            added = local + ((slot - document - segment + earlier).to(tl.int64) * heads + head) * D * D + offsets
            state = state * tl.exp(-slope * segment_tokens) + tl.load(added, mask=inside, other=0.0)

    length = tl.minimum(end - begin - passed, segment_tokens)
    dense = heads * D
    q += head * head_row
    k += head * head_row
    v += head * head_row
    out += head * D
    if MODE == "out":
        state = _attend(q, k, v, out, row, row, row, dense, state, slope, begin + passed, length, block,
                        D, BT, BD, BV, False)  # fmt: skip
    elif MODE == "dq":
        grad += head * D
        state = _attend(grad, v, k, out, dense, row, row, dense, state, slope, begin + passed, length, block,
                        D, BT, BD, BV, False)  # fmt: skip
    else:
        grad += head * D
        out_2 += head * D
        first = job == 0
        state = _attend(tl.where(first, v, k), tl.where(first, grad, q), tl.where(first, q, grad),
                        tl.where(first, out, out_2), row, tl.where(first, dense, row), tl.where(first, row, dense),
                        dense, state, slope, end - 1 - passed, length, block, D, BT, BD, BV, True)  # fmt: skip
    if outgoing is not None:
        if (passed + segment_tokens >= end - begin) & (job == jobs - 1):
            offsets, inside = _state_block(block, False, D, BD, BV)
            tl.store(outgoing + owner * owner_stride + head * D * D + offsets, state, mask=inside)


@triton.jit
def local_kernel(
    k, v, slopes, cu_seqlens, local, documents, heads, segment_tokens, k_row, k_head, v_row, v_head,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """The addition of each segment alone to the state, local [total tokens // segment_tokens, H, D, D].

    A document's last segment has no place there: without those, slot - document is different for every segment.
    """
    step: tl.constexpr = -1 if BACKWARDS else 1
    lag: tl.constexpr = 0 if BACKWARDS else 1
    blocks: tl.constexpr = (D + BV - 1) // BV
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, slot = rest % heads, rest // heads
    document, segment = _locate(cu_seqlens, documents, slot, segment_tokens, True)
    begin, end = tl.load(cu_seqlens + document), tl.load(cu_seqlens + document + 1)
    passed = segment * segment_tokens
    if passed + segment_tokens >= end - begin:
        return
    token = end - 1 - passed if BACKWARDS else begin + passed
    slope = tl.load(slopes + head)
    i = tl.arange(0, BT)
    all_dims, dims = tl.arange(0, BD), block * BV + tl.arange(0, BV)
    fade = tl.exp(-slope * (BT - lag - i))
    state = tl.zeros((BD, BV), tl.float32)
    for start in range(0, segment_tokens, BT):
        k_rows, valid = _rows(k + head * k_head, k_row, token + step * start, step, BT, all_dims, D, BT)
        v_rows, narrow = _rows(v + head * v_head, v_row, token + step * start, step, BT, dims, D, BT)
        b_k = tl.load(k_rows, mask=valid, other=0.0)
        b_v = tl.load(v_rows, mask=narrow, other=0.0)
        faded = (b_v * fade[:, None]).to(b_v.dtype)
        state = tl.dot(tl.trans(b_k), faded, state * tl.exp(-slope * BT), input_precision="ieee")
    offsets, inside = _state_block(block, False, D, BD, BV)
    tl.store(local + ((slot - document).to(tl.int64) * heads + head) * D * D + offsets, state, mask=inside)


@triton.jit
def _activated(x, SILU: tl.constexpr):
    """x, or silu(x) rounded to x's dtype, in float32."""
    wide = x.to(tl.float32)
    if SILU:
        wide = (wide / (1 + tl.exp(-wide))).to(x.dtype).to(tl.float32)
    return wide


@triton.jit
def decode_kernel(
    q, k, v, out, slopes, cache, owners, fresh, heads, row, head_row, owner_stride,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """S = e^-s S + k^T v in place and o = q S for one token, head and block of dims; negative owners are padding.

    SILU: of q, k and v as they are read, rounded to their dtype.
    """
    blocks: tl.constexpr = (D + BV - 1) // BV
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, token = rest % heads, (rest // heads).to(tl.int64)
    owner = tl.load(owners + token).to(tl.int64)
    d, dims = tl.arange(0, BD), block * BV + tl.arange(0, BV)
    out += (token * heads + head) * D
    if owner < 0:
        tl.store(out + dims, tl.zeros((BV,), out.dtype.element_ty), mask=dims < D)
        return
    offset = token * row + head * head_row
    b_q = _activated(tl.load(q + offset + d, mask=d < D, other=0.0), SILU)
    b_k = _activated(tl.load(k + offset + d, mask=d < D, other=0.0), SILU)
    b_v = _activated(tl.load(v + offset + dims, mask=dims < D, other=0.0), SILU)
    offsets, inside = _state_block(block, False, D, BD, BV)
    place = cache + owner * owner_stride + head * D * D + offsets
    known = inside
    if fresh is not None:
        known = inside & (tl.load(fresh + token) == 0)
    state = tl.load(place, mask=known, other=0.0) * tl.exp(-tl.load(slopes + head)) + b_k[:, None] * b_v[None, :]
    tl.store(place, state, mask=inside)
    tl.store(out + dims, tl.sum(b_q[:, None] * state, 0).to(out.dtype.element_ty), mask=dims < D)
