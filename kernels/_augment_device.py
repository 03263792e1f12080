"""Device code of ``augment``: resizing passes, image statistics, one operation, and the fused last pass.

An image of a batch is described by one row of float64, exact for every integer and matrix (columns below). Work is
split by element e = (y * S + x) * 3 + c, so loads and stores run along memory. Launched
without fused multiply-adds, as Pillow has none (``FP_FUSION``).
Shapes: B batch, S output side, K taps, J images that need statistics.
"""

import triton
import triton.language as tl

START, STRIDE, HEIGHT, WIDTH, COLUMNS_FIRST, FLIP = (tl.constexpr(i) for i in range(6))
"""Byte of the crop's corner in the set, bytes of a source row, crop size, order of passes, mirror."""
FIRST, SECOND, OP_COLUMNS = tl.constexpr(6), tl.constexpr(15), tl.constexpr(9)
"""Two operations of nine columns: kind, argument, matrix (6), slot of the lookup table."""
SEPARATE, TOP, LEFT, ERASE_HEIGHT, ERASE_WIDTH, KEY = (tl.constexpr(i) for i in range(24, 30))
"""Whether the first operation is a pass of its own; the erased box and the key of its noise."""
COLUMNS = tl.constexpr(30)
LAM, REST, BOX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""The last row, of the batch: lambda, 1 - lambda, box (y0, y1, x0, x1)."""
NONE, LOOKUP, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, BRIGHTNESS, COLOR, SHARPNESS, WARP = (
    tl.constexpr(i) for i in range(10)
)
"""Kinds of operations; up to BRIGHTNESS (LOOKUP apart) a value decides alone."""
AUTO_CONTRAST, EQUALIZE, CONTRAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Statistics that become a lookup table."""
UNMIXED, MIXUP, CUTMIX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PRECISION_BITS, PRECISION = tl.constexpr(22), tl.constexpr(1 << 22)
"""Fixed point of Pillow's coefficients."""
HISTOGRAM = tl.constexpr(1024)
"""Bins kept for 3 * 256 values: a power of two."""


