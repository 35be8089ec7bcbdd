"""The step between a layer's projections on a CPU: in GPU interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gated_delta_rule_2.decode_step import rounded
from gdn2_jax.pallas.mixer_step import MixerParams, mixer_step
from gdn2_jax.pallas.mosaic import interpret_mode

BATCH, HEADS, CHANNELS = 1, 2, 64
DEPTH = HEADS * CHANNELS
PARTS = dict.fromkeys("qkvbw", DEPTH) | dict.fromkeys("fg", CHANNELS)
STARTS = dict(zip(PARTS, np.cumsum([0, *PARTS.values()]).tolist()))


def drawn(state_dtype):
    numbers = np.random.default_rng(0)

    def draw(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(numbers.normal(size=shape), dtype)

    params = MixerParams(
        *(draw(4, DEPTH) for _ in range(3)),
        decay_kernel=draw(CHANNELS, DEPTH) / 8,
        gate_kernel=draw(CHANNELS, DEPTH) / 8,
        gate_bias=draw(DEPTH),
        rate=jnp.exp(draw(DEPTH, dtype=jnp.float32)),
        dt_bias=draw(DEPTH, dtype=jnp.float32) - 3,
        norm_scale=draw(CHANNELS),
    )
    state = draw(BATCH, HEADS, CHANNELS, CHANNELS, dtype=jnp.float32).astype(state_dtype)
    windows = tuple(draw(BATCH, 3, DEPTH) for _ in range(3))
    return state, windows, draw(BATCH, sum(PARTS.values())), params


def in_float64(state, windows, projected, params):
    """The layer's equations, as in the docstring of `GatedDeltaNet2`."""
    state, windows, projected, params = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (state, windows, projected, params)
    )
    part = {name: projected[:, STARTS[name] :][:, :size] for name, size in PARTS.items()}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def heads(x):
        return x.reshape(BATCH, HEADS, CHANNELS)

    def unit(x):
        return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)

    seen = [np.concatenate([x, part[n][:, None]], 1) for n, x in zip("qkv", windows)]
    q, k, v = (np.sum(x * taps, 1) for x, taps in zip(seen, params[:3]))
    q, k, v = (heads(x * sigmoid(x)) for x in (q, k, v))
    q, k = unit(q) / np.sqrt(CHANNELS), unit(k)
    b, w = (heads(sigmoid(part[name])) for name in "bw")
    f = part["f"] @ params.decay_kernel + params.dt_bias
    state = np.exp(heads(-params.rate * np.log1p(np.exp(f))))[..., None] * state
    residual = w * v - np.einsum("bhkv,bhk->bhv", state, b * k)
    state = state + k[..., None] * residual[..., None, :]
    o = np.einsum("bhkv,bhk->bhv", state, q)
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-5) * params.norm_scale
    z = part["g"] @ params.gate_kernel + params.gate_bias
    return state, [x[:, 1:] for x in seen], o.reshape(BATCH, DEPTH) * z * sigmoid(z)


@pytest.mark.parametrize("kept", ["float32", "nearest", "stochastic"])
def test_a_token_changes_state_and_windows_as_in_float64(kept, races_found):
    arguments = drawn("float32" if kept == "float32" else "bfloat16")
    seeds = jnp.arange(1, 3, dtype=jnp.uint32)[None] if kept == "stochastic" else None
    with interpret_mode(detect_races=kept == "float32"):
        state, windows, y = mixer_step(
            *arguments, seeds, columns=tuple(STARTS.values()), epsilon=1e-5
        )
    assert not races_found()
    expected_state, expected_windows, expected = in_float64(*arguments)
    for x, z in zip(windows, expected_windows, strict=True):
        np.testing.assert_array_equal(x, z)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)
    assert state.dtype == arguments[0].dtype
    if kept == "float32":
        np.testing.assert_allclose(state, expected_state, rtol=1e-5, atol=1e-5)
    else:
        # Sums in another order may move a value over the border between its neighbours.
        wide = jnp.asarray(expected_state, jnp.float32)
        assert np.mean(state != rounded(wide, state.dtype, seeds)) < 2e-3
