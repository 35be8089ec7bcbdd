"""The decay rate of a head, safe for every parameter."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

_HEADROOM = 1e-6


def decay_rate(a_log: Float[Array, "*n"], dtype: jnp.dtype) -> Float[Array, "*n"]:
    """exp(A_log) in `dtype`, at most a millionth of its largest number.

    The rate and its product with a gradient do not overflow. A larger rate would forget no more.
    """
    largest = math.log(_HEADROOM * float(jnp.finfo(dtype).max))
    return jnp.exp(jnp.minimum(a_log.astype(dtype), largest))
