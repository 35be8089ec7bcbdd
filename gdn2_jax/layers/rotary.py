"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotates channel i against channel i + H/2 by the angle position * theta^(-2i / H).

    Angles and rotation are float32 (float64 for float64 inputs); the result has `x`'s dtype.
    """
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions[:, None, None].astype(wide) * frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
