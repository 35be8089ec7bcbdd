"""Prefill with the chunkwise form, then steps: the same as one long recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.ops.gated_delta_rule_2.decode_step import rounded
from gdn2_jax.testing import operator_inputs

STEPS = 4


@pytest.mark.parametrize("prefill", [1, 66])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("bfloat16", 1e-2)])
def test_prefill_and_steps_equal_one_long_recurrence(prefill, dtype, tolerance):
    inputs = operator_inputs(
        2, prefill + STEPS, 2, 8, 6, value_heads=4, dtype=dtype, regime="mixture"
    )
    *six, initial_state = map(np.asarray, inputs[:7])
    with jax.enable_x64(dtype == "float64"):
        run = functools.partial(gated_delta_rule_2, scale=0.3)
        expected, expected_state = jax.jit(functools.partial(run, implementation="recurrent"))(
            *six, initial_state=initial_state
        )
        outputs, state = jax.jit(functools.partial(run, implementation="xla"))(
            *(x[:, :prefill] for x in six), initial_state=initial_state
        )
        step = jax.jit(functools.partial(gated_delta_rule_2_step, scale=0.3))
        outputs = [outputs]
        for t in range(prefill, prefill + STEPS):
            state, output = step(state, *(x[:, t] for x in six))
            outputs.append(np.asarray(output)[:, None])
        outputs = np.concatenate(outputs, axis=1)
    for result, reference in ((outputs, expected), (state, expected_state)):
        result, reference = (np.asarray(x).astype(np.float64) for x in (result, reference))
        error = np.linalg.norm(result - reference) / np.linalg.norm(reference)
        assert error < tolerance
        last = np.linalg.norm(result[:, -1] - reference[:, -1]) / np.linalg.norm(reference[:, -1])
        assert last < tolerance


def test_step_is_differentiable():
    inputs = operator_inputs(2, 3, 1, 4, 3, value_heads=2, dtype="float64")
    *six, initial_state, _ = inputs

    def stepped(state, *six):
        outputs = []
        for t in range(3):
            state, output = gated_delta_rule_2_step(state, *(x[:, t] for x in six))
            outputs.append(output)
        return jnp.sum(jnp.stack(outputs) ** 2) + jnp.sum(state**2)

    def whole(state, *six):
        outputs, state = gated_delta_rule_2(*six, initial_state=state, implementation="recurrent")
        return jnp.sum(outputs**2) + jnp.sum(state**2)

    with jax.enable_x64(True):
        one, other = (
            jax.jit(jax.grad(fn, argnums=range(7)))(initial_state, *six) for fn in (stepped, whole)
        )
    for x, y in zip(one, other):
        np.testing.assert_allclose(x, y, atol=1e-12)


def one_token(**options):
    inputs = operator_inputs(2, 1, 1, 8, 6, value_heads=2, **options)
    return inputs.initial_state.astype(jnp.bfloat16), [x[:, 0] for x in inputs[:6]]


def test_a_bfloat16_state_is_computed_with_in_float32_and_then_rounded():
    state, token = one_token()
    expected, expected_output = gated_delta_rule_2_step(state.astype(jnp.float32), *token)
    nearest, output = gated_delta_rule_2_step(state, *token)
    np.testing.assert_array_equal(output, expected_output)
    np.testing.assert_array_equal(nearest, expected.astype(jnp.bfloat16))
    found, output = gated_delta_rule_2_step(state, *token, rounding_seeds=jnp.ones((2, 2), int))
    np.testing.assert_array_equal(output, expected_output)
    assert found.dtype == jnp.bfloat16
    # One of the two neighbours, and not always the nearest.
    error = np.abs(found.astype(jnp.float32) - expected)
    spacing = np.spacing(np.abs(np.asarray(expected.astype(jnp.bfloat16)))).astype(np.float32)
    assert (error <= spacing).all() and (found != nearest).any()


def test_stochastic_rounding_is_right_in_the_mean_and_decided_by_the_seed():
    state, token = one_token()
    expected, _ = gated_delta_rule_2_step(state.astype(jnp.float32), *token)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=0)
    def rounded(seed):
        seeds = seed + 1000 * jnp.arange(4).reshape(2, 2)
        return gated_delta_rule_2_step(state, *token, rounding_seeds=seeds)[0]

    found = np.asarray(rounded(jnp.arange(1000)), np.float32)
    np.testing.assert_array_equal(found, rounded(jnp.arange(1000)))
    spacing = np.spacing(np.abs(np.asarray(expected.astype(jnp.bfloat16)))).astype(np.float32)
    # The mean of 1,000 has a standard deviation of at most 0.016 of the spacing.
    assert (np.abs(found.mean(axis=0) - expected) < 0.08 * spacing).all()
    # Each seed and place has bits of its own: errors do not go together.
    error = ((found - expected) / spacing).reshape(1000, -1)
    error = error[:, error.std(axis=0) > 0.1]
    assert np.abs(np.corrcoef(error.T) - np.eye(error.shape[1])).max() < 0.2
    assert np.abs(np.mean(error[1:] * error[:-1])) < 0.01


def test_what_is_too_small_for_the_nearest_is_kept_by_stochastic_rounding():
    one = jnp.ones((1, 1, 4))
    state = jnp.ones((1, 1, 4, 4), jnp.bfloat16)
    zero, key = 0 * one, one.at[..., 1:].set(0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(stochastic, state):
        def body(state, t):
            seeds = jnp.full((1, 1), t) if stochastic else None
            token = (key, key, one, zero, zero, one / 1024)
            return gated_delta_rule_2_step(state, *token, rounding_seeds=seeds)[0], None

        return jax.lax.scan(body, state, jnp.arange(512))[0]

    np.testing.assert_array_equal(run(False, state), 1)
    found = run(True, state).astype(jnp.float32)
    np.testing.assert_allclose(found[0, 0, 0], 1.5, atol=0.2)
    np.testing.assert_array_equal(found[0, 0, 1:], 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0])
def test_values_without_neighbours_stay_what_they_are(value):
    # A NaN whose payload is all ones, as NVIDIA's, too.
    x = np.full((1, 1, 8, 8), value, np.float32)
    x[0, 0, 0] = np.abs(np.full(8, -1, np.int32).view(np.float32)) if np.isnan(value) else value
    found = rounded(jnp.asarray(x), jnp.bfloat16, jnp.ones((1, 1), jnp.uint32))
    np.testing.assert_array_equal(found.astype(jnp.float32), x)
    assert np.isnan(value) or (np.signbit(found.astype(jnp.float32)) == np.signbit(x)).all()


def test_the_gradient_of_rounding_is_that_of_a_conversion():
    state, token = one_token()

    def loss(state, token, seeds=None):
        new_state, output = gated_delta_rule_2_step(state, *token, rounding_seeds=seeds)
        return jnp.sum(new_state.astype(jnp.float32)) + jnp.sum(output)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    wide = gradient(state.astype(jnp.float32), token)
    for seeds in (None, jnp.ones((2, 2), int)):
        d_state, d_token = gradient(state, token, seeds)
        np.testing.assert_array_equal(d_state, wide[0].astype(jnp.bfloat16))
        jax.tree.map(np.testing.assert_array_equal, d_token, wide[1])
