import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.layers import ShortConvolution


def test_the_last_tap_multiplies_the_current_token():
    x = jnp.zeros((1, 6, 1)).at[0, 1].set(1.0)
    taps = jnp.array([1.0, 2.0, 3.0, 4.0])[:, None]
    y = ShortConvolution().apply({"params": {"kernel": taps}}, x)
    np.testing.assert_allclose(y[0, :, 0], jax.nn.silu(jnp.array([0.0, 4, 3, 2, 1, 0])))


def test_the_bias_is_added_before_the_activation():
    x = jax.random.normal(jax.random.key(0), (1, 5, 64))
    layer = ShortConvolution(use_bias=True)
    params = layer.init(jax.random.key(1), x)["params"]
    assert params["bias"].shape == (64,) and 0.4 < jnp.abs(params["bias"]).max() <= 0.5
    silent = {"kernel": 0 * params["kernel"], "bias": params["bias"]}
    expected = jnp.broadcast_to(jax.nn.silu(params["bias"]), x.shape)
    np.testing.assert_allclose(layer.apply({"params": silent}, x), expected, atol=1e-6)


def test_a_document_sees_nothing_of_the_one_before():
    x = np.random.default_rng(0).normal(size=(1, 8, 3)).astype(np.float32)
    layer = ShortConvolution()
    params, apply = jax.jit(layer.init)(jax.random.key(1), x), jax.jit(layer.apply)
    ids = np.array([[7, 7, 7, 8, 9, 9, 9, 9]])
    alone = [apply(params, x[:, a:b]) for a, b in [(0, 3), (3, 4), (4, 8)]]
    np.testing.assert_allclose(apply(params, x, ids), np.concatenate(alone, 1), atol=1e-6)


def test_bfloat16_inputs_are_summed_in_float32():
    x = jnp.array([256.0, 1.0, -256.0, 0.0], jnp.bfloat16)[None, :, None]
    y = ShortConvolution().apply({"params": {"kernel": jnp.ones((4, 1))}}, x)
    # bfloat16 sums would lose the 1 beside 256.
    assert y.dtype == jnp.bfloat16 and y[0, -1, 0] == jax.nn.silu(1.0).astype(jnp.bfloat16)


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_decoding_equals_the_full_convolution(kernel_size):
    x = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
    layer = ShortConvolution(kernel_size)
    params = jax.jit(layer.init)(jax.random.key(1), x)
    full = np.asarray(jax.jit(layer.apply)(params, x))
    advance = jax.jit(functools.partial(layer.clone(decode=True).apply, mutable=["cache"]))
    variables = params
    for start, stop in [(0, 1), (1, 2), (2, 7), (7, 8), (8, 9)]:
        y, cache = advance(variables, x[:, start:stop])
        np.testing.assert_allclose(y, full[:, start:stop], atol=1e-6)
        variables = {**params, **cache}
    kept = variables["cache"]["inputs"]
    np.testing.assert_array_equal(kept, x[:, 10 - kernel_size :])


def test_the_window_holds_raw_inputs_in_their_own_dtype():
    x = jnp.ones((1, 2, 3), jnp.bfloat16)
    layer = ShortConvolution(decode=True)
    _, cache = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["cache"])
    assert cache["cache"]["inputs"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(cache["cache"]["inputs"][0, :, 0], [0, 1, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_have_unit_length_before_they_are_rounded(dtype):
    x = 3 * jax.random.normal(jax.random.key(0), (2, 7, 12), dtype)
    plain, unit = ShortConvolution(), ShortConvolution(unit_dim=4)
    params = plain.init(jax.random.key(1), x)
    heads = plain.apply(params, x.astype("float32")).reshape(2, 7, 3, 4)
    squares = jnp.sum(heads**2, -1, keepdims=True)
    expected = (heads / jnp.sqrt(squares + 1e-6)).reshape(x.shape)
    actual = unit.apply(params, x)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected.astype(dtype), atol=1e-6)
