"""Rotations of channel pairs by cumulative angles: the imaginary part of Mamba-3's decay."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gdn2_jax.ops.precision import HIGHEST


def rotate(x: Float[Array, "*n"], phase: Float[Array, "..."], axis: int = -1) -> Float[Array, "*n"]:
    """Rotates the channel pairs (i, i + K / 2), i < A, along `axis` by `phase`; the others pass.

    Other axes of `phase` are those of `x`, or broadcast to them.
    """
    before, half, after = x.shape[:axis], x.shape[axis] // 2, x.shape[axis:][1:]
    padding = [(0, 0)] * phase.ndim
    padding[axis] = (0, half - phase.shape[axis])
    cos = jnp.expand_dims(jnp.pad(jnp.cos(phase), padding, constant_values=1), axis - 1)
    sin = jnp.expand_dims(jnp.pad(jnp.sin(phase), padding), axis - 1)
    # Both halves in one expression, which a GPU writes in one pass.
    x = x.reshape(*before, 2, half, *after)
    shape = [1] * sin.ndim
    shape[axis - 1] = 2
    sign = np.asarray([-1, 1], phase.dtype).reshape(shape)
    return (x * cos + jnp.flip(x, axis - 1) * (sign * sin)).reshape(*before, 2 * half, *after)


def angle_gradient(
    x: Float[Array, "*n"], gradient: Float[Array, "*n"], angles: int, axis: int = -1
) -> Float[Array, "..."]:
    """Gradient of the phase of x = rotate(..., phase), by pairs, from x and its gradient.

    Both may be turned by the same angle: only the one between them matters.
    """
    half = x.shape[axis] // 2
    low, high = (slice(i, i + angles) for i in (0, half))
    rest = (slice(None),) * (-1 - axis)
    low, high = (..., low, *rest), (..., high, *rest)
    return gradient[high] * x[low] - gradient[low] * x[high]


def rotate_state(x: Float[Array, "*n K V"], phase: Float[Array, "*n A"]) -> Float[Array, "*n K V"]:
    """`rotate` along the key axis of a state."""
    return rotate(x, phase[..., None], axis=-2)


def wrap(phase: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The phase less whole turns, in [-pi, pi]; its derivative is 1."""
    turn = 2 * np.pi
    return phase - turn * jax.lax.stop_gradient(jnp.round(phase / turn))


def phases(
    dt: Float[Array, "*n C"],
    rotation: Float[Array, "*#n C A"],
    same: Bool[Array, "*#n C C"] | None = None,
) -> Float[Array, "*n C A"]:
    """The phase after each token of a chunk: the sum of dt * rotation from the chunk's start.

    Where `same` says which tokens share a segment, phases count from the segment's start.
    """
    until = np.tri(dt.shape[-1], dtype=dt.dtype)
    if same is not None:
        until = jnp.where(same, until, 0)
    sums = jnp.einsum("...rc,...ca->...ra", until, dt[..., None] * rotation, precision=HIGHEST)
    return wrap(sums)
