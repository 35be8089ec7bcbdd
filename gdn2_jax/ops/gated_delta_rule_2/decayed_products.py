"""Products of row pairs under channel-wise decay, safe for every log-decay g <= 0.

Within a chunk of C rows the operator needs, for every row pair r > s,

    P[r, s] = sum_c x[r, c] k[s, c] exp(g[s+1, c] + ... + g[r, c])        (paper eqs. 21-22)

as matrix products. Halving the chunk recursively gives every pair one level at which s lies in the
first half of a part and r in the second. The middle of that part is the pair's reference: the
decay splits into exp(sum of g from the middle to r) and exp(sum of g from s to the middle). All
exponents are sums of g, never differences of cumulative sums, so they are never positive and keep
full relative precision beside neighbours of any size. The gradient of g is likewise a sum over
the exponents it enters: nothing cancels, as it does in the form q dq + e de - k dk of eq. 79.

The recursion ends at blocks of four rows, whose six pairs are written out. Arrays are [..., C, K],
or [..., S, 4, K] with the S blocks apart.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gdn2_jax.ops.precision import HIGHEST, Arithmetic

BLOCK = 4
_PAIRS = [(r, s) for r in range(BLOCK) for s in range(r)]
# Levels of small parts share one masked product a tile of this many rows.
_TILE = 32


class Decayed(NamedTuple):
    """A chunk's operands under decay.

    Attributes:
      e: erase directions b * k.
      q: queries.
      k: keys.
      g: log-decay.
      e_prefix: e decayed from the start of its block.
      q_prefix: q decayed from the start of its block.
      k_suffix: k decayed to the end of its block.
      block_decay: decays of each block. Index 0 of M: from the chunk's start to the block; 1: from
        the block to the chunk's end; 2 + l: to or from the midpoint at level l.
      total: decay over the chunk.
    """

    e: Float[Array, "*n S 4 K"]
    q: Float[Array, "*n S 4 K"]
    k: Float[Array, "*n S 4 K"]
    g: Float[Array, "*n S 4 K"]
    e_prefix: Float[Array, "*n S 4 K"]
    q_prefix: Float[Array, "*n S 4 K"]
    k_suffix: Float[Array, "*n S 4 K"]
    block_decay: Float[Array, "*n M S K"]
    total: Float[Array, "*n K"]


def decayed(e: Array, q: Array, k: Array, g: Array, operand: jnp.dtype) -> Decayed:
    """Prepares a chunk's operands, all [..., C, K]; decayed rows are stored as `operand`."""
    blocks = (*g.shape[:-2], -1, BLOCK, g.shape[-1])
    e, q, k, g = (x.reshape(blocks) for x in (e, q, k, g))
    prefix, suffix = _block_decays(g)
    totals = _row_sum(g)
    block_decay = jnp.exp(_block_sums(totals))
    total = jnp.exp(jnp.sum(totals, axis=-2))
    e_prefix, q_prefix = (e * prefix).astype(operand), (q * prefix).astype(operand)
    return Decayed(e, q, k, g, e_prefix, q_prefix, (k * suffix).astype(operand), block_decay, total)


def from_chunk_start(x_prefix: Array, d: Decayed) -> Float[Array, "*n C K"]:
    """Rows decayed from the start of their block, decayed from the start of the chunk."""
    return _join(x_prefix * d.block_decay[..., 0, :, None, :])


def to_chunk_end(x_suffix: Array, d: Decayed) -> Float[Array, "*n C K"]:
    """Rows decayed to the end of their block, decayed to the end of the chunk."""
    return _join(x_suffix * d.block_decay[..., 1, :, None, :])


def pair_products(
    d: Decayed, arithmetic: Arithmetic
) -> tuple[Float[Array, "*n C C"], Float[Array, "*n C C"]]:
    """P(e, k) and P(q, k) for all pairs r > s; zero elsewhere."""
    e, q, k = _rows(d.e), _rows(d.q), _rows(d.k)
    decays = _pair_decays(d)
    decayed_k = {pair: k[pair[1]] * decays[pair] for pair in _PAIRS}
    erase = _place_pairs({(r, s): jnp.sum(e[r] * decayed_k[r, s], axis=-1) for r, s in _PAIRS})
    read = _place_pairs({(r, s): jnp.sum(q[r] * decayed_k[r, s], axis=-1) for r, s in _PAIRS})
    for level, half in enumerate(_levels(d)):
        left_e, left_q, right = _level_operands(d, level, half)
        erase += _place(arithmetic.product("rk,sk->rs", left_e, right), half, erase.shape[-1])
        read += _place(arithmetic.product("rk,sk->rs", left_q, right), half, read.shape[-1])
    return erase, read


