"""Products of row pairs under channel-wise decay, safe for every log-decay g <= 0.

Within a chunk of C rows the operator needs, for every row pair r > s,

    P[r, s] = sum_c x[r, c] y[s, c] exp(g[s+1, c] + ... + g[r, c])        (paper eqs. 21-22)

as matrix products. Halving the chunk recursively gives every pair one level at which s lies in the
first half of a block and r in the second. The middle of that block is the pair's reference: the
decay splits into exp(sum of g from the middle to r) and exp(sum of g from s to the middle). All
exponents are sums of g, never differences of cumulative sums, so they are never positive and keep
full relative precision beside neighbours of any size. Their adjoint is a sum too.

Arrays are [..., C, K] with C a power of two; `half` (1, 2, ..., C / 2) names the level.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Levels below this block size share one product a tile (masked), so that none is tiny.
_TILE = 32


class DecaySums(NamedTuple):
    """Sums of g over parts of a chunk.

    Attributes:
      to_row: for each level, from the middle of a block to each row of its second half.
      from_row: for each level, from each row of its first half (exclusive) to the middle.
      prefix: from the start of the chunk to each row (inclusive).
      suffix: from each row (exclusive) to the end of the chunk.
      total: over the chunk.
    """

    to_row: dict[int, Float[Array, "*b half K"]]
    from_row: dict[int, Float[Array, "*b half K"]]
    prefix: Float[Array, "*b C K"]
    suffix: Float[Array, "*b C K"]
    total: Float[Array, "*b K"]


def levels(chunk_size: int) -> list[int]:
    """Half block sizes from 1 to C / 2."""
    return [1 << i for i in range(chunk_size.bit_length() - 1)]


def decay_sums(g: Float[Array, "*b C K"]) -> DecaySums:
    """Every partial sum that the pair products and the chunk's state need, by doubling."""
    chunk_size, key_dim = g.shape[-2:]
    batch = g.shape[:-2]
    to_row, from_row = {}, {}
    prefix, suffix, total = g, jnp.zeros_like(g), g
    for half in levels(chunk_size):
        blocks = (*batch, -1, 2, half, key_dim)
        first_prefix, second_prefix = _halves(prefix.reshape(blocks))
        first_suffix, second_suffix = _halves(suffix.reshape(blocks))
        total = total.reshape(*batch, -1, 2, 1, key_dim)
        first_total, second_total = total[..., 0, :, :], total[..., 1, :, :]
        to_row[half], from_row[half] = second_prefix, first_suffix
        prefix = jnp.concatenate([first_prefix, first_total + second_prefix], axis=-2)
        suffix = jnp.concatenate([first_suffix + second_total, second_suffix], axis=-2)
        total = first_total + second_total
    return DecaySums(
        to_row,
        from_row,
        prefix.reshape(g.shape),
        suffix.reshape(g.shape),
        total.reshape(*batch, key_dim),
    )


def decay_sums_transpose(chunk_size: int, cotangent: DecaySums) -> Float[Array, "*b C K"]:
    """The transpose of `decay_sums`: the gradient of g from those of the sums."""
    *batch, _, key_dim = cotangent.prefix.shape
    prefix, suffix, total = cotangent.prefix, cotangent.suffix, cotangent.total
    for half in reversed(levels(chunk_size)):
        blocks = (*batch, -1, 2, half, key_dim)
        first_prefix, second_prefix = _halves(prefix.reshape(blocks))
        first_suffix, second_suffix = _halves(suffix.reshape(blocks))
        total = total.reshape(*batch, -1, key_dim)
        total = jnp.stack([total + second_prefix.sum(-2), total + first_suffix.sum(-2)], axis=-2)
        second_prefix = second_prefix + cotangent.to_row[half]
        first_suffix = first_suffix + cotangent.from_row[half]
        prefix = jnp.stack([first_prefix, second_prefix], axis=-3)
        suffix = jnp.stack([first_suffix, second_suffix], axis=-3)
    shape = (*batch, chunk_size, key_dim)
    return prefix.reshape(shape) + total.reshape(shape)


def _halves(blocks: Array) -> tuple[Array, Array]:
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _tiled(x: Array, half: int, side: int) -> Array:
    """Rows of one half of every block, [..., tiles, rows, K] with at least _TILE / 2 rows."""
    *batch, chunk_size, key_dim = x.shape
    rows = x.reshape(*batch, -1, 2, half, key_dim)[..., side, :, :]
    return rows.reshape(*batch, -1, _rows(chunk_size, half), key_dim)


