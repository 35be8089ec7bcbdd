"""Stochastic rounding of a state to bfloat16, in operations that XLA and Mosaic both have.

A number x between two neighbours a < b of bfloat16 becomes b with probability (x - a) / (b - a):
the mean of the result is x, so steps smaller than half the distance of neighbours still add up.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def mixed(x: jax.Array) -> jax.Array:
    """A one-to-one map of uint32: every bit of the result depends on all bits of `x`.

    It is the last step of MurmurHash3.
    """
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def round_stochastically(x: jax.Array, seed: jax.Array, place: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16 by 16 random bits, which `seed` and `place` decide alone.

    Args:
      x: float32.
      seed: uint32, a scalar or of `x`'s shape.
      place: uint32 of `x`'s shape, a number of its own for each element under a seed.
    """
    random = mixed(place ^ mixed(seed)) & np.uint32(0xFFFF)
    # A bfloat16 is the upper half of a float32: the sum carries into it as often as it should.
    bits = (lax.bitcast_convert_type(x, jnp.uint32) + random) & np.uint32(0xFFFF0000)
    rounded = lax.bitcast_convert_type(bits, jnp.float32)
    # The carry would make a number of a NaN.
    return jnp.where(jnp.abs(x) < jnp.inf, rounded, x).astype(jnp.bfloat16)
