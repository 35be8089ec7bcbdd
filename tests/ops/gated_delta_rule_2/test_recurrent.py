"""The definition itself, judged by a NumPy loop over the paper's equations 8-10."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.testing import check_gradients, operator_inputs

recurrent = functools.partial(gated_delta_rule_2, implementation="recurrent")


def numpy_loop(q, k, v, g, b, w, initial_state, segment_ids):
    batch, length, key_heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    outputs = np.zeros(v.shape)
    states = np.zeros((batch, value_heads, key_dim, value_dim))
    for n in range(batch):
        for head in range(value_heads):
            h = head // (value_heads // key_heads)
            state = np.array(initial_state[n, head])
            for t in range(length):
                if t > 0 and segment_ids[n, t] != segment_ids[n, t - 1]:
                    state = np.zeros_like(state)
                erase = np.eye(key_dim) - np.outer(k[n, t, h], b[n, t, h] * k[n, t, h])
                write = np.outer(k[n, t, h], w[n, t, head] * v[n, t, head])
                state = erase @ np.diag(np.exp(g[n, t, h])) @ state + write
                outputs[n, t, head] = state.T @ q[n, t, h] / np.sqrt(key_dim)
            states[n, head] = state
    return outputs, states


@pytest.mark.parametrize("regime", ["gentle", "mixture", "wide_gates"])
def test_recurrence_follows_the_equations(regime):
    inputs = operator_inputs(
        2, 9, 2, 5, 3, value_heads=6, regime=regime, dtype="float64", segments=3, seed=1
    )
    with jax.enable_x64(True):
        outputs, state = recurrent(*inputs[:6], initial_state=inputs[6], segment_ids=inputs[7])
    expected_outputs, expected_state = numpy_loop(*map(np.asarray, inputs))
    np.testing.assert_allclose(outputs, expected_outputs, atol=1e-13)
    np.testing.assert_allclose(state, expected_state, atol=1e-13)


def test_step_follows_the_equations():
    inputs = operator_inputs(3, 1, 2, 5, 4, value_heads=4, dtype="float64")
    with jax.enable_x64(True):
        state, output = gated_delta_rule_2_step(inputs[6], *(x[:, 0] for x in inputs[:6]))
    expected = numpy_loop(*map(np.asarray, inputs[:7]), np.zeros((3, 1)))
    np.testing.assert_allclose(output, expected[0][:, 0], atol=1e-13)
    np.testing.assert_allclose(state, expected[1], atol=1e-13)


def test_gradients_of_the_recurrence_are_its_numerical_derivatives():
    inputs = operator_inputs(1, 7, 1, 4, 3, value_heads=2, dtype="float64", segments=2)

    def fn(q, k, v, g, b, w, initial_state, segment_ids):
        return recurrent(q, k, v, g, b, w, initial_state=initial_state, segment_ids=segment_ids)

    check_gradients(fn, inputs)


def test_forward_mode_and_forward_over_reverse_work_through_the_recurrence():
    inputs = operator_inputs(1, 6, 1, 3, dtype="float64")[:7]
    tangents = operator_inputs(1, 6, 1, 3, dtype="float64", seed=1)[:7]

    def loss(args):
        outputs, state = recurrent(*args[:6], initial_state=args[6])
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.cos(state))

    with jax.enable_x64(True):
        gradient_of = jax.jit(jax.grad(loss))
        inputs, tangents = jax.device_get((inputs, tangents))
        _, slope = jax.jit(functools.partial(jax.jvp, loss))((inputs,), (tangents,))
        both = jax.jit(functools.partial(jax.jvp, jax.grad(loss)))
        gradient, curvature = both((inputs,), (tangents,))
        along = sum(np.vdot(x, y) for x, y in zip(gradient, tangents))
        ahead, behind = (
            gradient_of(tuple(x + eps * y for x, y in zip(inputs, tangents)))
            for eps in (1e-5, -1e-5)
        )
    np.testing.assert_allclose(slope, along, rtol=1e-10)
    differences = [(np.asarray(x) - np.asarray(y)) / 2e-5 for x, y in zip(ahead, behind)]
    for x, expected in zip(curvature, differences):
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-7)
