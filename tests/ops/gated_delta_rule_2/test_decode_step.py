"""Prefill with the chunkwise form, then steps: the same as one long recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.testing import operator_inputs

STEPS = 4


@pytest.mark.parametrize("prefill", [1, 66])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("bfloat16", 1e-2)])
def test_prefill_and_steps_equal_one_long_recurrence(prefill, dtype, tolerance):
    inputs = operator_inputs(
        2, prefill + STEPS, 2, 8, 6, value_heads=4, dtype=dtype, regime="mixture"
    )
    *six, initial_state, _ = inputs
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
            outputs.append(output[:, None])
        outputs = jnp.concatenate(outputs, axis=1)
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
