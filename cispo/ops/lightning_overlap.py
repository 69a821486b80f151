"""`lightning_kernels.attend_kernel` for Hopper alone, in Gluon: products run while the threads prepare the next ones.

    tensor cores   k q^T     | S^T q^T            | v^T P            | (fade v)^T k  ...    | next chunk's k q^T
    threads        S to bf16 | P = mask * k q^T   | decay of S       | o to shared memory   | ...
    copy engine    tiles of the chunks ahead, and o of the chunks behind

In Triton's language every product is waited for at once. The state is held transposed, [BV, BD]: it, and values times
their decay, are then left operands of products, which come from registers. Equations and arguments are those of
`lightning_kernels`.
"""

# pyright: reportAttributeAccessIssue=false, reportMissingImports=false
# Values in a kernel are Triton's; the checker applies the annotations of Python's own operators.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _locate(cu_seqlens, documents, slot, segment_tokens, SEGMENTED: gl.constexpr):
    """As `lightning_kernels._locate`."""
    document, segment = slot, slot * 0
    if SEGMENTED:
        lanes: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        started = slot * 0
        for first in range(0, documents, 128):
            index = first + gl.arange(0, 128, layout=lanes)
            offset = gl.load(cu_seqlens + index, mask=index < documents, other=0) // segment_tokens + index
            started += gl.sum(((offset <= slot) & (index < documents)).to(gl.int32), 0)
        document = started - 1
        segment = slot - gl.load(cu_seqlens + document) // segment_tokens - document
    return document, segment


