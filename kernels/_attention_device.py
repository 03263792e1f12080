"""Device code of ``attention``: softmax attention forward and backward, without atomics.

Tiles are unequal, since N = 198 is no power of two. The host passes them as compile-time tuples: chunks are (start,
width, masked), loops are (start, stop, block, masked).
Shapes: B batch, N tokens, R query rows (N, or the first few), H heads, D head width, BLOCK_D its power of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(
    p_rows, start, limit, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Load rows [BLOCK, BLOCK_D] from ``start``.

    Zero from ``limit`` on (if MASK) and past the width D.
    """
    o_n = start + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    p_block = p_rows + o_n[:, None] * STRIDE + o_d[None, :]
    if MASK and BLOCK_D > D:
        return tl.load(p_block, mask=(o_n < limit)[:, None] & (o_d < D)[None, :], other=0.0)
    elif MASK:
        return tl.load(p_block, mask=(o_n < limit)[:, None], other=0.0)
    elif BLOCK_D > D:
        return tl.load(p_block, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_block)


@triton.jit
def _store(p_rows, b_x, start, limit, STRIDE: tl.constexpr, D: tl.constexpr):
    """Store the rows of ``b_x`` before ``limit``.

    Its first row is ``start``.
    """
    o_n = start + tl.arange(0, b_x.shape[0])
    o_d = tl.arange(0, b_x.shape[1])
    m_block = (o_n < limit)[:, None] & (o_d < D)[None, :]
    tl.store(p_rows + o_n[:, None] * STRIDE + o_d[None, :], b_x.to(p_rows.dtype.element_ty), mask=m_block)