def _rows(chunk_size: int, half: int) -> int:
    return max(half, min(_TILE, chunk_size) // 2)


def _scatter_rows(x: Array, half: int, side: int, chunk_size: int) -> Array:
    """The transpose of `_tiled`."""
    *batch, _, _, key_dim = x.shape
    blocks = x.reshape(*batch, -1, 1, half, key_dim)
    padding = [(0, 0)] * blocks.ndim
    padding[-3] = (side, 1 - side)
    return jnp.pad(blocks, padding).reshape(*batch, chunk_size, key_dim)


def _same_block(rows: int, half: int) -> Array:
    block = jnp.arange(rows) // half
    return block[:, None] == block[None, :]


def _place(product: Array, half: int, chunk_size: int) -> Array:
    """Puts the level's products [..., tiles, rows, rows] where they belong in [..., C, C]."""
    *batch, tiles, rows, _ = product.shape
    if rows > half:
        product = jnp.where(_same_block(rows, half), product, 0)
    blocks = product.reshape(*batch, tiles, rows // half, 1, half, rows // half, 1, half)
    padding = [(0, 0)] * blocks.ndim
    padding[-5], padding[-2] = (1, 0), (0, 1)
    diagonal = jnp.pad(blocks, padding).reshape(*batch, tiles, 2 * rows, 2 * rows)
    return _block_diagonal(diagonal, chunk_size)


def _block_diagonal(blocks: Array, size: int) -> Array:
    """[..., n, m, m] -> [..., n * m, n * m] with the blocks on the diagonal."""
    *batch, count, _, _ = blocks.shape
    if count == 1:
        return blocks.reshape(*batch, size, size)
    eye = jnp.eye(count, dtype=bool)[:, None, :, None]
    return jnp.where(eye, blocks[..., :, :, None, :], 0).reshape(*batch, size, size)


def _pick(matrix: Array, half: int) -> Array:
    """The transpose of `_place`."""
    *batch, chunk_size, _ = matrix.shape
    rows = _rows(chunk_size, half)
    tiles = chunk_size // (2 * rows)
    blocks = matrix.reshape(*batch, tiles, 2 * rows, tiles, 2 * rows)
    diagonal = jnp.stack([blocks[..., i, :, i, :] for i in range(tiles)], axis=-3)
    halves = diagonal.reshape(*batch, tiles, rows // half, 2, half, rows // half, 2, half)
    product = halves[..., 1, :, :, 0, :].reshape(*batch, tiles, rows, rows)
    return jnp.where(_same_block(rows, half), product, 0) if rows > half else product


def pair_products(
    e: Float[Array, "*b C K"],
    q: Float[Array, "*b C K"],
    k: Float[Array, "*b C K"],
    sums: DecaySums,
) -> tuple[Float[Array, "*b C C"], Float[Array, "*b C C"]]:
    """P(e, k) and P(q, k) for all pairs r > s; zero elsewhere."""
    chunk_size = k.shape[-2]
    erase = read = 0
    for half in levels(chunk_size):
        left_e, left_q, right, _, _ = _factors(e, q, k, sums, half)
        erase += _place(_matmul_t(left_e, right), half, chunk_size)
        read += _place(_matmul_t(left_q, right), half, chunk_size)
    return erase, read


def pair_products_transpose(
    d_erase: Float[Array, "*b C C"],
    d_read: Float[Array, "*b C C"],
    e: Float[Array, "*b C K"],
    q: Float[Array, "*b C K"],
    k: Float[Array, "*b C K"],
    sums: DecaySums,
) -> tuple[Array, Array, Array, dict[int, Array], dict[int, Array]]:
    """Gradients of `pair_products` for e, q, k and for the sums `to_row` and `from_row`."""
    chunk_size = k.shape[-2]
    de = dq = dk = 0
    d_to_row, d_from_row = {}, {}
    for half in levels(chunk_size):
        left_e, left_q, right, to_row, from_row = _factors(e, q, k, sums, half)
        block_e, block_q = _pick(d_erase, half), _pick(d_read, half)
        d_left_e, d_left_q = _matmul(block_e, right), _matmul(block_q, right)
        d_right = _t_matmul(block_e, left_e) + _t_matmul(block_q, left_q)
        de += _scatter_rows(to_row * d_left_e, half, 1, chunk_size)
        dq += _scatter_rows(to_row * d_left_q, half, 1, chunk_size)
        dk += _scatter_rows(from_row * d_right, half, 0, chunk_size)
        level = sums.to_row[half].shape
        d_to_row[half] = (left_e * d_left_e + left_q * d_left_q).reshape(level)
        d_from_row[half] = (right * d_right).reshape(level)
    return de, dq, dk, d_to_row, d_from_row


def _factors(e: Array, q: Array, k: Array, sums: DecaySums, half: int):
    """The two sides of a level's products, and the decays in them, in tiles."""
    rows = (*k.shape[:-2], -1, _rows(k.shape[-2], half), k.shape[-1])
    to_row = jnp.exp(sums.to_row[half].reshape(rows))
    from_row = jnp.exp(sums.from_row[half].reshape(rows))
    left_e, left_q = _tiled(e, half, 1) * to_row, _tiled(q, half, 1) * to_row
    return left_e, left_q, _tiled(k, half, 0) * from_row, to_row, from_row


# Single bf16 or TF32 products would swamp the gradient of g, where row and column side cancel.
_HIGHEST = jax.lax.Precision.HIGHEST


def _matmul(a: Array, b: Array) -> Array:
    return jnp.einsum("...ij,...jk->...ik", a, b, precision=_HIGHEST)


def _matmul_t(a: Array, b: Array) -> Array:
    return jnp.einsum("...ik,...jk->...ij", a, b, precision=_HIGHEST)


def _t_matmul(a: Array, b: Array) -> Array:
    return jnp.einsum("...ji,...jk->...ik", a, b, precision=_HIGHEST)
