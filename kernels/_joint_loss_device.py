"""Device code of ``joint_loss`` (formulas and bytes there): one program per row, float32 arithmetic.

Shapes: B batch, K classes, J the teacher's classes, S statistics of a row.
Names: i_ index, o_ offsets, m_ mask, p_ pointer, b_ block of a row in registers.
"""

import triton
import triton.language as tl

NUM_STATS = 11
CLS_LOSS, CLS_NORM, DIST_LOSS, DIST_NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
CLS_MAX, CLS_LOG_SUM, CLS_MASS = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
DIST_MAX, DIST_LOG_SUM = tl.constexpr(7), tl.constexpr(8)
TEACHER_MAX, TEACHER_LOG_SUM = tl.constexpr(9), tl.constexpr(10)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """Compute exp(x), 0 below 2^-126: tl.exp needs three more instructions for those."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _load_logits(p_row, p_shift, scale, o_k, o_column, m_k):
    """Load [BLOCK] scale * row[column] + shift[k], -inf where masked."""
    b_x = tl.load(p_row + o_column, mask=m_k, other=-float("inf")).to(tl.float32) * scale
    if p_shift is not None:
        b_x += tl.load(p_shift + o_k, mask=m_k, other=0.0)
    return b_x


@triton.jit
def _value_at(p_row, p_shift, i, K: tl.constexpr):
    """Load row[i] + shift[i].

    NaN if i is no class, so that a bad label shows in the loss.
    """
    m_class = (i >= 0) & (i < K)
    value = tl.load(p_row + i, mask=m_class, other=float("nan")).to(tl.float32)
    if p_shift is not None:
        value += tl.load(p_shift + i, mask=m_class, other=0.0)
    return value


@triton.jit
def _log_sum_exp(p_row, p_shift, scale, K: tl.constexpr, BLOCK: tl.constexpr):
    """Return maximum and log sum exp(x - maximum) of a row.

    Their sum would lose digits of large logits.
    """
    row_max = -float("inf")
    row_sum = 0.0
    for i_k in range(0, K, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)
        b_x = _load_logits(p_row, p_shift, scale, o_k, o_k, o_k < K)
        new_max = tl.maximum(row_max, tl.max(b_x, 0))
        centre = tl.where(new_max == -float("inf"), 0.0, new_max)
        row_sum = row_sum * _exp(row_max - centre) + tl.sum(_exp(b_x - centre), 0)
        row_max = new_max
    return row_max, tl.log(row_sum)


@triton.jit
def _spread_sums(p_row, p_shift, p_weights, row_max, K: tl.constexpr, BLOCK: tl.constexpr):
    """Sum weight, weight * (x - maximum) and weight * softplus(x) over all classes."""
    weight_sum = 0.0
    logit_sum = 0.0
    softplus_sum = 0.0
    for i_k in range(0, K, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)
        b_x = _load_logits(p_row, p_shift, 1.0, o_k, o_k, o_k < K)
        b_weight = tl.where(o_k < K, 1.0, 0.0)
        if p_weights is not None:
            b_weight = tl.load(p_weights + o_k, mask=o_k < K, other=0.0)
        weight_sum += tl.sum(b_weight, 0)
        logit_sum += tl.sum(tl.where(o_k < K, b_x - row_max, 0.0) * b_weight, 0)
        softplus_sum += tl.sum((tl.maximum(b_x, 0.0) + tl.log(1.0 + _exp(-tl.abs(b_x)))) * b_weight, 0)
    return weight_sum, logit_sum, softplus_sum


@triton.jit
def _teacher_decision(p_row, p_class_map, J: tl.constexpr, BLOCK: tl.constexpr):
    """Return the student class of the first largest teacher logit."""
    best = -float("inf")
    decision = 0
    for i_j in range(0, J, BLOCK):
        o_j = i_j + tl.arange(0, BLOCK)
        b_x = _load_logits(p_row, None, 1.0, o_j, o_j, o_j < J)
        block_best, i_best = tl.max(b_x, 0, return_indices=True)
        decision = tl.where(block_best > best, i_j + i_best, decision)
        best = tl.maximum(best, block_best)
    if p_class_map is not None:
        decision = tl.load(p_class_map + tl.minimum(decision, J - 1)).to(tl.int32)
    return decision


@triton.jit
def _soft_divergence(
    p_dist, p_teacher, p_log_weights, p_class_map, inverse_tau,
    dist_max, dist_log_sum, teacher_max, teacher_log_sum,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute KL(teacher || DIST) of a row at the temperature.

    Classes in the teacher's order.
    """
    divergence = 0.0
    for i_k in range(0, K, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)
        o_column = _mapped(p_class_map, o_k, K)
        b_log_p = _load_logits(p_teacher, p_log_weights, inverse_tau, o_k, o_k, o_k < K) - teacher_max - teacher_log_sum
        b_log_q = _load_logits(p_dist, None, inverse_tau, o_k, o_column, o_k < K) - dist_max - dist_log_sum
        b_p = _exp(b_log_p)
        divergence += tl.sum(tl.where(b_p > 0, b_p * (b_log_p - b_log_q), 0.0), 0)
    return divergence


