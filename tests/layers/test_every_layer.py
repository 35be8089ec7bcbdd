"""What holds for every layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import GatedDeltaNet2
from gdn2_jax.layers import (
    Attention,
    GatedDeltaNet,
    KimiDeltaAttention,
    Mamba2,
    Mamba3,
    SlidingWindowAttention,
)

LAYERS = {
    "gdn2": functools.partial(GatedDeltaNet2, num_value_heads=4, head_dim=4),
    "gdn2-bounded": functools.partial(
        GatedDeltaNet2, head_dim=4, decay_lower_bound=-5.0, use_short_conv=False
    ),
    "kda": functools.partial(KimiDeltaAttention, num_value_heads=4, head_dim=4),
    "gdn": functools.partial(GatedDeltaNet, head_dim=4),
    "mamba2": functools.partial(Mamba2, head_dim=4, state_dim=4),
    "mamba3": functools.partial(Mamba3, head_dim=4, state_dim=4),
    "mamba3_mimo": functools.partial(Mamba3, head_dim=4, state_dim=4, mimo_rank=2),
    "attention": functools.partial(Attention, context_length=8),
    "attention_conv": functools.partial(Attention, context_length=8, conv_size=3),
    "sliding_window_attention": functools.partial(SlidingWindowAttention, window_size=4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_relies_on_rank_promotion(name):
    x = jnp.ones((2, 6, 8))
    segment_ids = jnp.asarray([[0] * 4 + [1] * 2] * 2)

    def loss(layer, variables, x):
        return jnp.sum(layer.apply(variables, x, segment_ids))

    with jax.numpy_rank_promotion("raise"):
        decoder = LAYERS[name](num_heads=2, decode=True)
        # With one token, as in decoding.
        variables = jax.eval_shape(decoder.init, jax.random.key(0), x[:, :1], segment_ids[:, :1])
        jax.eval_shape(functools.partial(decoder.apply, mutable="cache"), variables, x, segment_ids)
        params = {"params": variables["params"]}
        layer = LAYERS[name](num_heads=2)
        jax.eval_shape(jax.grad(functools.partial(loss, layer), (0, 1)), params, x)


@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
@pytest.mark.parametrize("name", LAYERS)
def test_float64_without_64_bit_mode_is_an_error(name, field):
    layer = LAYERS[name](num_heads=2, **{field: jnp.float64})
    with pytest.raises(ValueError, match=f"^{field}: expected 64-bit mode .*got 'float64'"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3, 8)))


@pytest.mark.parametrize("name", ["gdn2", "mamba2", "attention", "sliding_window_attention"])
def test_a_nan_stays_in_its_document(name, random_params):
    segment_ids = jnp.asarray([[1] * 3 + [2] * 4 + [3] * 6])
    x = jax.random.normal(jax.random.key(0), (1, 13, 8))
    layer = LAYERS[name](num_heads=2)
    params = random_params(layer, x)

    @jax.jit
    def run(x):
        outputs, pullback = jax.vjp(lambda x: layer.apply({"params": params}, x, segment_ids), x)
        return outputs, *pullback(jnp.ones_like(outputs))

    others = (segment_ids != 2)[..., None]
    for result, expected in zip(run(x.at[0, 4].set(jnp.nan)), run(x)):
        np.testing.assert_array_equal(jnp.where(others, result, 0), jnp.where(others, expected, 0))
        assert np.isnan(result[0, 4]).all()


@pytest.mark.parametrize("name", ["gdn2", "mamba3", "attention", "sliding_window_attention"])
def test_a_nan_is_forgotten_in_decoding_when_a_document_starts(name, random_params):
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    params = random_params(LAYERS[name](num_heads=2), x)
    layer = LAYERS[name](num_heads=2, decode=True)
    apply = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
    segment_ids = jnp.asarray([[1, 1, 1, 2, 2]])
    _, cache = apply({"params": params}, x[:, :2].at[:, 1].set(jnp.nan), segment_ids[:, :2])
    # The rest of the document, and two of the next at once; then one token.
    y, cache = apply({"params": params, **cache}, x[:, 2:4], segment_ids[:, 2:4])
    assert np.isnan(y[:, 0]).all() and np.isfinite(y[:, 1]).all()
    y, _ = apply({"params": params, **cache}, x[:, 4:], segment_ids[:, 4:])
    assert np.isfinite(y).all()
