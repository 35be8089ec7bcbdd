import jax
import jax.numpy as jnp
import pytest

from gdn2_jax.layers import initializers


@pytest.mark.parametrize(
    ("initializer", "shape", "bound"),
    [
        # The bounds of the 1.3B models.
        (initializers.small_xavier_uniform(), (2304, 2048), 0.0065638),
        (initializers.small_xavier_uniform(), (2304, 128), 0.0087805),
        (initializers.small_xavier_uniform(), (128, 2048), 0.0092826),
        (initializers.fan_in_uniform(), (2304, 64), 1 / 48),
        (initializers.fan_in_uniform(6), (6208, 64), 0.0021153),
        (initializers.fan_in_uniform(6), (2304, 64), 0.0034722),
    ],
)
def test_uniform_bounds_are_those_of_the_official_models(initializer, shape, bound):
    sample = initializer(jax.random.key(0), shape, jnp.float32)
    largest = jnp.abs(sample).max()
    assert 0.999 * bound < largest <= 1.00001 * bound
    assert abs(sample.mean()) < 0.02 * bound
