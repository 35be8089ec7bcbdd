"""Rotary position embedding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PERIOD = 2**30
"""Positions that differ by it have the same angles; float64 inputs have no such period."""


def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotates channel i against channel i + H/2 by the angle position * theta^(-2i / H).

    The angle is computed in whole numbers and to 3e-8 of a turn, less whole turns, at any position:
    a frequency is a whole number of 2^-30 turns a token, at most 3e-9 radians off. Angles and
    rotation are float32; for float64 inputs they are float64, without that rounding. The result has
    `x`'s dtype.
    """
    half = x.shape[-1] // 2
    frequencies = float(theta) ** (-np.arange(half) / half)
    if x.dtype == jnp.float64:
        angles = positions[..., None].astype(x.dtype) * frequencies[None, None]
    else:
        # Turns in units of 2^-32. What exceeds 32 bits is whole turns.
        turns = np.round(frequencies / (2 * math.pi) % 1 * PERIOD).astype(np.uint32) * np.uint32(4)
        turns = positions[..., None].astype(jnp.uint32) * turns[None, None]
        turns = jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32)
        angles = turns * np.float32(2 * math.pi / 2**32)
    cosine, sine = (u[:, :, None] for u in (jnp.cos(angles), jnp.sin(angles)))
    first, second = (u.astype(angles.dtype) for u in (x[..., :half], x[..., half:]))
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
