"""Device code of ``augment``: resizing passes, image statistics, one operation, and the fused last pass.

Each image of a batch is described by one row of float64, exact for every integer and matrix (columns below). Work is
split by pixel p = y * S + x, whose three values use the same addresses and weights; between the passes a pixel is one
int32, red in the lowest byte. A program computes BLOCK pixels, STEP at a time, one per thread: adjacent threads then
read adjacent pixels, and layouts need no conversion inside a loop. Launched without fused multiply-adds, as Pillow has
none (``FP_FUSION``). Arguments whose alignment or value changes between batches are not specialised: each variant would
be compiled while the step waits for data.
Shapes: B batch, S output side, K taps, J images that need statistics.
"""

import triton
import triton.language as tl

START, STRIDE, HEIGHT, WIDTH, COLUMNS_FIRST, FLIP = (tl.constexpr(i) for i in range(6))
"""Byte offset of the crop's corner in the set, bytes of a source row, crop size, order of passes, mirror."""
FIRST, SECOND = tl.constexpr(6), tl.constexpr(15)
"""Two operations of nine columns: kind, argument, matrix (6), index of the lookup table."""
SEPARATE, TOP, LEFT, ERASE_HEIGHT, ERASE_WIDTH, KEY = (tl.constexpr(i) for i in range(24, 30))
"""Whether the first operation is a separate pass; the erased box and the key of its noise."""
COLUMNS = tl.constexpr(30)
LAM, REST, BOX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Columns of the last row, which describes the batch: lambda, 1 - lambda, box (y0, y1, x0, x1)."""
NONE, LOOKUP, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, BRIGHTNESS, COLOR, SHARPNESS, WARP = (
    tl.constexpr(i) for i in range(10)
)
"""Kinds of operations; those up to BRIGHTNESS, except LOOKUP, depend on a pixel's value alone."""
AUTO_CONTRAST, EQUALIZE, CONTRAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Operations that turn an image's statistics into a lookup table."""
UNMIXED, MIXUP, CUTMIX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PRECISION_BITS, PRECISION = tl.constexpr(22), tl.constexpr(1 << 22)
"""Fixed-point precision of Pillow's coefficients."""
BIAS, TWO_52 = tl.constexpr(1024), tl.constexpr(2.0**52)
TWO_52_BITS, FILL = tl.constexpr(0x433 << 52), tl.constexpr(124 | 116 << 8 | 104 << 16)
"""Bits of 2^52, whose last mantissa bit is worth 1; the packed colour outside an image."""


