import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gated_delta_rule_2.triangular_inverse import unit_lower_inverse


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64])
def test_inverse_is_that_of_numpy(size):
    strict = np.tril(np.random.default_rng(size).normal(size=(2, size, size)) / 4, -1)
    with jax.enable_x64(True):
        inverse = jax.jit(unit_lower_inverse)(jnp.asarray(strict))
    np.testing.assert_allclose(inverse, np.linalg.inv(np.eye(size) + strict), atol=1e-12)


def test_inverse_keeps_every_digit_where_a_power_series_has_none():
    """Equal rows of ones, as repeated keys make; powers of this matrix reach 1e17."""
    inverse = jax.jit(unit_lower_inverse)(jnp.tril(jnp.ones((64, 64)), -1))
    np.testing.assert_array_equal(inverse, np.eye(64) - np.eye(64, k=-1))