@triton.jit
def _attend(
    b_q, ks, vs, row_max, row_sum, b_out, N: tl.constexpr, CHUNKS: tl.constexpr, SCALE: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Add the chunks' keys to the running softmax, or start it if FIRST.

    ``row_max`` is of unscaled scores.

    The scale is applied in the exponent's multiply-add, where it is free.
    """
    TO_LOG2: tl.constexpr = SCALE * LOG2E
    scores = ()
    new_max = row_max
    for c in tl.static_range(len(CHUNKS)):
        b_s = tl.dot(b_q, tl.trans(ks[c]), input_precision="ieee")
        if CHUNKS[c][2]:
            b_s = tl.where((CHUNKS[c][0] + tl.arange(0, CHUNKS[c][1]) < N)[None, :], b_s, -float("inf"))
        new_max = tl.maximum(new_max, tl.max(b_s, 1))
        scores += (b_s,)
    shift = new_max * TO_LOG2
    if not FIRST:
        rescale = tl.exp2(row_max * TO_LOG2 - shift)
        row_sum = row_sum * rescale
        b_out = b_out * rescale[:, None]
    for c in tl.static_range(len(CHUNKS)):
        b_p = tl.exp2(scores[c] * TO_LOG2 - shift[:, None])
        row_sum += tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_q.dtype), vs[c], b_out, input_precision="ieee")
    return new_max, row_sum, b_out


@triton.jit
def attention_fwd_kernel(
    p_q,  # [B, R, (3,) H, D]
    p_kv,  # [B, N, 2, H, D], or the last two of three
    p_out,  # [B, R, H, D]
    p_lse,  # [B, H, R] float32, in units of log 2
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, Q_TOKEN: tl.constexpr,
    KV_TOKEN: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, STREAMED: tl.constexpr, BLOCK_N: tl.constexpr,
    STREAM_CHUNK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Compute output and log-sum-exp of ROWS query rows of a head.

    The first STREAMED keys are loaded again for each block of queries; the RESIDENT keys once.
    """
    PARTS: tl.constexpr = (R + ROWS - 1) // ROWS
    SCALE: tl.constexpr = D**-0.5
    i_head = tl.program_id(0) // PARTS
    first_row = tl.program_id(0) % PARTS * ROWS
    i_b = (i_head // H).to(tl.int64)
    p_q += i_b * (R * Q_TOKEN) + i_head % H * D
    p_k = p_kv + i_b * (N * KV_TOKEN) + i_head % H * D
    p_v = p_k + H * D
    p_out += i_b * (R * H * D) + i_head % H * D
    p_lse += i_head.to(tl.int64) * R
    ks = ()
    vs = ()
    for c in tl.static_range(len(RESIDENT)):
        ks += (_load(p_k, RESIDENT[c][0], N, KV_TOKEN, D, RESIDENT[c][1], BLOCK_D, RESIDENT[c][2]),)
        vs += (_load(p_v, RESIDENT[c][0], N, KV_TOKEN, D, RESIDENT[c][1], BLOCK_D, RESIDENT[c][2]),)
    for i in tl.static_range(len(QUERIES)):
        for start in range(QUERIES[i][0], QUERIES[i][1], QUERIES[i][2]):
            row = first_row + start
            o_m = row + tl.arange(0, QUERIES[i][2])
            b_q = _load(p_q, row, R, Q_TOKEN, D, QUERIES[i][2], BLOCK_D, QUERIES[i][3])
            row_max = tl.full((QUERIES[i][2],), -float("inf"), tl.float32)
            row_sum = tl.full((QUERIES[i][2],), 0.0, tl.float32)
            b_out = tl.full((QUERIES[i][2], BLOCK_D), 0.0, tl.float32)
            if STREAMED > 0:
                for key in range(0, STREAMED, BLOCK_N):
                    b_k = _load(p_k, key, N, KV_TOKEN, D, BLOCK_N, BLOCK_D, False)
                    b_v = _load(p_v, key, N, KV_TOKEN, D, BLOCK_N, BLOCK_D, False)
                    row_max, row_sum, b_out = _attend(
                        b_q, (b_k,), (b_v,), row_max, row_sum, b_out, N, STREAM_CHUNK, SCALE, False
                    )
            row_max, row_sum, b_out = _attend(b_q, ks, vs, row_max, row_sum, b_out, N, RESIDENT, SCALE, STREAMED == 0)
            _store(p_out, b_out * (1.0 / row_sum)[:, None], row, R, H * D, D)
            tl.store(p_lse + o_m, row_max * (SCALE * LOG2E) + tl.log2(row_sum), mask=o_m < R)


@triton.jit
def attention_bwd_kernel(
    p_q,  # [B, R, (3,) H, D]
    p_kv,  # [B, N, 2, H, D], or the last two of three
    p_out,  # [B, R, H, D]
    p_dout,  # [B, R, H, D]
    p_lse,  # [B, H, R]
    p_delta,  # [B, H, R] float32 sum_d out dout, written if the keys kernel computes dK and dV
    p_dq,  # as p_q
    p_dkv,  # as p_kv
    p_sums,  # [B, PARTS, 2, H, D] float32 out: sums of dQ and of dout over this program's rows; or None
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, Q_TOKEN: tl.constexpr,
    KV_TOKEN: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, RESIDENT: tl.constexpr, KEYS: tl.constexpr, WRITE_DKV: tl.constexpr,
):  # fmt: skip
    """Compute dQ of ROWS query rows of a head over all keys.

    If these are all rows, dK and dV too (WRITE_DKV).
    """
    PARTS: tl.constexpr = (R + ROWS - 1) // ROWS
    SCALE: tl.constexpr = D**-0.5
    i_head = tl.program_id(0) // PARTS
    first_row = tl.program_id(0) % PARTS * ROWS
    i_b = (i_head // H).to(tl.int64)
    o_q = i_b * (R * Q_TOKEN) + i_head % H * D
    o_k = i_b * (N * KV_TOKEN) + i_head % H * D
    o_v = o_k + H * D
    o_out = i_b * (R * H * D) + i_head % H * D
    o_lse = i_head.to(tl.int64) * R
    o_d = tl.arange(0, BLOCK_D)
    o_sums = (i_b * PARTS + tl.program_id(0) % PARTS) * (2 * H * D) + i_head % H * D + o_d
    dout_sum = tl.full((BLOCK_D,), 0.0, tl.float32)
    qs = ()
    douts = ()
    lses = ()
    deltas = ()
    dqs = ()
    for c in tl.static_range(len(RESIDENT)):
        row = first_row + RESIDENT[c][0]
        o_m = row + tl.arange(0, RESIDENT[c][1])
        b_dout = _load(p_dout + o_out, row, R, H * D, D, RESIDENT[c][1], BLOCK_D, RESIDENT[c][2])
        b_out = _load(p_out + o_out, row, R, H * D, D, RESIDENT[c][1], BLOCK_D, RESIDENT[c][2])
        b_q = _load(p_q + o_q, row, R, Q_TOKEN, D, RESIDENT[c][1], BLOCK_D, RESIDENT[c][2])
        delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
        if not WRITE_DKV:
            tl.store(p_delta + o_lse + o_m, delta, mask=o_m < R)
        if p_sums is not None:
            dout_sum += tl.sum(b_dout.to(tl.float32), 0)
        qs += (b_q,)
        douts += (b_dout,)
        lses += (tl.load(p_lse + o_lse + o_m, mask=o_m < R, other=float("inf")),)
        deltas += (delta,)
        dqs += (tl.full((RESIDENT[c][1], BLOCK_D), 0.0, tl.float32),)
    if p_sums is not None:
        tl.store(p_sums + o_sums + H * D, dout_sum, mask=o_d < D)
    for i in tl.static_range(len(KEYS)):
        for start in range(KEYS[i][0], KEYS[i][1], KEYS[i][2]):
            b_k = _load(p_kv + o_k, start, N, KV_TOKEN, D, KEYS[i][2], BLOCK_D, KEYS[i][3])
            b_v = _load(p_kv + o_v, start, N, KV_TOKEN, D, KEYS[i][2], BLOCK_D, KEYS[i][3])
            b_dk = tl.full((KEYS[i][2], BLOCK_D), 0.0, tl.float32)
            b_dv = tl.full((KEYS[i][2], BLOCK_D), 0.0, tl.float32)
            new_dqs = ()
            for c in tl.static_range(len(RESIDENT)):
                b_s = tl.dot(qs[c], tl.trans(b_k), input_precision="ieee")
                b_p = tl.exp2(b_s * (SCALE * LOG2E) - lses[c][:, None])
                if KEYS[i][3]:
                    b_p = tl.where((start + tl.arange(0, KEYS[i][2]) < N)[None, :], b_p, 0.0)
                if WRITE_DKV:
                    b_dv = tl.dot(tl.trans(b_p.to(b_v.dtype)), douts[c], b_dv, input_precision="ieee")
                b_dp = tl.dot(douts[c], tl.trans(b_v), input_precision="ieee")
                b_ds = (b_p * (b_dp - deltas[c][:, None])).to(b_k.dtype)
                if WRITE_DKV:
                    b_dk = tl.dot(tl.trans(b_ds), qs[c], b_dk, input_precision="ieee")
                new_dqs += (tl.dot(b_ds, b_k, dqs[c], input_precision="ieee"),)
            dqs = new_dqs
            if WRITE_DKV:
                _store(p_dkv + o_k, b_dk * SCALE, start, N, KV_TOKEN, D)
                _store(p_dkv + o_v, b_dv, start, N, KV_TOKEN, D)
    dq_sum = tl.full((BLOCK_D,), 0.0, tl.float32)
    for c in tl.static_range(len(RESIDENT)):
        _store(p_dq + o_q, dqs[c] * SCALE, first_row + RESIDENT[c][0], R, Q_TOKEN, D)
        if p_sums is not None:
            dq_sum += tl.sum(dqs[c], 0) * SCALE
    if p_sums is not None:
        tl.store(p_sums + o_sums, dq_sum, mask=o_d < D)


@triton.jit
def attention_bwd_keys_kernel(
    p_q,  # [B, N, (3,) H, D]
    p_kv,  # [B, N, 2, H, D], or the last two of three
    p_dout,  # [B, N, H, D]
    p_lse,  # [B, H, N]
    p_delta,  # [B, H, N]
    p_dkv,  # as p_kv
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, Q_TOKEN: tl.constexpr,
    KV_TOKEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of BLOCK_N keys of a head over all queries."""
    PARTS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    SCALE: tl.constexpr = D**-0.5
    i_head = tl.program_id(0) // PARTS
    key = tl.program_id(0) % PARTS * BLOCK_N
    i_b = (i_head // H).to(tl.int64)
    p_q += i_b * (R * Q_TOKEN) + i_head % H * D
    o_k = i_b * (N * KV_TOKEN) + i_head % H * D
    p_dout += i_b * (R * H * D) + i_head % H * D
    o_lse = i_head.to(tl.int64) * R
    b_k = _load(p_kv + o_k, key, N, KV_TOKEN, D, BLOCK_N, BLOCK_D, True)
    b_v = _load(p_kv + o_k + H * D, key, N, KV_TOKEN, D, BLOCK_N, BLOCK_D, True)
    b_dk = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    b_dv = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    for row in range(0, R, BLOCK_M):
        o_m = row + tl.arange(0, BLOCK_M)
        b_q = _load(p_q, row, R, Q_TOKEN, D, BLOCK_M, BLOCK_D, R % BLOCK_M > 0)
        b_dout = _load(p_dout, row, R, H * D, D, BLOCK_M, BLOCK_D, R % BLOCK_M > 0)
        lse = tl.load(p_lse + o_lse + o_m, mask=o_m < R, other=float("inf"))
        delta = tl.load(p_delta + o_lse + o_m, mask=o_m < R, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = tl.exp2(b_s * (SCALE * LOG2E) - lse[None, :])
        b_dv = tl.dot(b_p.to(b_q.dtype), b_dout, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        b_ds = b_p * (b_dp - delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    _store(p_dkv + o_k, b_dk * SCALE, key, N, KV_TOKEN, D)
    _store(p_dkv + o_k + H * D, b_dv, key, N, KV_TOKEN, D)
