"""What the Triton kernels share: tiles of rows, segments, levels of row pairs, exact sums of rows.

A chunk of C rows is halved recursively, as in `decayed_products`: at level l a part has two halves of
2^l rows, and a pair r > s with r in the second half and s in the first weighs
exp(sum of g from the middle to r) exp(sum of g from s to the middle). Both exponents are sums of
log-decays, so they are never positive, and no row after r enters them.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# exp of this is 0 in fp32; sums of it over a chunk are finite.
LOWEST = tl.constexpr(-104.3)


@triton.jit
def first_row(batch, chunk, head, T, H, C: tl.constexpr):
    """Index of a chunk's first row among all rows [B T H], and how many rows the chunk has."""
    start = chunk * C
    row = (batch.to(tl.int64) * T + start) * H + head
    return row, T - start


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
def rows_up_to(C: tl.constexpr):
    """[C, C] bf16: 1 where a row is summed from the chunk's first row up to itself."""
    i = tl.arange(0, C)
    return (i[None, :] <= i[:, None]).to(tl.float32).to(tl.bfloat16)


@triton.jit
def rows_after(C: tl.constexpr):
    """[C, C] bf16: 1 where a row is summed over the rows after it."""
    i = tl.arange(0, C)
    return (i[None, :] > i[:, None]).to(tl.float32).to(tl.bfloat16)


@triton.jit
def rows_to_middle(level, C: tl.constexpr):
    """[C, C] bf16: 1 where a row is summed from the middle of its part, or from itself to there."""
    i = tl.arange(0, C)
    row, other = i[:, None], i[None, :]
    own_half = (row >> level) == (other >> level)
    second = ((row >> level) & 1) == 1
    towards = tl.where(second, other <= row, other > row)
    return (own_half & towards).to(tl.float32).to(tl.bfloat16)


@triton.jit
def level_pairs(level, C: tl.constexpr):
    """[C, C]: whether a pair's middle is of this level: second half of a part by its first."""
    i = tl.arange(0, C)
    row, other = i[:, None] >> level, i[None, :] >> level
    return ((row >> 1) == (other >> 1)) & (row > other)


@triton.jit
def sum_rows(matrix, x, PARTS: tl.constexpr):
    """`matrix` @ x for a matrix of 0 and 1: x in bf16 parts, of which two hold 16 bits, three 24."""
    part = x.to(tl.bfloat16)
    total = tl.dot(matrix, part)
    for _ in tl.static_range(PARTS - 1):
        x = x - part.to(tl.float32)
        part = x.to(tl.bfloat16)
        total = tl.dot(matrix, part, total)
    return total


@triton.jit
def decay_to_middle(g, level, C: tl.constexpr, PARTS: tl.constexpr):
    """Decays of a chunk's rows from or to the middle of their part, for log2-decays g."""
    return tl.exp2(sum_rows(rows_to_middle(level, C), g, PARTS))


@triton.jit
def unit_lower_inverse(strict, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + strict)^-1 by block doubling: as stable as forward substitution."""
    C: tl.constexpr = strict.shape[0]
    i = tl.arange(0, C)
    # One step needs no product: the inverse of [[1, 0], [m, 1]] is [[1, 0], [-m, 1]].
    inverse = tl.where(level_pairs(0, C), -strict, 0.0)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, inverse)
    for level in range(1, LEVELS):
        lower = tl.where(level_pairs(level, C), strict, 0.0)
        product = tl.dot(inverse, lower, input_precision=PRECISION)
        inverse -= tl.dot(product, inverse, input_precision=PRECISION)
    return inverse
