"""Forwards compiled alone, as users run them: no state is given, and only the outputs are used.

Constants (the state of zeros, the cotangent of a sum) then meet the compiler in the operator's own
products. Memory is filled here (tests/conftest.py), so that what nothing wrote shows.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.ops import mamba2
from gdn2_jax.testing import operator_inputs


def assert_close(results, expected, bound):
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        x, y = (np.asarray(a).astype(np.float64) for a in (x, y))
        assert np.linalg.norm(x - y) <= bound * (np.linalg.norm(y) or 1.0)


def outputs_and_expected(fn, reference, inputs):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x).astype(np.float64)) for x in inputs]
        expected = jax.jit(reference)(*wide)
    return jax.jit(fn)(*inputs), expected


def test_memory_that_nothing_wrote_is_not_zero():
    if hasattr(ctypes.CDLL(None), "mallopt"):
        assert np.empty(5000, np.uint8).all()


def outputs_alone(*inputs, implementation):
    return gated_delta_rule_2(*inputs, implementation=implementation)[0]


@pytest.mark.parametrize(
    "implementation, dtype, length, key_dim, value_dim",
    [
        ("xla", "float32", 1, 32, 32),
        ("xla", "float32", 17, 16, 48),
        ("xla", "float32", 21, 32, 32),
        ("xla", "bfloat16", 21, 32, 64),
        ("xla", "bfloat16", 64, 32, 32),
        ("xla", "float32", 65, 64, 32),
        ("recurrent", "float32", 21, 32, 32),
    ],
)
def test_outputs_compiled_alone_are_the_recurrence(
    implementation, dtype, length, key_dim, value_dim
):
    inputs = operator_inputs(2, length, 4, key_dim, value_dim, regime="gentle", dtype=dtype)[:6]
    results = outputs_and_expected(
        functools.partial(outputs_alone, implementation=implementation),
        functools.partial(outputs_alone, implementation="recurrent"),
        inputs,
    )
    assert_close(*results, 2e-5 if dtype == "float32" else 1e-2)


def test_gradients_of_a_sum_of_outputs_are_those_of_the_recurrence():
    inputs = operator_inputs(2, 21, 4, 32, 32, regime="gentle", dtype="float32")[:6]

    def gradients(implementation):
        def loss(*inputs):
            return outputs_alone(*inputs, implementation=implementation).sum()

        return jax.grad(loss, argnums=range(6))

    results = outputs_and_expected(gradients("xla"), gradients("recurrent"), inputs)
    assert_close(*results, 2e-5)


def test_a_step_from_a_state_of_zeros_is_the_first_token():
    inputs = [x[:, 0] for x in operator_inputs(2, 1, 4, 32, 32, dtype="float32")[:6]]

    def step(*inputs):
        return gated_delta_rule_2_step(jnp.zeros((2, 4, 32, 32), inputs[3].dtype), *inputs)[1]

    assert_close(*outputs_and_expected(step, step, inputs), 2e-5)


@pytest.mark.parametrize("length", [1, 21, 64])
def test_outputs_of_mamba2_compiled_alone_are_its_recurrence(length):
    rng = np.random.default_rng(0)
    shapes = [(2, length, 1, 32), (2, length, 1, 32), (2, length, 4, 32)]
    inputs = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    inputs += [jnp.asarray(s * rng.uniform(size=(2, length, 4)), jnp.float32) for s in (-1, 1)]

    def outputs(implementation):
        return lambda *inputs: mamba2(*inputs, implementation=implementation)[0]

    assert_close(*outputs_and_expected(outputs("xla"), outputs("recurrent"), inputs), 2e-5)
