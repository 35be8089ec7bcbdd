"""Initial distributions of the official GDN-2 models that jax.nn has no name for."""

import math

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling


def small_xavier_uniform() -> Initializer:
    """Xavier-uniform with gain 2^-2.5: U(-a, a), a = 2^-2.5 sqrt(6 / (fan_in + fan_out))."""
    return variance_scaling(2**-5, "fan_avg", "uniform")


def fan_in_uniform(divisor: float = 1.0) -> Initializer:
    """U(-a, a) with a = 1 / (divisor sqrt(fan_in)); depth scaling divides by sqrt(2 layers)."""
    return variance_scaling(1 / (3 * divisor**2), "fan_in", "uniform")


def log_uniform_rate(key, shape, dtype=jnp.float32) -> jax.Array:
    """The logarithm of U(1, 16): the per-head decay rate `A_log`."""
    return jnp.log(jax.random.uniform(key, shape, dtype, minval=1.0, maxval=16.0))


def log_uniform_rate_from_zero(key, shape, dtype=jnp.float32) -> jax.Array:
    """The logarithm of U(0, 16), at least log 1e-4: `A_log` of Gated DeltaNet."""
    rate = jax.random.uniform(key, shape, dtype, maxval=16.0)
    return jnp.log(jnp.maximum(rate, 1e-4))


def inverse_softplus_time_step(key, shape, dtype=jnp.float32) -> jax.Array:
    """`dt_bias` such that softplus(dt_bias) is log-uniform in [1e-3, 1e-1]."""
    log_low, log_high = math.log(1e-3), math.log(1e-1)
    time_step = jnp.exp(jax.random.uniform(key, shape, dtype, minval=log_low, maxval=log_high))
    return time_step + jnp.log(-jnp.expm1(-time_step))
