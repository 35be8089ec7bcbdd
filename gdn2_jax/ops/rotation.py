"""Rotations of channel pairs by cumulative angles: the imaginary part of Mamba-3's decay."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

_HIGHEST = jax.lax.Precision.HIGHEST


def rotate(x: Float[Array, "*n K"], phase: Float[Array, "*#n A"]) -> Float[Array, "*n K"]:
    """Rotates the channel pairs (i, i + K / 2), i < A, by `phase`; the others pass."""
    a, b = jnp.split(x, 2, axis=-1)
    rest = a.shape[-1] - phase.shape[-1]
    phase = jnp.pad(phase, [(0, 0)] * (phase.ndim - 1) + [(0, rest)])
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def rotate_state(x: Float[Array, "*n K V"], phase: Float[Array, "*n A"]) -> Float[Array, "*n K V"]:
    """`rotate` along the key axis of a state."""
    return jnp.swapaxes(rotate(jnp.swapaxes(x, -1, -2), phase[..., None, :]), -1, -2)


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
    sums = jnp.einsum("...rc,...ca->...ra", until, dt[..., None] * rotation, precision=_HIGHEST)
    return wrap(sums)