def pair_products_transpose(
    d: Decayed,
    d_erase: Float[Array, "*n C C"],
    d_read: Float[Array, "*n C C"],
    d_e_gamma: Float[Array, "*n C K"],
    d_q_gamma: Float[Array, "*n C K"],
    d_k_tail: Float[Array, "*n C K"],
    d_total: Float[Array, "*n K"],
    arithmetic: Arithmetic,
) -> tuple[Array, Array, Array, Array]:
    """Gradients [..., C, K] of e, q, k and g.

    They follow from the cotangents of P(e, k) and P(q, k), whose entries at r <= s are not read, of
    `from_chunk_start(e_prefix)`, `from_chunk_start(q_prefix)`, `to_chunk_end(k_suffix)` and `total`.
    """
    operand = arithmetic.operand

    def wide(x: Array) -> Array:
        return x.astype(d.g.dtype)

    # Per level (0: the chunk's ends), the gradients of e_prefix, q_prefix and k_suffix that arrive
    # through it, and those of its sums of block totals.
    start, rest = d.block_decay[..., 0, :, None, :], d.block_decay[..., 1, :, None, :]
    de_prefix = start * d_e_gamma.reshape(d.e.shape)
    dq_prefix = start * d_q_gamma.reshape(d.q.shape)
    dk_suffix = rest * d_k_tail.reshape(d.k.shape)
    d_block_sums = [
        _row_sum(d.e_prefix * de_prefix + d.q_prefix * dq_prefix),
        _row_sum(d.k_suffix * dk_suffix),
    ]
    for level, half in enumerate(_levels(d)):
        left_e, left_q, right = _level_operands(d, level, half)
        wide_block_e = _pick(d_erase, half)
        block_e, block_q = wide_block_e.astype(operand), _pick(d_read, half).astype(operand)
        # Along a row of repeated keys d_erase telescopes, so its entries must not be rounded.
        d_left_e = arithmetic.product("rs,sk->rk", wide_block_e, wide(right)).astype(operand)
        d_left_q = arithmetic.product("rs,sk->rk", block_q, right, operand)
        blocks = jnp.concatenate([block_e, block_q], axis=-2)
        left = jnp.concatenate([left_e, left_q], axis=-2)
        d_right = arithmetic.product("rs,rk->sk", blocks, left, operand)
        d_block_sums.append(
            _merge_blocks(
                _block_row_sum(wide(right) * wide(d_right)),
                _block_row_sum(wide(left_e) * wide(d_left_e) + wide(left_q) * wide(d_left_q)),
                half,
                d.e.shape,
            )
        )
        decay = d.block_decay[..., 2 + level, :, None, :]
        zero = jnp.zeros_like(d_right)
        de_prefix += decay * _merge(zero, d_left_e, half)
        dq_prefix += decay * _merge(zero, d_left_q, half)
        dk_suffix += decay * _merge(d_right, zero, half)
    # Without the barrier XLA sums the levels again for every one of the many uses below.
    de_prefix, dq_prefix, dk_suffix, *d_block_sums = jax.lax.optimization_barrier(
        (de_prefix, dq_prefix, dk_suffix, *d_block_sums)
    )
    d_totals = _block_sums_transpose(jnp.stack(d_block_sums, axis=-3))
    d_totals += (d.total * d_total)[..., None, :]

    e, q, k = _rows(d.e), _rows(d.q), _rows(d.k)
    prefix, suffix = _block_decays(d.g)
    de, dq, dk = _rows(prefix * de_prefix), _rows(prefix * dq_prefix), _rows(suffix * dk_suffix)
    d_prefix = [e[r] * de[r] + q[r] * dq[r] for r in range(BLOCK)]
    d_suffix = [k[r] * dk[r] for r in range(BLOCK)]
    dg = [d_totals + _add(d_prefix[r:]) for r in range(BLOCK)]
    for r in range(1, BLOCK):
        dg[r] += _add(d_suffix[:r])
    decays = _pair_decays(d)
    erase_pairs, read_pairs = _pick_pairs(d_erase), _pick_pairs(d_read)
    for r, s in _PAIRS:
        d_e, d_q = erase_pairs[r, s][..., None], read_pairs[r, s][..., None]
        decayed_k = decays[r, s] * k[s]
        de[r] += d_e * decayed_k
        dq[r] += d_q * decayed_k
        d_k = (d_e * e[r] + d_q * q[r]) * decays[r, s]
        dk[s] += d_k
        for t in range(s + 1, r + 1):
            dg[t] += d_k * k[s]
    return _join(_stack(de)), _join(_stack(dq)), _join(_stack(dk)), _join(_stack(dg))