@gluon.constexpr_function
def _accumulator(columns, block, warps):
    """Layout of a product's result: warpgroups share the rows of `block` value dims, else the columns."""
    rows = min(warps, block // 16)
    return gl.NVMMADistributedLayout([3, 0], [rows, warps // rows], [16, columns * rows // warps, 16])


@gluon.jit
def _tiles(x, first, stride, length, D: gl.constexpr, BT: gl.constexpr, BW: gl.constexpr, LAYOUT: gl.constexpr):
    return tma.make_tensor_descriptor(
        x + first.to(gl.int64) * stride, [gl.maximum(length, 1), D], [stride, 1], [BT, BW], LAYOUT
    )


@gluon.jit
def _fetch(
    q_tiles, k_tiles, v_tiles, q_ring, k_ring, v_ring, ready, chunk, chunks, low, column, BACKWARDS: gl.constexpr,
    WIDE: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """Starts to load a chunk's tiles into their places of the rings, if there is such a chunk: q and k, and values."""
    BT: gl.constexpr = q_tiles.block_shape[0]
    there = chunk < chunks
    first = low + (chunks - 1 - chunk if BACKWARDS else chunk) * BT
    barrier = ready.index(chunk % ready.shape[0])
    columns: gl.constexpr = (2 * q_tiles.block_shape[1] if WIDE else 0) + (v_tiles.block_shape[1] if VALUES else 0)
    mbarrier.expect(barrier, 2 * BT * columns, pred=there)
    if WIDE:
        place = chunk % q_ring.shape[0]
        tma.async_copy_global_to_shared(q_tiles, [first, 0], barrier, q_ring.index(place), pred=there)
        tma.async_copy_global_to_shared(k_tiles, [first, 0], barrier, k_ring.index(place), pred=there)
    if VALUES:
        place = chunk % v_ring.shape[0]
        tma.async_copy_global_to_shared(v_tiles, [first, column], barrier, v_ring.index(place), pred=there)


@gluon.jit
def _attend(
    q, k, v, out, q_row, k_row, v_row, out_row, state, slope, begin, length, passed, tokens, block,
    D: gl.constexpr, BT: gl.constexpr, BD: gl.constexpr, BV: gl.constexpr, BACKWARDS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As `lightning_kernels._attend`, over `tokens` tokens behind `passed` of a document's `length`.

    A chunk's tokens ascend and its tiles begin at one of the segment's, since the copy engine writes from no row before
    the first: backwards, the chunk that is not full comes first.
    """
    kind: gl.constexpr = q.dtype.element_ty
    square: gl.constexpr = _accumulator(BT, BT, gl.num_warps())
    narrow: gl.constexpr = _accumulator(BT, BV, gl.num_warps())
    wide: gl.constexpr = _accumulator(BD, BV, gl.num_warps())
    state_operand: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    value_operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    wide_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BD], kind)
    value_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BV], kind)
    score_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BT], kind)
    low = passed
    if BACKWARDS:
        # Rows of the segment before belong to another program.
        length = length - passed
        low = length - tokens
    q_tiles = _tiles(q, begin, q_row, length, D, BT, BD, wide_tile)
    k_tiles = _tiles(k, begin, k_row, length, D, BT, BD, wide_tile)
    v_tiles = _tiles(v, begin, v_row, length, D, BT, BV, value_tile)
    out_tiles = _tiles(out, begin, out_row, length, D, BT, BV, value_tile)
    # Registers hold no second copy of a wider state, nor all columns of one that warpgroups share.
    shared: gl.constexpr = (BD > 128) or (gl.num_warps() * 16 > BV)
    # Half a wide state leaves room for one tile of values, which comes apart, and for none of the output.
    crowded: gl.constexpr = BV * BD > 128 * 128
    V_STAGES: gl.constexpr = 1 if crowded else STAGES
    q_ring = gl.allocate_shared_memory(kind, [STAGES, BT, BD], wide_tile)
    k_ring = gl.allocate_shared_memory(kind, [STAGES, BT, BD], wide_tile)
    v_ring = gl.allocate_shared_memory(kind, [V_STAGES, BT, BV], value_tile)
    shared_scores = gl.allocate_shared_memory(kind, [BT, BT], score_tile)
    if shared:
        operand = gl.allocate_shared_memory(kind, [BV, BD], wide_tile)
    if crowded:
        shared_out = operand._reinterpret(kind, [BT, BV], value_tile)
    else:
        shared_out = gl.allocate_shared_memory(kind, [BT, BV], value_tile)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    if crowded:
        v_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(v_ready.index(0), count=1)

    row = gl.arange(0, BT, layout=gl.SliceLayout(1, square))
    column = gl.arange(0, BT, layout=gl.SliceLayout(0, square))
    query = gl.arange(0, BT, layout=gl.SliceLayout(0, narrow))
    token = gl.arange(0, BT, layout=gl.SliceLayout(0, value_operand))
    distance = row[:, None] - column[None, :] if BACKWARDS else column[None, :] - row[:, None]
    mask = gl.where(distance >= 0, gl.exp(-slope * gl.maximum(distance, 0)), 0.0)
    none = gl.zeros([BT, BT], gl.float32, square)
    none_out = gl.zeros([BV, BT], gl.float32, narrow)

    chunks = (tokens + BT - 1) // BT
    for ahead in gl.static_range(STAGES - 1):
        _fetch(q_tiles, k_tiles, v_tiles, q_ring, k_ring, v_ring, ready, ahead, chunks, low, block * BV, BACKWARDS,
               True, not crowded)  # fmt: skip
    if crowded:
        _fetch(q_tiles, k_tiles, v_tiles, q_ring, k_ring, v_ring, v_ready, 0, chunks, low, block * BV, BACKWARDS,
               False, True)  # fmt: skip
    for chunk in range(0, chunks):
        place, v_place = chunk % STAGES, chunk % V_STAGES
        lower = (chunks - 1 - chunk if BACKWARDS else chunk) * BT
        count = gl.minimum(tokens - lower, BT)
        b_q, b_k, b_v = q_ring.index(place), k_ring.index(place), v_ring.index(v_place)
        if shared:
            if crowded:
                tma.store_wait(0)
            # All threads are done with the chunk before: with its place in the ring, and with the state's copy.
            gl.thread_barrier()
            _fetch(q_tiles, k_tiles, v_tiles, q_ring, k_ring, v_ring, ready, chunk + STAGES - 1, chunks, low,
                   block * BV, BACKWARDS, True, not crowded)  # fmt: skip
            operand.store(state.to(kind))
            fence_async_shared()
            gl.thread_barrier()
        else:
            operand = gl.convert_layout(state.to(kind), state_operand)
        state = state * gl.exp(-slope * count)
        mbarrier.wait(ready.index(place), (chunk // STAGES) & 1)
        scores = warpgroup_mma(b_k, b_q.permute([1, 0]), none, use_acc=False, is_async=True)
        b_out = warpgroup_mma(operand, b_q.permute([1, 0]), none_out, use_acc=False, is_async=True)
        if not shared:
            gl.thread_barrier()
            _fetch(q_tiles, k_tiles, v_tiles, q_ring, k_ring, v_ring, ready, chunk + STAGES - 1, chunks, low,
                   block * BV, BACKWARDS, True, not crowded)  # fmt: skip
        scores = warpgroup_mma_wait(1, deps=[scores])
        shared_scores.store((scores * mask).to(kind))
        # In this order: what a thread wrote is fenced before another's product may read it.
        fence_async_shared()
        gl.thread_barrier()
        # Rows beyond the segment hold zeros, so their clamped exponents do not matter.
        carry = gl.exp(-slope * (gl.maximum(count - 1 - query, 0) if BACKWARDS else query + 1))
        fade = gl.exp(-slope * (token + 1 if BACKWARDS else gl.maximum(count - 1 - token, 0)))
        if crowded:
            mbarrier.wait(v_ready.index(0), chunk & 1)
        faded = (b_v.permute([1, 0]).load(value_operand) * fade[None, :]).to(kind)
        b_out = warpgroup_mma_wait(0, deps=[b_out]) * carry[None, :]
        b_out = warpgroup_mma(b_v.permute([1, 0]), shared_scores, b_out, is_async=True)
        state = warpgroup_mma(faded, b_k, state, is_async=True)
        b_out = warpgroup_mma_wait(1, deps=[b_out])
        if not crowded:
            tma.store_wait(0)
        gl.thread_barrier()
        if crowded:
            _fetch(q_tiles, k_tiles, v_tiles, q_ring, k_ring, v_ring, v_ready, chunk + 1, chunks, low, block * BV,
                   BACKWARDS, False, True)  # fmt: skip
        shared_out.permute([1, 0]).store(b_out.to(kind))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out_tiles, [low + lower, block * BV], shared_out)
        state = warpgroup_mma_wait(0, deps=[state])
    tma.store_wait(0)
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    if crowded:
        mbarrier.invalidate(v_ready.index(0))
    return state


@gluon.jit
def overlapped_kernel(
    q, k, v, grad, out, out_2, slopes, cu_seqlens, incoming, outgoing, owners, fresh, local,
    documents, heads, segment_tokens, row, head_row, owner_stride,
    D: gl.constexpr, BT: gl.constexpr, BD: gl.constexpr, BV: gl.constexpr, MODE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `lightning_kernels.attend_kernel`, in bfloat16."""
    wide: gl.constexpr = _accumulator(BD, BV, gl.num_warps())
    blocks: gl.constexpr = (D + BV - 1) // BV
    jobs: gl.constexpr = 2 if MODE == "dk_dv" else 1
    block, rest = gl.program_id(0) % blocks, gl.program_id(0) // blocks
    job, rest = rest % jobs, rest // jobs
    head, slot = rest % heads, rest // heads
    document, segment = _locate(cu_seqlens, documents, slot, segment_tokens, local is not None)
    begin, end = gl.load(cu_seqlens + document), gl.load(cu_seqlens + document + 1)
    passed = segment * segment_tokens
    if (segment > 0) & (passed >= end - begin):
        return
    slope = gl.load(slopes + head)
    owner = document.to(gl.int64)
    if owners is not None:
        owner = gl.load(owners + document).to(gl.int64)

    transposed = job == (1 if MODE == "out" else 0)
    key = gl.arange(0, BD, layout=gl.SliceLayout(0, wide))[None, :]
    value = block * BV + gl.arange(0, BV, layout=gl.SliceLayout(1, wide))[:, None]
    inside = (key < D) & (value < D)
    offsets = gl.where(transposed, value * D + key, key * D + value)
    state = gl.zeros([BV, BD], gl.float32, wide)
    if incoming is not None:
        known = inside
        if fresh is not None:
            known = inside & (gl.load(fresh + document) == 0)
        state += gl.load(incoming + owner * owner_stride + head * D * D + offsets, mask=known, other=0.0)
    if local is not None:
        for earlier in range(0, segment):
            added = local + ((slot - document - segment + earlier).to(gl.int64) * heads + head) * D * D + offsets
            state = state * gl.exp(-slope * segment_tokens) + gl.load(added, mask=inside, other=0.0)

    length = end - begin
    tokens = gl.minimum(length - passed, segment_tokens)
    dense = heads * D
    q += head * head_row
    k += head * head_row
    v += head * head_row
    out += head * D
    if MODE == "out":
        state = _attend(q, k, v, out, row, row, row, dense, state, slope, begin, length, passed, tokens, block,
                        D, BT, BD, BV, False, STAGES)  # fmt: skip
    elif MODE == "dq":
        grad += head * D
        state = _attend(grad, v, k, out, dense, row, row, dense, state, slope, begin, length, passed, tokens, block,
                        D, BT, BD, BV, False, STAGES)  # fmt: skip
    else:
        grad += head * D
        out_2 += head * D
        first = job == 0
        state = _attend(gl.where(first, v, k), gl.where(first, grad, q), gl.where(first, q, grad),
                        gl.where(first, out, out_2), row, gl.where(first, dense, row), gl.where(first, row, dense),
                        dense, state, slope, begin, length, passed, tokens, block,
                        D, BT, BD, BV, True, STAGES)  # fmt: skip
    if outgoing is not None:
        if (passed + segment_tokens >= end - begin) & (job == jobs - 1):
            offsets = key * D + value
            gl.store(outgoing + owner * owner_stride + head * D * D + offsets, state, mask=inside)