@triton.jit
def coefficients_kernel(rows, weights, first, S: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Compute Pillow's antialiased bicubic coefficients of one axis.

    With a = -0.5, in 1/2^22, and first taps.
    """
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
    weight = ((image * 2 + axis) * K + tl.arange(0, K)[None, :]) * S + i[:, None]
    tl.store(weights + weight, rounded, mask=place[:, None] < S)
    tl.store(first + (image * 2 + axis) * S + i, begin, mask=place < S)


@triton.jit(do_not_specialize_on_alignment=["source"])
def convolve_kernel(
    rows, weights, first, source, target, source_size, target_size,
    PASS: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Resize along rows or columns, in the image's order of passes.

    The second pass also mirrors.

    The first pass reads bytes of the set, the second the first's pixels; the sizes are of an image, in pixels.
    """
    image = tl.program_id(0)
    row = rows + image * COLUMNS
    height, width = tl.load(row + HEIGHT).to(tl.int32), tl.load(row + WIDTH).to(tl.int32)
    down = (tl.load(row + COLUMNS_FIRST).to(tl.int32) + PASS) % 2 == 1
    if PASS == 0:
        source += tl.load(row + START).to(tl.int64)
        stride, across = tl.load(row + STRIDE).to(tl.int32), 3
        out_height, out_width = tl.where(down, S, height), tl.where(down, width, S)
    else:
        source += image.to(tl.int64) * source_size
        stride, across = tl.where(down, S, width), 1
        out_height, out_width = S, S
    axis, length, step = tl.where(down, 0, 1), tl.where(down, height, width), tl.where(down, stride, across)
    weights += (image * 2 + axis) * (K * S)
    first += (image * 2 + axis) * S
    target += image.to(tl.int64) * target_size
    pixels_out = out_height * out_width
    for start in range(0, BLOCK, STEP):
        p = tl.program_id(1) * BLOCK + start + tl.arange(0, STEP)
        y, x = p // out_width, p % out_width
        if PASS == 1:
            x = tl.where(tl.load(row + FLIP) != 0.0, out_width - 1 - x, x)
        i = tl.minimum(tl.where(down, y, x), S - 1)
        begin = tl.load(first + i)
        taps = tl.where(p < pixels_out, length - begin, 0)
        weight = weights + i
        pixel = source + (tl.where(down, x * across, y * stride) + begin * step)
        red = tl.full((STEP,), PRECISION // 2, tl.int32)
        green, blue = red, red
        for k in range(tl.maximum(4 * length // S, 4) + 1):  # taps of this image's support; K is of the whole batch
            w = tl.load(weight)
            if PASS == 0:
                r = tl.load(pixel, mask=k < taps, other=0).to(tl.int32)
                g = tl.load(pixel + 1, mask=k < taps, other=0).to(tl.int32)
                b = tl.load(pixel + 2, mask=k < taps, other=0).to(tl.int32)
            else:
                r, g, b = _unpack(tl.load(pixel, mask=k < taps, other=0))
            red += w * r
            green += w * g
            blue += w * b
            weight += S
            pixel += step
        tl.store(target + p, _pack(_byte(red), _byte(green), _byte(blue)), mask=p < pixels_out)


@triton.jit
def _byte(total):
    """Round a fixed-point sum to a byte as Pillow does; the sum starts at one half."""
    return tl.minimum(tl.maximum(total >> PRECISION_BITS, 0), 255)


@triton.jit
def _pack(red, green, blue):
    return red | (green << 8) | (blue << 16)


@triton.jit
def _unpack(pixel):
    return pixel & 255, (pixel >> 8) & 255, pixel >> 16


@triton.jit
def _luma(red, green, blue):
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit(do_not_specialize_on_alignment=["jobs"])
def histogram_kernel(jobs, images, counts, lumas, S: tl.constexpr, BLOCK: tl.constexpr):
    """Add a block's values and luma to the statistics of a job's image.

    A value is in bin 256 c + v.
    """
    job = tl.program_id(0)
    image = images + tl.load(jobs + job * 2).to(tl.int64) * (S * S)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < S * S
    values = _unpack(tl.load(image + p, mask=inside, other=0))
    for c in tl.static_range(3):
        found = tl.histogram(values[c], 256, mask=inside)
        tl.atomic_add(counts + (job * 3 + c) * 256 + tl.arange(0, 256), found)
    tl.atomic_add(lumas + job, tl.sum(tl.where(inside, _luma(values[0], values[1], values[2]), 0)))


@triton.jit(do_not_specialize=["slot"], do_not_specialize_on_alignment=["jobs"])
def table_kernel(jobs, rows, counts, lumas, tables, slot, FIELD: tl.constexpr, S: tl.constexpr):
    """Compute one channel's lookup table of a job's operation (FIELD).

    FIELD is the first or second; from its statistics.
    """
    job, c = tl.program_id(0), tl.program_id(1)
    v = tl.arange(0, 256)
    count = tl.load(counts + (job * 3 + c) * 256 + v)
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
    """Blend like Pillow's ``Image.blend``: in float32, clipped and truncated."""
    blended = degenerate + factor * (value - degenerate)
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32)


@triton.jit
def _coefficients(v1, v2, v3, v4):
    """Return the cubic's coefficients by powers of t from four neighbours.

    Integers from integers.
    """
    return v2, v3 - v1, 2 * (v1 - v2) + v3 - v4, -v1 + v2 - v3 + v4


@triton.jit
def _cubic(c0, c1, c2, c3, t):
    return c0 + t * (c1 + t * (c2 + t * c3))


@triton.jit
def _exact(value):
    """Convert integers to float64 by bits of 2^52.

    From -BIAS to 2^31 - BIAS; the usual conversion is slow.
    """
    bits = (value + BIAS).to(tl.uint32).to(tl.uint64) | TWO_52_BITS
    return bits.to(tl.float64, bitcast=True) - (TWO_52 + BIAS)


@triton.jit
def _warp(image, p, mask, matrix, S: tl.constexpr):
    """Compute Pillow's bicubic affine transform (a = -1) in float64.

    Outside the image: (124, 116, 104).
    """
    x_out, y_out = (p % S).to(tl.float64) + 0.5, (p // S).to(tl.float64) + 0.5
    x_in = tl.load(matrix) * x_out + tl.load(matrix + 1) * y_out + tl.load(matrix + 2)
    y_in = tl.load(matrix + 3) * x_out + tl.load(matrix + 4) * y_out + tl.load(matrix + 5)
    inside = mask & (x_in >= 0.0) & (x_in < S) & (y_in >= 0.0) & (y_in < S)
    x_in, y_in = x_in - 0.5, y_in - 0.5
    left, top = tl.floor(x_in), tl.floor(y_in)
    t_x, t_y, column, row = x_in - left, y_in - top, left.to(tl.int32), top.to(tl.int32)
    taps = ()
    for i in tl.static_range(16):
        near_y = tl.minimum(tl.maximum(row + (i // 4 - 1), 0), S - 1)
        near_x = tl.minimum(tl.maximum(column + (i % 4 - 1), 0), S - 1)
        taps += (tl.load(image + (near_y * S + near_x), mask=inside, other=0),)
    values = ()
    for c in tl.static_range(3):
        lines = ()
        for i in tl.static_range(4):
            v1, v2 = (taps[4 * i] >> 8 * c) & 255, (taps[4 * i + 1] >> 8 * c) & 255
            v3, v4 = (taps[4 * i + 2] >> 8 * c) & 255, (taps[4 * i + 3] >> 8 * c) & 255
            c0, c1, c2, c3 = _coefficients(v1, v2, v3, v4)
            lines += (_cubic(_exact(c0), _exact(c1), _exact(c2), _exact(c3), t_x),)
        c0, c1, c2, c3 = _coefficients(lines[0], lines[1], lines[2], lines[3])
        value = _cubic(c0, c1, c2, c3, t_y)
        value = tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)
        values += (tl.where(inside, value, (FILL >> 8 * c) & 255),)
    return values


@triton.jit
def _point(value, kind, argument):
    """Apply an operation that depends on the value alone; NONE keeps it."""
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
def _points(red, green, blue, kind, argument):
    return _point(red, kind, argument), _point(green, kind, argument), _point(blue, kind, argument)


@triton.jit
def _operate(image, p, mask, op, tables, S: tl.constexpr):
    """Apply the operation described by nine columns at ``op``.

    Returns red, green and blue (int32).
    """
    kind, argument = tl.load(op).to(tl.int32), tl.load(op + 1)
    pixel = tl.load(image + p, mask=mask, other=0)
    red, green, blue = _unpack(pixel)
    if kind == WARP:
        red, green, blue = _warp(image, p, mask, op + 2, S)
    elif kind == LOOKUP:
        table = tables + tl.load(op + 8).to(tl.int32) * 768
        red = tl.load(table + red).to(tl.int32)
        green = tl.load(table + 256 + green).to(tl.int32)
        blue = tl.load(table + 512 + blue).to(tl.int32)
    elif kind == COLOR:
        grey, factor = _luma(red, green, blue).to(tl.float32), argument.to(tl.float32)
        red = _blend(grey, red.to(tl.float32), factor)
        green = _blend(grey, green.to(tl.float32), factor)
        blue = _blend(grey, blue.to(tl.float32), factor)
    elif kind == SHARPNESS:
        y, x = p // S, p % S
        middle = mask & (y > 0) & (y < S - 1) & (x > 0) & (x < S - 1)
        outer, inner = 4 * (pixel & 0xFF00FF), 4 * green  # red and blue sum in sixteen bits each
        for i in tl.static_range(9):
            near = tl.load(image + p + (i // 3 - 1) * S + (i % 3 - 1), mask=middle, other=0)
            outer += near & 0xFF00FF
            inner += (near >> 8) & 255
        factor = argument.to(tl.float32)
        red = _sharpen(red, outer & 0xFFFF, middle, factor)
        green = _sharpen(green, inner, middle, factor)
        blue = _sharpen(blue, outer >> 16, middle, factor)
    else:
        red, green, blue = _points(red, green, blue, kind, argument)
    return red, green, blue


@triton.jit
def _sharpen(value, total, middle, factor):
    """Sharpen a value from the sum of its 3 x 3 neighbourhood.

    The centre counts five times; the border is kept.
    """
    smooth = tl.where(middle, (2 * total + 13) // 26, value)
    return _blend(smooth.to(tl.float32), value.to(tl.float32), factor)


@triton.jit(do_not_specialize_on_alignment=["jobs"])
def operate_kernel(
    jobs, rows, crops, operated, tables, S: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Apply the first operation alone.

    For images whose second operation needs more than the value.
    """
    image = tl.load(jobs + tl.program_id(0)).to(tl.int64)
    for start in range(0, BLOCK, STEP):
        p = tl.program_id(1) * BLOCK + start + tl.arange(0, STEP)
        inside = p < S * S
        red, green, blue = _operate(crops + image * (S * S), p, inside, rows + image * COLUMNS + FIRST, tables, S)
        tl.store(operated + image * (S * S) + p, _pack(red, green, blue), mask=inside)


@triton.jit
def _finished(image, p, mask, rows, crops, operated, tables, quantiles, scale, offset, S: tl.constexpr):
    """Return an image's normalised, erased pixels before mixing.

    Red, green and blue (float32).
    """
    row = rows + image * COLUMNS
    base = image.to(tl.int64) * (S * S)
    if tl.load(row + SEPARATE) != 0.0:
        red, green, blue = _operate(operated + base, p, mask, row + SECOND, tables, S)
    else:
        red, green, blue = _operate(crops + base, p, mask, row + FIRST, tables, S)
        red, green, blue = _points(red, green, blue, tl.load(row + SECOND).to(tl.int32), tl.load(row + SECOND + 1))
    red = red.to(tl.float32) * tl.load(scale) + tl.load(offset)
    green = green.to(tl.float32) * tl.load(scale + 1) + tl.load(offset + 1)
    blue = blue.to(tl.float32) * tl.load(scale + 2) + tl.load(offset + 2)
    height = tl.load(row + ERASE_HEIGHT).to(tl.int32)
    if height > 0:
        y, x = p // S, p % S
        top, left = tl.load(row + TOP).to(tl.int32), tl.load(row + LEFT).to(tl.int32)
        right = left + tl.load(row + ERASE_WIDTH).to(tl.int32)
        erased = mask & (y >= top) & (y < top + height) & (x >= left) & (x < right)
        key = tl.load(row + KEY).to(tl.int64).to(tl.uint32)
        red = _noise(red, 3 * p, key, erased, quantiles)
        green = _noise(green, 3 * p + 1, key, erased, quantiles)
        blue = _noise(blue, 3 * p + 2, key, erased, quantiles)
    return red, green, blue


@triton.jit
def _noise(value, e, key, erased, quantiles):
    """Replace erased values by normal quantiles.

    Drawn by a hash of the element's index.
    """
    bits = (e.to(tl.uint32) * 0x9E3779B1) ^ key
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return tl.where(erased, tl.load(quantiles + (bits >> 16), mask=erased, other=0.0), value)


@triton.jit
def finish_kernel(
    rows, crops, operated, tables, quantiles, scale, offset, images, B,
    MIX: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Operate on, normalise, erase and mix image b and partner B - 1 - b.

    Fills ``images`` [B, S, S, 3].
    """
    own = tl.program_id(0)
    other = B - 1 - own
    mix = rows + B * COLUMNS
    if MIX == MIXUP:
        lam, rest = tl.load(mix + LAM).to(tl.float32), tl.load(mix + REST).to(tl.float32)
    elif MIX == CUTMIX:
        y0, y1 = tl.load(mix + BOX).to(tl.int32), tl.load(mix + BOX + 1).to(tl.int32)
        x0, x1 = tl.load(mix + BOX + 2).to(tl.int32), tl.load(mix + BOX + 3).to(tl.int32)
    own_base, other_base = own.to(tl.int64) * (S * S * 3), other.to(tl.int64) * (S * S * 3)
    for start in range(0, BLOCK, STEP):
        p = tl.program_id(1) * BLOCK + start + tl.arange(0, STEP)
        mask = p < S * S
        us = _finished(own, p, mask, rows, crops, operated, tables, quantiles, scale, offset, S)
        vs = _finished(other, p, mask, rows, crops, operated, tables, quantiles, scale, offset, S)
        y, x = p // S, p % S
        for c in tl.static_range(3):
            u, v = us[c], vs[c]
            if MIX == MIXUP:
                u, v = u * lam + v * rest, v * lam + u * rest
            elif MIX == CUTMIX:
                pasted = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
                u, v = tl.where(pasted, v, u), tl.where(pasted, u, v)
            tl.store(images + own_base + 3 * p + c, u, mask=mask)
            tl.store(images + other_base + 3 * p + c, v, mask=mask)