def _add(rows: Sequence[Array]) -> Array:
    # `sum` would begin with a zero.
    return functools.reduce(operator.add, rows)


def _block_decays(g: Float[Array, "*n 4 K"]) -> tuple[Array, Array]:
    """Decays from the start of a block to each row (inclusive), and from it to the end."""
    rows = _rows(g)
    prefix = [_add(rows[: r + 1]) for r in range(BLOCK)]
    suffix = [*(_add(rows[r:]) for r in range(1, BLOCK)), jnp.zeros_like(rows[0])]
    return jnp.exp(_stack(prefix)), jnp.exp(_stack(suffix))


def _rows(x: Float[Array, "*n 4 K"]) -> list[Float[Array, "*n K"]]:
    return list(jnp.unstack(x, axis=-2))


def _stack(rows: list[Array]) -> Array:
    return jnp.stack(rows, axis=-2)


def _row_sum(x: Float[Array, "*n 4 K"]) -> Float[Array, "*n K"]:
    return _add(_rows(x))


def _join(x: Float[Array, "*n S 4 K"]) -> Float[Array, "*n C K"]:
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _pair_decays(d: Decayed) -> dict[tuple[int, int], Array]:
    """Decays between the rows of a block."""
    g = _rows(d.g)
    return {(r, s): jnp.exp(_add(g[s + 1 : r + 1])) for r, s in _PAIRS}


def _place_pairs(pairs: dict[tuple[int, int], Float[Array, "*n S"]]) -> Float[Array, "*n C C"]:
    """Puts the pairs of every block into the chunk's matrix."""
    zero = jnp.zeros_like(pairs[1, 0])
    rows = [jnp.stack([pairs.get((r, s), zero) for s in range(BLOCK)], -1) for r in range(BLOCK)]
    return _block_diagonal(_stack(rows))


