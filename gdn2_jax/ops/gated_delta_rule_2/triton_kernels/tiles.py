"""What the Triton kernels share: tiles of rows, segments, levels of row pairs, exact sums of rows.

A chunk of C rows is halved recursively, as in `decayed_products`: at level l a part has two halves of
2^l rows, and a pair r > s with r in the second half and s in the first weighs
exp(sum of g from the middle to r) exp(sum of g from s to the middle). Both exponents are sums of
log-decays, so they are never positive, and no row after r enters them. The sums are products with
matrices of 0 and 1.

bf16 operands take the LOW lowest levels in one: with P the sum of g from the beginning of a block of
2^LOW = 16 rows, 2^(P_r + c) and 2^(-c - P_s) are in range, because log-decays below CLAMP count as
CLAMP there. That changes no pair's weight by more than 2^-12.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# exp of this is 0 in fp32; sums of it over a chunk are finite.
LOWEST = tl.constexpr(-104.3)
# log2 of a row's smallest decay inside a block; bf16 holds it exactly.
CLAMP = tl.constexpr(-12.0)


@triton.jit
def first_row(batch, chunk, head, T, H, C: tl.constexpr):
    """Index of a chunk's first row among all rows [B T H], and how many rows the chunk has."""
    start = chunk * C
    row = (batch.to(tl.int64) * T + start) * H + head
    return row, T - start


@triton.jit
def chunk_rows(index, T, H, C: tl.constexpr):
    """Where the chunk with this number of [B H chunks] is: batch row, place in it, and `first_row`."""
    chunks = tl.cdiv(T, C)
    chunk, head, batch = index % chunks, index // chunks % H, index // (chunks * H)
    row, count = first_row(batch, chunk, head, T, H, C)
    return batch, chunk, row, count


@triton.jit
def load_rows(x, row, count, H, channel, D: tl.constexpr, C: tl.constexpr):
    """A chunk's rows of [B T H D] in fp32 at these channels; zero beyond the sequence and beyond D."""
    r = tl.arange(0, C)[:, None]
    at = x + row * D + r * H * D + channel[None, :]
    return tl.load(at, mask=(r < count) & (channel[None, :] < D), other=0.0).to(tl.float32)


@triton.jit
def load_operand(x, row, count, H, channel, D: tl.constexpr, C: tl.constexpr):
    """As `load_rows`, in the array's own dtype."""
    r = tl.arange(0, C)[:, None]
    at = x + row * D + r * H * D + channel[None, :]
    return tl.load(at, mask=(r < count) & (channel[None, :] < D), other=0.0)


@triton.jit
def store_rows(x, row, count, H, channel, value, D: tl.constexpr, C: tl.constexpr):
    """The inverse of `load_rows`."""
    r = tl.arange(0, C)[:, None]
    at = x + row * D + r * H * D + channel[None, :]
    mask = (r < count) & (channel[None, :] < D)
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_log2_decay(g, row, count, H, channel, D: tl.constexpr, C: tl.constexpr):
    """log2 of a chunk's decays, those of 0 too raised to what a sum can hold; NaN stays."""
    value = load_rows(g, row, count, H, channel, D, C)
    return tl.where(value < LOWEST, LOWEST, value) * LOG2_E


@triton.jit
def load_square(x, index, C: tl.constexpr):
    """One of [n C C]."""
    i = tl.arange(0, C)
    return tl.load(x + index.to(tl.int64) * (C * C) + i[:, None] * C + i[None, :])


@triton.jit
def store_square(x, index, value, C: tl.constexpr):
    """The inverse of `load_square`."""
    i = tl.arange(0, C)
    at = x + index.to(tl.int64) * (C * C) + i[:, None] * C + i[None, :]
    tl.store(at, value.to(x.dtype.element_ty))


@triton.jit
def load_state(x, index, channel, value_channel, K: tl.constexpr, V: tl.constexpr):
    """A tile of one of [n K V]; zero beyond K and V."""
    at = x + index.to(tl.int64) * (K * V) + channel[:, None] * V + value_channel[None, :]
    return tl.load(at, mask=(channel[:, None] < K) & (value_channel[None, :] < V), other=0.0)


@triton.jit
def store_state(x, index, channel, value_channel, value, K: tl.constexpr, V: tl.constexpr):
    """The inverse of `load_state`."""
    at = x + index.to(tl.int64) * (K * V) + channel[:, None] * V + value_channel[None, :]
    mask = (channel[:, None] < K) & (value_channel[None, :] < V)
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def chunk_segments(segment, batch, chunk, T, C: tl.constexpr):
    """The segments of a chunk's rows, of the row before the chunk, and of the chunk's last row.

    Rows beyond the sequence belong to its last segment; the initial state belongs to segment 0.
    """
    segment += batch.to(tl.int64) * T
    here = tl.load(segment + tl.minimum(chunk * C + tl.arange(0, C), T - 1))
    before = tl.load(segment + tl.maximum(chunk * C - 1, 0))
    last = tl.load(segment + tl.minimum(chunk * C + C - 1, T - 1))
    return here, tl.where(chunk > 0, before, 0), last