@triton.jit
def coefficients_kernel(rows, weights, first, S: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Pillow's antialiased bicubic coefficients (a = -0.5) in 1/2^22 and first taps, of one axis of one image."""
    image, axis = tl.program_id(0), tl.program_id(1)
    place = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    i = tl.minimum(place, S - 1)
    side = tl.load(rows + image * COLUMNS + HEIGHT + axis)
    scale = side / S
    stretch = tl.maximum(scale, 1.0)
    centre = (i.to(tl.float64) + 0.5) * scale
    begin = tl.maximum((centre - 2.0 * stretch + 0.5).to(tl.int32), 0)
    end = tl.minimum((centre + 2.0 * stretch + 0.5).to(tl.int32), side.to(tl.int32))
    tap = begin[:, None] + tl.arange(0, K)[None, :]
    x = tl.abs((tap.to(tl.float64) - centre[:, None] + 0.5) * (1.0 / stretch))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    value = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    value = tl.where(tap < end[:, None], value, 0.0)
    value = value / tl.sum(value, axis=1)[:, None] * PRECISION
    rounded = (value + tl.where(value < 0.0, -0.5, 0.5)).to(tl.int32)
    row = (image * 2 + axis) * S + i
    tl.store(weights + row[:, None] * K + tl.arange(0, K)[None, :], rounded, mask=place[:, None] < S)
    tl.store(first + row, begin, mask=place < S)


@triton.jit
def convolve_kernel(
    rows, weights, first, source, target, source_size, target_size,
    PASS: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One resizing pass: along rows or columns as the image's order says; the second pass mirrors what is to flip."""
    image = tl.program_id(0)
    row = rows + image * COLUMNS
    height, width = tl.load(row + HEIGHT).to(tl.int32), tl.load(row + WIDTH).to(tl.int32)
    down = (tl.load(row + COLUMNS_FIRST).to(tl.int32) + PASS) % 2 == 1
    if PASS == 0:
        source += tl.load(row + START).to(tl.int64)
        stride = tl.load(row + STRIDE).to(tl.int64)
        in_height, in_width = height, width
        out_height, out_width = tl.where(down, S, height), tl.where(down, width, S)
    else:
        source += image.to(tl.int64) * source_size
        in_height, in_width = tl.where(down, height, S), tl.where(down, S, width)
        stride = in_width.to(tl.int64) * 3
        out_height, out_width = S, S
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bytes_out = out_height * out_width * 3
    inside = e < bytes_out
    y, x, c = e // (out_width * 3), e // 3 % out_width, e % 3
    if PASS == 1:
        x = tl.where(tl.load(row + FLIP) != 0.0, out_width - 1 - x, x)
    place = (image * 2 + tl.where(down, 0, 1)) * S + tl.where(down, y, x)
    begin = tl.load(first + place, mask=inside, other=0)
    weights += place * K
    taps = tl.where(inside, tl.where(down, in_height, in_width) - begin, 0)
    step = tl.where(down, stride, 3)
    source += tl.where(down, x * 3, y * stride) + begin * step + c
    total = tl.zeros((BLOCK,), tl.int32)
    for k in range(K):
        value = tl.load(source + k * step, mask=k < taps, other=0).to(tl.int32)
        total += tl.load(weights + k, mask=inside, other=0) * value
    value = (total + PRECISION // 2) >> PRECISION_BITS
    value = tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8)
    if PASS == 0:  # up to the next sixteen, for which there is room: a thread's bytes then go in one store
        inside = e < (bytes_out + 15) // 16 * 16
    tl.store(target + image.to(tl.int64) * target_size + e, value, mask=inside)


@triton.jit
def _luma(pixel, mask):
    red = tl.load(pixel, mask=mask, other=0).to(tl.int32)
    green = tl.load(pixel + 1, mask=mask, other=0).to(tl.int32)
    blue = tl.load(pixel + 2, mask=mask, other=0).to(tl.int32)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def histogram_kernel(jobs, images, counts, lumas, S: tl.constexpr, BLOCK: tl.constexpr):
    """Add a block's values (256 c + v) and luma to the statistics of the image a job names."""
    job = tl.program_id(0)
    image = images + tl.load(jobs + job * 2).to(tl.int64) * (S * S * 3)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < S * S * 3
    value = tl.load(image + e, mask=inside, other=0).to(tl.int32)
    found = tl.histogram(value + 256 * (e % 3), HISTOGRAM, mask=inside)
    tl.atomic_add(counts + job * HISTOGRAM + tl.arange(0, HISTOGRAM), found, mask=tl.arange(0, HISTOGRAM) < 768)
    start = inside & (e % 3 == 0)
    tl.atomic_add(lumas + job, tl.sum(tl.where(start, _luma(image + e, start), 0)))


@triton.jit
def table_kernel(jobs, rows, counts, lumas, tables, slot, FIELD: tl.constexpr, S: tl.constexpr):
    """Turn an image's statistics into the lookup table of its first or second operation (FIELD), one channel."""
    job, c = tl.program_id(0), tl.program_id(1)
    v = tl.arange(0, 256)
    count = tl.load(counts + job * HISTOGRAM + c * 256 + v)
    what = tl.load(jobs + job * 2 + 1)
    if what == AUTO_CONTRAST:
        low = tl.min(tl.where(count > 0, v, 255)).to(tl.float64)
        high = tl.max(tl.where(count > 0, v, 0)).to(tl.float64)
        scale = 255.0 / tl.maximum(high - low, 1.0)
        stretched = tl.minimum(tl.maximum(v.to(tl.float64) * scale + -low * scale, 0.0), 255.0)
        table = tl.where(high > low, stretched.to(tl.int32), v)
    elif what == EQUALIZE:
        last = tl.max(tl.where(count > 0, v, 0))
        step = (S * S - tl.sum(tl.where(v == last, count, 0))) // 255
        below = tl.cumsum(count) - count
        table = tl.where(step > 0, tl.minimum((below + step // 2) // tl.maximum(step, 1), 255), v)
    else:
        mean = (tl.load(lumas + job).to(tl.float64) / (S * S) + 0.5).to(tl.int32)
        factor = tl.load(rows + tl.load(jobs + job * 2).to(tl.int64) * COLUMNS + FIELD + 1).to(tl.float32)
        table = _blend(mean.to(tl.float32), v.to(tl.float32), factor)
    tl.store(tables + ((slot + job) * 3 + c) * 256 + v, table.to(tl.uint8))


@triton.jit
def _blend(degenerate, value, factor):
    """Pillow's ``Image.blend`` in float32: clipped and truncated."""
    blended = degenerate + factor * (value - degenerate)
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32)


@triton.jit
def _cubic(v1, v2, v3, v4, t):
    return v2 + t * ((v3 - v1) + t * ((2.0 * (v1 - v2) + v3 - v4) + t * (-v1 + v2 - v3 + v4)))


@triton.jit
def _tap_row(image, y, x, c, t, inside, S: tl.constexpr):
    row = image + tl.minimum(tl.maximum(y, 0), S - 1) * (S * 3) + c
    v1 = tl.load(row + tl.minimum(tl.maximum(x - 1, 0), S - 1) * 3, mask=inside, other=0).to(tl.float64)
    v2 = tl.load(row + tl.minimum(tl.maximum(x, 0), S - 1) * 3, mask=inside, other=0).to(tl.float64)
    v3 = tl.load(row + tl.minimum(tl.maximum(x + 1, 0), S - 1) * 3, mask=inside, other=0).to(tl.float64)
    v4 = tl.load(row + tl.minimum(tl.maximum(x + 2, 0), S - 1) * 3, mask=inside, other=0).to(tl.float64)
    return _cubic(v1, v2, v3, v4, t)


@triton.jit
def _warp(image, y, x, c, mask, matrix, S: tl.constexpr):
    """Pillow's bicubic affine transform (a = -1) in float64; outside the image (124, 116, 104)."""
    x_out, y_out = x.to(tl.float64) + 0.5, y.to(tl.float64) + 0.5
    x_in = tl.load(matrix) * x_out + tl.load(matrix + 1) * y_out + tl.load(matrix + 2)
    y_in = tl.load(matrix + 3) * x_out + tl.load(matrix + 4) * y_out + tl.load(matrix + 5)
    inside = mask & (x_in >= 0.0) & (x_in < S) & (y_in >= 0.0) & (y_in < S)
    x_in, y_in = x_in - 0.5, y_in - 0.5
    left, top = tl.floor(x_in), tl.floor(y_in)
    t, column, row = x_in - left, left.to(tl.int32), top.to(tl.int32)
    r1 = _tap_row(image, row - 1, column, c, t, inside, S)
    r2 = _tap_row(image, row, column, c, t, inside, S)
    r3 = _tap_row(image, row + 1, column, c, t, inside, S)
    r4 = _tap_row(image, row + 2, column, c, t, inside, S)
    value = _cubic(r1, r2, r3, r4, y_in - top)
    fill = tl.where(c == 0, 124, tl.where(c == 1, 116, 104))
    return tl.where(inside, tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32), fill)


@triton.jit
def _point(value, kind, argument):
    """An operation that looks at the value alone; NONE keeps it."""
    whole = argument.to(tl.int32)
    if kind == INVERT:
        value = 255 - value
    elif kind == POSTERIZE:
        value = value & whole
    elif kind == SOLARIZE:
        value = tl.where(value >= whole, 255 - value, value)
    elif kind == SOLARIZE_ADD:
        value = tl.where(value < 128, value + whole, value)
    elif kind == BRIGHTNESS:
        value = _blend(0.0, value.to(tl.float32), argument.to(tl.float32))
    return value


@triton.jit
def _operate(image, e, mask, op, tables, S: tl.constexpr):
    """The values (int32) of elements e after the operation that nine columns at ``op`` describe."""
    kind, argument = tl.load(op).to(tl.int32), tl.load(op + 1)
    y, x, c = e // (S * 3), e // 3 % S, e % 3
    pixel = image + (y * S + x) * 3
    value = tl.load(image + e, mask=mask, other=0).to(tl.int32)
    if kind == WARP:
        value = _warp(image, y, x, c, mask, op + 2, S)
    elif kind == LOOKUP:
        table = tables + (tl.load(op + 8).to(tl.int32) * 3 + c) * 256
        value = tl.load(table + value, mask=mask, other=0).to(tl.int32)
    elif kind == COLOR:
        value = _blend(_luma(pixel, mask).to(tl.float32), value.to(tl.float32), argument.to(tl.float32))
    elif kind == SHARPNESS:
        middle = mask & (y > 0) & (y < S - 1) & (x > 0) & (x < S - 1)
        total = 4 * value
        for i in tl.static_range(9):
            near = pixel + c + (i // 3 - 1) * (S * 3) + (i % 3 - 1) * 3
            total += tl.load(near, mask=middle, other=0).to(tl.int32)
        smooth = tl.where(middle, (2 * total + 13) // 26, value)
        value = _blend(smooth.to(tl.float32), value.to(tl.float32), argument.to(tl.float32))
    else:
        value = _point(value, kind, argument)
    return value


@triton.jit
def operate_kernel(jobs, rows, crops, operated, tables, S: tl.constexpr, BLOCK: tl.constexpr):
    """The first operation as a pass of its own, for images whose second one needs more than the value."""
    image = tl.load(jobs + tl.program_id(0)).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < S * S * 3
    value = _operate(crops + image * (S * S * 3), e, inside, rows + image * COLUMNS + FIRST, tables, S)
    tl.store(operated + image * (S * S * 3) + e, value.to(tl.uint8), mask=inside)


@triton.jit
def _finished(image, e, mask, rows, crops, operated, tables, quantiles, scale, offset, S: tl.constexpr):
    """One image's normalised, erased values before mixing (float32)."""
    row = rows + image * COLUMNS
    base = image.to(tl.int64) * (S * S * 3)
    y, x, c = e // (S * 3), e // 3 % S, e % 3
    if tl.load(row + SEPARATE) != 0.0:
        value = _operate(operated + base, e, mask, row + SECOND, tables, S)
    else:
        value = _operate(crops + base, e, mask, row + FIRST, tables, S)
        value = _point(value, tl.load(row + SECOND).to(tl.int32), tl.load(row + SECOND + 1))
    normal = value.to(tl.float32) * tl.load(scale + c) + tl.load(offset + c)
    height = tl.load(row + ERASE_HEIGHT).to(tl.int32)
    if height > 0:
        top, left = tl.load(row + TOP).to(tl.int32), tl.load(row + LEFT).to(tl.int32)
        right = left + tl.load(row + ERASE_WIDTH).to(tl.int32)
        erased = mask & (y >= top) & (y < top + height) & (x >= left) & (x < right)
        bits = (e.to(tl.uint32) * 0x9E3779B1) ^ tl.load(row + KEY).to(tl.int64).to(tl.uint32)
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        noise = tl.load(quantiles + (bits >> 16), mask=erased, other=0.0)
        normal = tl.where(erased, noise, normal)
    return normal


@triton.jit
def finish_kernel(
    rows, crops, operated, tables, quantiles, scale, offset, images, patches, B,
    MIX: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Operations, normalise, erase and mix of an image and its partner B - 1 - b, written to both layouts.

    ``images`` [B, S, S, 3]; ``patches`` [B (S / P)^2, 3 P^2] in the order of a patch embedding's weight; None = not
    wanted.
    """
    own = tl.program_id(0)
    other = B - 1 - own
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < S * S * 3
    u = _finished(own, e, mask, rows, crops, operated, tables, quantiles, scale, offset, S)
    v = _finished(other, e, mask, rows, crops, operated, tables, quantiles, scale, offset, S)
    y, x, c = e // (S * 3), e // 3 % S, e % 3
    mix = rows + B * COLUMNS
    if MIX == MIXUP:
        lam, rest = tl.load(mix + LAM).to(tl.float32), tl.load(mix + REST).to(tl.float32)
        u, v = u * lam + v * rest, v * lam + u * rest
    elif MIX == CUTMIX:
        y0, y1 = tl.load(mix + BOX).to(tl.int32), tl.load(mix + BOX + 1).to(tl.int32)
        x0, x1 = tl.load(mix + BOX + 2).to(tl.int32), tl.load(mix + BOX + 3).to(tl.int32)
        pasted = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
        u, v = tl.where(pasted, v, u), tl.where(pasted, u, v)
    if images is not None:
        tl.store(images + own.to(tl.int64) * (S * S * 3) + e, u, mask=mask)
        tl.store(images + other.to(tl.int64) * (S * S * 3) + e, v, mask=mask)
    if patches is not None:
        place = ((y // P) * (S // P) + x // P) * (3 * P * P) + c * (P * P) + y % P * P + x % P
        tl.store(patches + own.to(tl.int64) * (S * S * 3) + place, u, mask=mask)
        tl.store(patches + other.to(tl.int64) * (S * S * 3) + place, v, mask=mask)