@triton.jit
def _mapped(p_class_map, o_k, K: tl.constexpr):
    """Return the student columns of the teacher's classes."""
    o_column = o_k
    if p_class_map is not None:
        o_column = tl.load(p_class_map + o_k, mask=o_k < K, other=0).to(tl.int32)
    return o_column


@triton.jit
def _upstream(p_grad_loss, p_grad_term, share):
    """Return a term's upstream gradient.

    Its part of the loss's, plus its own; None = not used.
    """
    gradient = 0.0
    if p_grad_loss is not None:
        gradient += share * tl.load(p_grad_loss)
    if p_grad_term is not None:
        gradient += tl.load(p_grad_term)
    return gradient


@triton.jit
def joint_loss_fwd_kernel(
    p_cls,  # [B, K] logits of the CLS head
    p_dist,  # [B, K] logits of the DIST head
    p_teacher,  # [B, J] logits of the teacher
    p_labels,  # [B] class
    p_partner,  # [B] class of the image mixed in, or None
    p_lam,  # [] weight of the label, or None
    p_weights,  # [K] DRW weights; soft: [K] their logs in the teacher's order; or None
    p_cls_weights,  # [K] or None
    p_log_prior,  # [K] or None
    p_class_map,  # [J] teacher class -> student class, or None
    p_decision,  # [B] out: the teacher's decision
    p_stats,  # [S, B] out
    B, smoothing, inverse_tau,
    CLS_STRIDE: tl.constexpr, DIST_STRIDE: tl.constexpr, TEACHER_STRIDE: tl.constexpr,
    K: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr, SOFT: tl.constexpr, BCE: tl.constexpr,
):  # fmt: skip
    """Compute losses and softmax statistics of row b in program b."""
    i_b = tl.program_id(0).to(tl.int64)
    p_cls += i_b * CLS_STRIDE
    p_dist += i_b * DIST_STRIDE
    p_teacher += i_b * TEACHER_STRIDE
    p_stats += i_b

    label = tl.load(p_labels + i_b)
    row_max = 0.0
    log_sum = 0.0
    if not BCE:
        row_max, log_sum = _log_sum_exp(p_cls, p_log_prior, 1.0, K, BLOCK)
    norm = 1.0
    if p_cls_weights is not None:
        norm = _value_at(p_cls_weights, None, label, K)
    aligned = norm * (_value_at(p_cls, p_log_prior, label, K) - row_max)
    if p_partner is not None:
        partner = tl.load(p_partner + i_b)
        lam = tl.load(p_lam).to(tl.float32)
        partner_weight = 1.0
        if p_cls_weights is not None:
            partner_weight = _value_at(p_cls_weights, None, partner, K)
        partner_logit = _value_at(p_cls, p_log_prior, partner, K) - row_max
        aligned = lam * aligned + (1 - lam) * partner_weight * partner_logit
        norm = lam * norm + (1 - lam) * partner_weight
    mass = norm
    if SMOOTH or BCE:
        weight_sum, logit_sum, softplus_sum = _spread_sums(p_cls, p_log_prior, p_cls_weights, row_max, K, BLOCK)
    if SMOOTH:
        aligned = (1 - smoothing) * aligned + smoothing / K * logit_sum
        mass = (1 - smoothing) * norm + smoothing / K * weight_sum
    cls_loss = mass * log_sum - aligned
    if BCE:
        cls_loss = (softplus_sum - aligned) / K
        norm = 1.0
    tl.store(p_stats + CLS_LOSS * B, cls_loss)
    tl.store(p_stats + CLS_NORM * B, norm)
    tl.store(p_stats + CLS_MAX * B, row_max)
    tl.store(p_stats + CLS_LOG_SUM * B, log_sum)
    tl.store(p_stats + CLS_MASS * B, mass)

    dist_max, dist_log_sum = _log_sum_exp(p_dist, None, inverse_tau, K, BLOCK)
    teacher_max = 0.0
    teacher_log_sum = 0.0
    decision = 0
    dist_norm = 1.0
    if SOFT:
        teacher_max, teacher_log_sum = _log_sum_exp(p_teacher, p_weights, inverse_tau, J, BLOCK)
        divergence = _soft_divergence(
            p_dist, p_teacher, p_weights, p_class_map, inverse_tau, dist_max, dist_log_sum, teacher_max,
            teacher_log_sum, K, BLOCK,
        )  # fmt: skip
        dist_loss = divergence / (inverse_tau * inverse_tau * K)
    else:
        decision = _teacher_decision(p_teacher, p_class_map, J, BLOCK)
        if p_weights is not None:
            dist_norm = _value_at(p_weights, None, decision, K)
        dist_loss = dist_norm * (dist_log_sum - (_value_at(p_dist, None, decision, K) - dist_max))
    tl.store(p_decision + i_b, decision)
    tl.store(p_stats + DIST_LOSS * B, dist_loss)
    tl.store(p_stats + DIST_NORM * B, dist_norm)
    tl.store(p_stats + DIST_MAX * B, dist_max)
    tl.store(p_stats + DIST_LOG_SUM * B, dist_log_sum)
    tl.store(p_stats + TEACHER_MAX * B, teacher_max)
    tl.store(p_stats + TEACHER_LOG_SUM * B, teacher_log_sum)


