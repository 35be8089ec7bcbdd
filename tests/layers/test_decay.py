"""The decay rate exp(A_log) of every layer, for every A_log."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import GatedDeltaNet2
from gdn2_jax.layers import GatedDeltaNet, KimiDeltaAttention, Mamba2
from gdn2_jax.layers.decay import decay_rate

LAYERS = {
    "gdn2": functools.partial(GatedDeltaNet2, num_heads=4),
    "gdn2-bounded": functools.partial(GatedDeltaNet2, num_heads=4, decay_lower_bound=-5.0),
    "kda-bounded": functools.partial(KimiDeltaAttention, num_heads=4, decay_lower_bound=-5.0),
    "gdn": functools.partial(GatedDeltaNet, num_heads=4),
    "mamba2": functools.partial(Mamba2, num_heads=4, state_dim=4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_any_decay_rate_leaves_outputs_and_gradients_finite(name, random_params):
    layer = LAYERS[name](head_dim=4, implementation="recurrent")
    x = jax.random.normal(jax.random.key(0), (2, 8, 6))
    # Rows whose time step underflows, is large, and rows of padding.
    x *= jnp.asarray([1, 0, 300, 1, 0, 1, -300, 1.0])[:, None]
    params = random_params(layer, x)
    params["A_log"] = jnp.asarray([1.0, 88, 95, 3e38])
    params["dt_bias"] *= 0

    @jax.jit
    def loss_and_gradients(params, x):
        return jax.value_and_grad(lambda *a: jnp.sum(layer.apply({"params": a[0]}, a[1])), (0, 1))(
            params, x
        )

    for path, leaf in jax.tree_util.tree_leaves_with_path(loss_and_gradients(params, x)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def test_a_decay_rate_within_range_is_its_exponential():
    a_log = jnp.asarray([-50.0, 0, 70])
    np.testing.assert_array_equal(decay_rate(a_log, jnp.float32), jnp.exp(a_log))
