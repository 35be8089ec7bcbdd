import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.layers.rms_norm import RMSNorm


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 8)])
def test_values_and_gradients_are_those_of_flax(shape):
    with jax.enable_x64(True):
        draw = np.random.default_rng(0).normal
        x, dy, params = draw(size=shape), draw(size=shape), {"scale": draw(size=8)}
        params["scale"][0] = 0
        results = []
        for norm in (RMSNorm(1e-5, jnp.float64), nn.RMSNorm(1e-5, dtype=jnp.float64)):
            shapes = jax.tree.map(jnp.shape, jax.eval_shape(norm.init, jax.random.key(0), x))
            assert shapes == {"params": {"scale": (8,)}}

            @jax.jit
            def run(*arguments, norm=norm):
                y, pullback = jax.vjp(norm.apply, *arguments)
                return y, pullback(dy)

            results.append(run({"params": params}, x))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *results)


def test_a_narrow_result_rounds_once():
    x = 3 * jax.random.normal(jax.random.key(0), (2, 3, 8))
    params = {"params": {"scale": jax.random.normal(jax.random.key(1), (8,))}}
    wide, narrow = (RMSNorm(1e-5, dtype).apply(params, x) for dtype in (x.dtype, jnp.bfloat16))
    np.testing.assert_array_equal(narrow, jnp.asarray(wide, jnp.bfloat16))


def test_gradients_through_a_narrow_result_are_those_through_a_wide_one():
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = (jax.random.normal(key, (2, 3, 64)) for key in keys[:2])
    params = {"params": {"scale": jax.random.normal(keys[2], (64,))}}
    gradients = []
    for dtype in (jnp.float32, jnp.bfloat16):
        _, pullback = jax.vjp(RMSNorm(1e-5, dtype).apply, params, x)
        gradients.append(pullback(dy.astype(jnp.bfloat16).astype(dtype)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *gradients)