@triton.jit
def load_sums(sums, index, C: tl.constexpr):
    """One of the [C, C] 0/1 matrices by which rows are summed, see `form`."""
    i = tl.arange(0, C)
    return tl.load(sums + index * (C * C) + i[:, None] * C + i[None, :])


@triton.jit
def load_sums_transposed(sums, index, C: tl.constexpr):
    """Its transpose."""
    i = tl.arange(0, C)
    return tl.load(sums + index * (C * C) + i[None, :] * C + i[:, None])


@triton.jit
def level_pairs(step, LOW: tl.constexpr, C: tl.constexpr):
    """[C, C]: whether two rows meet, in any order, at level LOW + step - 1; in a block, if step is 0."""
    block = tl.arange(0, C) // (1 << LOW)
    return (2 * (block[:, None] ^ block[None, :]) + 1) >> step == 1


@triton.jit
def load_pairs(x, index, step, LOW: tl.constexpr, C: tl.constexpr):
    """`load_square`, zero but for these pairs."""
    i = tl.arange(0, C)
    at = x + index.to(tl.int64) * (C * C) + i[:, None] * C + i[None, :]
    return tl.load(at, mask=level_pairs(step, LOW, C), other=0.0)


@triton.jit
def sum_in_block(sums, log_decay, C: tl.constexpr, PARTS: tl.constexpr):
    """log2 of the decay from the beginning of a row's block up to it, in [-192, 0]."""
    clamped = tl.where(log_decay < CLAMP, CLAMP, log_decay)
    return sum_rows(load_sums(sums, 2, C), clamped, PARTS)


@triton.jit
def bf16_part(x):
    """The first eight bits of fp32 numbers, in fp32: cheaper than a conversion to bf16 and back."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def tf32_part(x):
    """The first eleven bits of fp32 numbers."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def sum_rows(matrix, x, PARTS: tl.constexpr):
    """`matrix` @ x for a matrix of 0 and 1: x in bf16 parts, of which two hold 16 bits, three 24."""
    part = bf16_part(x)
    total = tl.dot(matrix, part.to(tl.bfloat16))
    for i in tl.static_range(PARTS - 1):
        x = x - part
        part = bf16_part(x) if i < PARTS - 2 else x
        total = tl.dot(matrix, part.to(tl.bfloat16), total)
    return total


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, total=None):
    """`a` @ `b`, added to `total`. "tf32x3" of fp32: as Triton's own, but NaN and infinity give NaN."""
    if PRECISION == "tf32x3" and a.dtype == tl.float32:
        a_high, b_high = tf32_part(a), tf32_part(b)
        total = tl.dot(a - a_high, b_high, total)
        total = tl.dot(a_high, b - b_high, total)
        total = tl.dot(a_high, b_high, total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def wide_dot(a, b, PRECISION: tl.constexpr):
    """`a` @ `b` for an fp32 `a` that must not be rounded to b's dtype: in two parts if that is bf16."""
    if b.dtype == tl.bfloat16:
        high = bf16_part(a)
        product = tl.dot(high.to(tl.bfloat16), b)
        product = tl.dot((a - high).to(tl.bfloat16), b, product)
    else:
        product = dot(a, b, PRECISION)
    return product


@triton.jit
def dot_wide(a, b, PRECISION: tl.constexpr):
    """`a` @ `b` for an fp32 `b` that must not be rounded to a's dtype."""
    if a.dtype == tl.bfloat16:
        high = bf16_part(b)
        product = tl.dot(a, high.to(tl.bfloat16))
        product = tl.dot(a, (b - high).to(tl.bfloat16), product)
    else:
        product = dot(a, b, PRECISION)
    return product


@triton.jit
def unit_lower_inverse(strict, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + strict)^-1 by block doubling: as stable as forward substitution."""
    C: tl.constexpr = strict.shape[0]
    i = tl.arange(0, C)
    if PRECISION == "tf32":
        # To the nearest, once: where keys repeat, the sums of columns must vanish, and the step without a product
        # must see the numbers that products see, which cut operands off.
        strict = tf32_part(2 * strict - tf32_part(strict))
    # One step needs no product: the inverse of [[1, 0], [m, 1]] is [[1, 0], [-m, 1]].
    inverse = tl.where(level_pairs(1, 0, C), -strict, 0.0)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, inverse)
    for step in range(2, LEVELS + 1):
        lower = tl.where(level_pairs(step, 0, C), strict, 0.0)
        inverse -= dot(dot(inverse, lower, PRECISION), inverse, PRECISION)
    return inverse