def _pick_pairs(matrix: Float[Array, "*n C C"]) -> dict[tuple[int, int], Float[Array, "*n S"]]:
    """The transpose of `_place_pairs`."""
    *batch, size, _ = matrix.shape
    blocks = matrix.reshape(*batch, size // BLOCK, BLOCK, size // BLOCK, BLOCK)
    diagonal = jnp.diagonal(blocks, 0, -4, -2)
    return {(r, s): diagonal[..., r, s, :] for r, s in _PAIRS}


def _levels(d: Decayed) -> list[int]:
    """Half part sizes in blocks: 1, 2, ..., S / 2."""
    return [1 << i for i in range(d.block_decay.shape[-3] - 2)]


def _block_sums(totals: Float[Array, "*n S K"]) -> Float[Array, "*n M S K"]:
    """Sums of block totals before and after each block, and at each level."""
    matrix = jnp.asarray(_block_sum_matrix(totals.shape[-2]), totals.dtype)
    return jnp.einsum("mij,...jk->...mik", matrix, totals, precision=HIGHEST)


def _block_sums_transpose(d_sums: Float[Array, "*n M S K"]) -> Float[Array, "*n S K"]:
    matrix = jnp.asarray(_block_sum_matrix(d_sums.shape[-2]), d_sums.dtype)
    return jnp.einsum("mij,...mik->...jk", matrix, d_sums, precision=HIGHEST)


def _block_sum_matrix(count: int) -> np.ndarray:
    """[M, S, S], 1 where block j's total enters block i's sum.

    At a level, a block in the second half of its part sums from the middle up to itself, one in
    the first half from itself to the middle.
    """
    block, other = np.arange(count)[:, None], np.arange(count)[None, :]
    sums = [other < block, other > block]
    half = 1
    while half < count:
        second = block // half % 2 == 1
        towards_middle = np.where(second, other < block, other > block)
        sums.append((block // half == other // half) & towards_middle)
        half *= 2
    return np.stack(sums)


def _level_operands(d: Decayed, level: int, half: int) -> tuple[Array, Array, Array]:
    """A level's two sides in tiles [..., tiles, rows, K]."""
    decay = d.block_decay[..., 2 + level, :, None, :]
    left_e = _split((d.e_prefix * decay).astype(d.e_prefix.dtype), half, 1)
    left_q = _split((d.q_prefix * decay).astype(d.q_prefix.dtype), half, 1)
    return left_e, left_q, _split((d.k_suffix * decay).astype(d.k_suffix.dtype), half, 0)


def _tile_rows(chunk_size: int, half: int) -> int:
    return max(half * BLOCK, min(_TILE, chunk_size) // 2)


def _split(x: Float[Array, "*n S 4 K"], half: int, side: int) -> Array:
    """The first (0) or second (1) halves of all parts, in tiles [..., tiles, rows, K]."""
    *batch, count, _, key_dim = x.shape
    halves = x.reshape(*batch, -1, 2, half * BLOCK, key_dim)[..., side, :, :]
    return halves.reshape(*batch, -1, _tile_rows(count * BLOCK, half), key_dim)


def _merge(first: Array, second: Array, half: int) -> Float[Array, "*n S 4 K"]:
    """The inverse of `_split` for both sides."""
    *batch, _, _, key_dim = first.shape
    halves = (*batch, -1, half * BLOCK, key_dim)
    parts = jnp.stack([first.reshape(halves), second.reshape(halves)], axis=-3)
    return parts.reshape(*batch, -1, BLOCK, key_dim)


def _block_row_sum(x: Float[Array, "*n tiles rows K"]) -> Float[Array, "*n tiles blocks K"]:
    """Sums the rows of each block of a level's halves."""
    *batch, rows, key_dim = x.shape
    return _row_sum(x.reshape(*batch, rows // BLOCK, BLOCK, key_dim))


def _merge_blocks(first: Array, second: Array, half: int, shape: tuple[int, ...]) -> Array:
    """`_merge` for one row a block: [..., S, K] for operands of `shape` [..., S, 4, K]."""
    *batch, count, _, key_dim = shape
    halves = (*batch, -1, half, key_dim)
    parts = jnp.stack([first.reshape(halves), second.reshape(halves)], axis=-3)
    return parts.reshape(*batch, count, key_dim)


def _same_part(rows: int, half: int) -> np.ndarray:
    part = np.arange(rows) // (half * BLOCK)
    return part[:, None] == part[None, :]


def _place(product: Array, half: int, chunk_size: int) -> Float[Array, "*n C C"]:
    """Puts a level's products [..., tiles, rows, rows] where they belong in the chunk's matrix."""
    *batch, tiles, rows, _ = product.shape
    side = half * BLOCK
    if rows > side:
        product = jnp.where(_same_part(rows, half), product, 0)
    parts = product.reshape(*batch, tiles, rows // side, 1, side, rows // side, 1, side)
    padding = [(0, 0)] * parts.ndim
    padding[-5], padding[-2] = (1, 0), (0, 1)
    return _block_diagonal(jnp.pad(parts, padding).reshape(*batch, tiles, 2 * rows, 2 * rows))


def _pick(matrix: Float[Array, "*n C C"], half: int) -> Array:
    """The transpose of `_place`."""
    *batch, chunk_size, _ = matrix.shape
    rows, side = _tile_rows(chunk_size, half), half * BLOCK
    starts = range(0, chunk_size, 2 * rows)
    tiles = jnp.stack([matrix[..., i : i + 2 * rows, i : i + 2 * rows] for i in starts], axis=-3)
    halves = (*batch, len(starts), rows // side, 2, side, rows // side, 2, side)
    product = tiles.reshape(halves)[..., 1, :, :, 0, :].reshape(*batch, len(starts), rows, rows)
    return jnp.where(_same_part(rows, half), product, 0) if rows > side else product


def _block_diagonal(blocks: Array) -> Float[Array, "*n C C"]:
    """[..., n, m, m] -> [..., n * m, n * m] with the blocks on the diagonal."""
    *batch, count, size, _ = blocks.shape
    eye = np.eye(count, dtype=bool)[:, None, :, None]
    placed = jnp.where(eye, blocks[..., :, :, None, :], 0)
    return placed.reshape(*batch, count * size, count * size)
