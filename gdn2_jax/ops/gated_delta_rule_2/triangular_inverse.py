"""Inverse of a unit lower-triangular matrix by block doubling."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gdn2_jax.ops.precision import HIGHEST

# Up to this size the doubling runs on whole tiles with a mask, so that no product is tiny.
_TILE = 16


def unit_lower_inverse(strict: Float[Array, "*b C C"]) -> Float[Array, "*b C C"]:
    """(I + strict)^-1 for strictly lower-triangular matrices, C a power of two.

    Inverts blocks of size 1, 2, 4, ...: a block [[A, 0], [M, D]] has the inverse
    [[A^-1, 0], [-D^-1 M A^-1, D^-1]]. As stable as forward substitution, also where power series
    of `strict` lose every digit (repeated keys).
    """
    *batch, size, _ = strict.shape
    tile = min(_TILE, size)
    count = size // tile
    blocks = strict.reshape(*batch, count, tile, count, tile)
    diagonal = jnp.stack([blocks[..., i, :, i, :] for i in range(count)], axis=-3)

    row, column = np.arange(tile)[:, None], np.arange(tile)[None, :]
    # One step needs no product: the inverse of [[1, 0], [m, 1]] is [[1, 0], [-m, 1]].
    inverse = jnp.where((row == column + 1) & (row % 2 == 1), -diagonal, 0)
    inverse = jnp.where(row == column, 1, inverse)
    half = 2
    while half < tile:
        lower_left = (row // (2 * half) == column // (2 * half)) & (row // half > column // half)
        masked = jnp.where(lower_left, diagonal, 0)
        inverse = inverse - _product(inverse, masked, inverse)
        half *= 2
    while half < size:
        pairs = inverse.reshape(*batch, -1, 2, half, half)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        count = size // (2 * half)
        blocks = strict.reshape(*batch, count, 2, half, count, 2, half)
        lower = jnp.stack([blocks[..., i, 1, :, i, 0, :] for i in range(count)], axis=-3)
        lower = -_product(second, lower, first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([lower, second], axis=-1)], axis=-2)
        half *= 2
    return inverse.reshape(*batch, size, size)


def _product(a: Array, b: Array, c: Array) -> Array:
    return jnp.matmul(jnp.matmul(a, b, precision=HIGHEST), c, precision=HIGHEST)
