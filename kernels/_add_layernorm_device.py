"""Device code of ``add_layernorm``: tiles of ROWS whole rows, float32 statistics.

Shapes: B samples, M rows (B times TOKENS), K of the samples, D width, BLOCK_D its power of two, P programs.
"""

import triton
import triton.language as tl


@triton.jit
def _place(p_rows, o_m, o_d, m_block, M, TOKENS: tl.constexpr, D: tl.constexpr):
    """Return offsets and mask of rows of x in a tensor of K samples.

    ``p_rows`` None = all samples.
    """
    o_row = o_m.to(tl.int64)
    if p_rows is not None:
        i_k = tl.load(p_rows + o_m // TOKENS, mask=o_m < M, other=-1)
        m_block = m_block & (i_k >= 0)[:, None]
        o_row = i_k.to(tl.int64) * TOKENS + o_m % TOKENS
    return o_row[:, None] * D + o_d[None, :], m_block


@triton.jit
def add_layernorm_fwd_kernel(
    p_x,  # [M, D]
    p_branch,  # [M, D], or of K samples
    p_branch_bias,  # [D], or None
    p_branch_rows,  # [B] int32: a sample's index in the branch of K samples, or -1; or None
    p_normed_rows,  # [B] int32: a sample's index in the output, or -1; or None
    p_scale,  # [B] float32, or None
    p_weight,  # [D]
    p_bias,  # [D]
    p_residual,  # [M, D] out
    p_normed,  # [M, D] out
    p_mean,  # [M] float32 out
    p_rstd,  # [M] float32 out
    M, eps, TOKENS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the scaled branch and normalise; program i: rows i ROWS .. (i + 1) ROWS."""
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_block = (o_m < M)[:, None] & m_d[None, :]
    o_block = o_m.to(tl.int64)[:, None] * D + o_d[None, :]
    b_r = tl.load(p_x + o_block, mask=m_block, other=0.0).to(tl.float32)
    o_branch, m_kept = _place(p_branch_rows, o_m, o_d, m_block, M, TOKENS, D)
    if p_scale is not None:
        scale = tl.load(p_scale + o_m // TOKENS, mask=o_m < M, other=0.0)
        m_kept = m_kept & (scale != 0)[:, None]
    b_branch = tl.load(p_branch + o_branch, mask=m_kept, other=0.0).to(tl.float32)
    if p_branch_bias is not None:
        branch_bias = tl.load(p_branch_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_branch = tl.where(m_kept, b_branch + branch_bias[None, :], 0.0)
    if p_scale is not None:
        b_branch *= scale[:, None]
    b_r += b_branch
    b_stored = b_r.to(p_residual.dtype.element_ty)
    tl.store(p_residual + o_block, b_stored, mask=m_block)
    b_r = b_stored.to(tl.float32)
    mean = tl.sum(b_r, 1) / D
    b_centred = tl.where(m_block, b_r - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / D + eps)
    weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_n = b_centred * rstd[:, None] * weight[None, :] + bias[None, :]
    o_normed, m_normed = _place(p_normed_rows, o_m, o_d, m_block, M, TOKENS, D)
    tl.store(p_normed + o_normed, b_n.to(p_normed.dtype.element_ty), mask=m_normed)
    tl.store(p_mean + o_m, mean, mask=o_m < M)
    tl.store(p_rstd + o_m, rstd, mask=o_m < M)


@triton.jit
def add_layernorm_bwd_kernel(
    p_dresidual,  # [M, D], or None
    p_dnormed,  # [M, D], or of K samples
    p_residual,  # [M, D]
    p_branch_rows,  # [B] int32, or None
    p_normed_rows,  # [B] int32, or None
    p_scale,  # [B] float32, or None
    p_weight,  # [D]
    p_mean,  # [M] float32
    p_rstd,  # [M] float32
    p_dx,  # [M, D] out
    p_dbranch,  # [M, D] out, or of K samples, or None where it is dx
    p_sums,  # [P, 2, D] float32 out: this program's partial dweight and dbias; [P, 3, D] with the branch's bias
    M, TOKENS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
):  # fmt: skip
    """Compute dx, dbranch and partial sums.

    Program i: blocks i, i + P, i + 2 P .. of ROWS rows.
    """
    i_p = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_dbranch_bias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for row in tl.range(i_p * ROWS, M, tl.num_programs(0) * ROWS, num_stages=STAGES):
        o_m = row + tl.arange(0, ROWS)
        m_block = (o_m < M)[:, None] & m_d[None, :]
        o_block = o_m.to(tl.int64)[:, None] * D + o_d[None, :]
        o_normed, m_normed = _place(p_normed_rows, o_m, o_d, m_block, M, TOKENS, D)
        b_dn = tl.load(p_dnormed + o_normed, mask=m_normed, other=0.0).to(tl.float32)
        b_r = tl.load(p_residual + o_block, mask=m_block, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + o_m, mask=o_m < M, other=0.0)
        rstd = tl.load(p_rstd + o_m, mask=o_m < M, other=0.0)
        b_h = tl.where(m_block, (b_r - mean[:, None]) * rstd[:, None], 0.0)
        b_g = b_dn * weight[None, :]
        mean_g = tl.sum(b_g, 1) / D
        mean_gh = tl.sum(b_g * b_h, 1) / D
        b_dx = (b_g - mean_g[:, None] - b_h * mean_gh[:, None]) * rstd[:, None]
        if p_dresidual is not None:
            b_dx += tl.load(p_dresidual + o_block, mask=m_block, other=0.0).to(tl.float32)
        tl.store(p_dx + o_block, b_dx.to(p_dx.dtype.element_ty), mask=m_block)
        if p_dbranch is not None:
            if p_scale is not None:
                b_dx *= tl.load(p_scale + o_m // TOKENS, mask=o_m < M, other=0.0)[:, None]
            o_branch, m_kept = _place(p_branch_rows, o_m, o_d, m_block, M, TOKENS, D)
            tl.store(p_dbranch + o_branch, b_dx.to(p_dbranch.dtype.element_ty), mask=m_kept)
            if BRANCH_BIAS and p_branch_rows is not None:
                b_dx = tl.where(m_kept, b_dx, 0.0)
        if BRANCH_BIAS:
            b_dbranch_bias += b_dx
        b_dweight += b_dn * b_h
        b_dbias += b_dn
    p_share = p_sums + i_p.to(tl.int64) * (3 if BRANCH_BIAS else 2) * D + o_d
    tl.store(p_share, tl.sum(b_dweight, 0), mask=m_d)
    tl.store(p_share + D, tl.sum(b_dbias, 0), mask=m_d)
    if BRANCH_BIAS:
        tl.store(p_share + 2 * D, tl.sum(b_dbranch_bias, 0), mask=m_d)
