"""What holds for every layer; tracing shows it."""

import functools

import jax
import jax.numpy as jnp
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
    "attention": functools.partial(Attention, window_size=8),
    "sliding_window_attention": functools.partial(SlidingWindowAttention, window_size=4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_relies_on_rank_promotion(name):
    x = jnp.ones((2, 6, 8))
    segment_ids = jnp.asarray([[0] * 4 + [1] * 2] * 2)

    def loss(layer, variables, x):
        return jnp.sum(layer.apply(variables, x, segment_ids))

    with jax.numpy_rank_promotion("raise"):
        layer = LAYERS[name](num_heads=2)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        jax.eval_shape(jax.grad(functools.partial(loss, layer), (0, 1)), variables, x)
        decoder = LAYERS[name](num_heads=2, decode=True)
        variables = jax.eval_shape(decoder.init, jax.random.key(0), x)
        apply = functools.partial(decoder.apply, mutable=["cache"])
        for length in (6, 1):
            jax.eval_shape(apply, variables, x[:, :length], segment_ids[:, :length])


@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
@pytest.mark.parametrize("name", LAYERS)
def test_float64_without_64_bit_mode_is_an_error(name, field):
    layer = LAYERS[name](num_heads=2, **{field: jnp.float64})
    with pytest.raises(ValueError, match=f"^{field}: expected 64-bit mode .*got 'float64'"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3, 8)))
