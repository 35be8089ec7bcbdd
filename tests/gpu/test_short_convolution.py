"""The short convolution on a Hopper GPU, where its kernels are the default."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.layers import ShortConvolution
from gdn2_jax.ops.choice import hopper_attached

pytestmark = pytest.mark.skipif(not hopper_attached(), reason="needs a Hopper GPU")


@pytest.mark.parametrize("unit_dim", [128, None])
def test_kernels_match_the_same_layer_in_float64(unit_dim):
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = (jax.random.normal(key, (3, 192, 256), jnp.bfloat16) for key in keys[:2])
    layer = ShortConvolution(unit_dim=unit_dim)
    params = layer.init(keys[2], x)

    @functools.partial(jax.jit, static_argnums=3)
    def outputs_and_gradients(params, x, dy, layer):
        y, pullback = jax.vjp(layer.apply, params, x)
        return y, pullback(dy)

    narrow = outputs_and_gradients.lower(params, x, dy, layer).compile()
    assert str(narrow.as_text()).count("mosaic_gpu") >= 2
    results = narrow(params, x, dy)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda u: u.astype(jnp.float64), (params, x, dy))
        expected = outputs_and_gradients(*wide, layer)
    for actual, exact in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.asarray(actual, np.float64) - np.asarray(exact))
        assert error <= 3e-3 * np.linalg.norm(exact)
