"""Tokens of the spans before, where devices hold spans of a sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

AXIS = "sequence"


def previous_tokens(x: Array, count: int) -> Array:
    """The `count` tokens before this device's span of `x` [B, T, ...]: [B, count, ...].

    Tokens before the first of the sequence are zeros. For use inside shard_map.
    """
    devices, length = jax.lax.axis_size(AXIS), x.shape[1]
    parts = []
    missing = count
    for distance in range(1, devices):
        if not missing:
            break
        taken = min(missing, length)
        pairs = [(i, i + distance) for i in range(devices - distance)]
        parts.insert(0, jax.lax.ppermute(x[:, length - taken :], AXIS, pairs))
        missing -= taken
    if missing:
        parts.insert(0, jnp.zeros_like(x, shape=(x.shape[0], missing, *x.shape[2:])))
    return jnp.concatenate(parts, axis=1)


def with_previous_tokens(x: Array, count: int) -> Array:
    """This device's span after the `count` tokens before it: [B, count + T, ...]."""
    return jnp.concatenate([previous_tokens(x, count), x], axis=1) if count else x