@triton.jit
def joint_loss_reduce_kernel(
    p_stats,  # [S, B]
    p_normaliser,  # [] replaces the DIST norm, or None
    p_loss, p_cls_loss, p_dist_loss,  # [] out
    p_norms,  # [2] out: divisors of the CLS and the DIST sums
    alpha, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the rows in one program, in a fixed order."""
    b_cls = tl.zeros((BLOCK,), tl.float32)
    b_cls_norm = tl.zeros((BLOCK,), tl.float32)
    b_dist = tl.zeros((BLOCK,), tl.float32)
    b_dist_norm = tl.zeros((BLOCK,), tl.float32)
    for i_b in range(0, B, BLOCK):
        o_b = i_b + tl.arange(0, BLOCK)
        b_cls += tl.load(p_stats + CLS_LOSS * B + o_b, mask=o_b < B, other=0.0)
        b_cls_norm += tl.load(p_stats + CLS_NORM * B + o_b, mask=o_b < B, other=0.0)
        b_dist += tl.load(p_stats + DIST_LOSS * B + o_b, mask=o_b < B, other=0.0)
        b_dist_norm += tl.load(p_stats + DIST_NORM * B + o_b, mask=o_b < B, other=0.0)
    cls_norm = tl.sum(b_cls_norm, 0)
    dist_norm = tl.sum(b_dist_norm, 0)
    if p_normaliser is not None:
        dist_norm = tl.load(p_normaliser)
    cls_norm = tl.where(cls_norm == 0, float("inf"), cls_norm)  # all weights 0: the mean is 0, not NaN
    dist_norm = tl.where(dist_norm == 0, float("inf"), dist_norm)
    cls_loss = tl.sum(b_cls, 0) / cls_norm
    dist_loss = tl.sum(b_dist, 0) / dist_norm
    tl.store(p_cls_loss, cls_loss)
    tl.store(p_dist_loss, dist_loss)
    tl.store(p_loss, (1 - alpha) * cls_loss + alpha * dist_loss)
    tl.store(p_norms, cls_norm)
    tl.store(p_norms + 1, dist_norm)


@triton.jit
def joint_loss_bwd_kernel(
    p_cls, p_dist, p_teacher, p_labels, p_partner, p_lam, p_weights, p_cls_weights, p_log_prior, p_class_map,
    p_decision,  # [B]
    p_stats,  # [S, B]
    p_norms,  # [2]
    p_grad_loss, p_grad_cls_loss, p_grad_dist_loss,  # [] or None: _upstream gradients
    p_grad_cls,  # [B, K] out
    p_grad_dist,  # [B, K] out
    B, smoothing, inverse_tau, alpha,
    CLS_STRIDE: tl.constexpr, DIST_STRIDE: tl.constexpr, TEACHER_STRIDE: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, SOFT: tl.constexpr, BCE: tl.constexpr,
):  # fmt: skip
    """Compute block j of both gradients of row b in program (b, j)."""
    i_b = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_k = o_k < K
    p_stats += i_b

    b_target = tl.where(o_k == tl.load(p_labels + i_b), 1.0, 0.0)
    if p_partner is not None:
        lam = tl.load(p_lam).to(tl.float32)
        b_target = lam * b_target + (1 - lam) * tl.where(o_k == tl.load(p_partner + i_b), 1.0, 0.0)
    b_target = (1 - smoothing) * b_target + smoothing / K
    b_x = _load_logits(p_cls + i_b * CLS_STRIDE, p_log_prior, 1.0, o_k, o_k, m_k)
    b_weight = 1.0
    if p_cls_weights is not None:
        b_weight = tl.load(p_cls_weights + o_k, mask=m_k, other=0.0)
    if BCE:
        b_grad = (tl.sigmoid(b_x) - b_target) * b_weight / K
    else:
        shift = tl.load(p_stats + CLS_MAX * B)
        b_p = _exp(b_x - shift - tl.load(p_stats + CLS_LOG_SUM * B))
        b_grad = b_p * tl.load(p_stats + CLS_MASS * B) - b_target * b_weight
    scale = _upstream(p_grad_loss, p_grad_cls_loss, 1 - alpha) / tl.load(p_norms)
    tl.store(p_grad_cls + i_b * K + o_k, (b_grad * scale).to(p_grad_cls.dtype.element_ty), mask=m_k)

    scale = _upstream(p_grad_loss, p_grad_dist_loss, alpha) / tl.load(p_norms + 1)
    o_column = o_k
    if SOFT:
        o_column = _mapped(p_class_map, o_k, K)
    b_x = _load_logits(p_dist + i_b * DIST_STRIDE, None, inverse_tau, o_k, o_column, m_k)
    b_q = _exp(b_x - tl.load(p_stats + DIST_MAX * B) - tl.load(p_stats + DIST_LOG_SUM * B))
    if SOFT:
        b_t = _load_logits(p_teacher + i_b * TEACHER_STRIDE, p_weights, inverse_tau, o_k, o_k, m_k)
        b_p = _exp(b_t - tl.load(p_stats + TEACHER_MAX * B) - tl.load(p_stats + TEACHER_LOG_SUM * B))
        b_grad = (b_q - b_p) / (inverse_tau * K)
    else:
        b_target = tl.where(o_k == tl.load(p_decision + i_b), 1.0, 0.0)
        b_grad = (b_q - b_target) * tl.load(p_stats + DIST_NORM * B)
    tl.store(p_grad_dist + i_b * K + o_column, (b_grad * scale).to(p_grad_dist.dtype.element_ty), mask=m_k)
