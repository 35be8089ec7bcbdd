"""What a result must not depend on, bit for bit: other segments, later tokens, batch neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.testing import OperatorInputs, operator_inputs

# The recurrence has no chunks, so that a few tokens show all of it.
LENGTHS = {"xla": 130, "recurrent": 20}
BORDERS = {"xla": [1, 40, 64, 100, 129], "recurrent": [1, 9, 19]}


@functools.partial(jax.jit, static_argnames="implementation")
def run(inputs, cotangents, implementation):
    """Outputs and gradients as {"o", "final_state", "q", ...}."""
    *arrays, segment_ids = inputs

    def fn(*arrays):
        *six, initial_state = arrays
        return gated_delta_rule_2(
            *six,
            initial_state=initial_state,
            segment_ids=segment_ids,
            implementation=implementation,
        )

    (outputs, state), pullback = jax.vjp(fn, *arrays)
    gradients = dict(zip(OperatorInputs._fields, pullback(cotangents)))
    return {"o": outputs, "final_state": state}, gradients


def draw(length, regime, seed):
    inputs = operator_inputs(2, length, 1, 16, 8, value_heads=2, regime=regime, seed=seed)
    cotangents = operator_inputs(2, length, 1, 16, 8, value_heads=2, seed=seed + 100)
    no_segments = np.zeros((2, length), np.int32)
    inputs = inputs._replace(segment_ids=no_segments)
    # In NumPy: jnp would compile each slice.
    return jax.device_get((inputs, (cotangents.v, cotangents.initial_state)))


def with_start(inputs, other, start):
    """`inputs`, with the tokens before `start` (and the initial state) of `other`."""
    before = np.arange(inputs.v.shape[1])[:, None, None] < start
    merged = [np.where(before, y, x) for x, y in zip(inputs[:6], other[:6])]
    return OperatorInputs(*merged, other.initial_state, inputs.segment_ids)


@pytest.fixture(params=["xla", "recurrent"])
def implementation(request):
    return request.param


@pytest.mark.parametrize("regime", ["gentle", "mixture"])
def test_nothing_crosses_a_segment_border(implementation, regime):
    length = LENGTHS[implementation]
    inputs, (d_outputs, d_state) = draw(length, regime, 0)
    other, _ = draw(length, "g=-5", 1)
    for border in BORDERS[implementation]:
        late = np.arange(length) >= border
        segment_ids = np.broadcast_to(late.astype(np.int32), (2, length))
        cotangents = (np.where(late[:, None, None], d_outputs, 0), d_state)
        inputs = inputs._replace(segment_ids=segment_ids)
        (results, gradients), (changed, changed_gradients) = jax.device_get(
            [
                run(x, cotangents, implementation)
                for x in (inputs, with_start(inputs, other, border))
            ]
        )
        np.testing.assert_array_equal(results["o"][:, border:], changed["o"][:, border:])
        np.testing.assert_array_equal(results["final_state"], changed["final_state"])
        assert not np.any(gradients["initial_state"]), border
        for name in "qkvgbw":
            assert not np.any(gradients[name][:, :border]), (name, border)
            assert np.any(gradients[name][:, border:]) or border == length - 1, (name, border)
            np.testing.assert_array_equal(
                gradients[name][:, border:], changed_gradients[name][:, border:], err_msg=name
            )


def bits(x):
    return np.asarray(x).view(np.int32)


@pytest.mark.parametrize("regime", ["gentle", "mixture"])
@pytest.mark.parametrize("later", ["g=0", "resets"])
def test_no_bit_of_a_past_output_or_gradient_depends_on_later_tokens(implementation, regime, later):
    length = LENGTHS[implementation]
    inputs, (d_outputs, d_state) = draw(length, regime, 0)
    other, _ = draw(length, later, 1)
    other = other._replace(v=1e4 * other.v, k=-other.k, q=1e3 * other.q)
    for border in BORDERS[implementation]:
        early = jnp.arange(length) < border
        cotangents = (jnp.where(early[:, None, None], d_outputs, 0), jnp.zeros_like(d_state))
        results, gradients = run(inputs, cotangents, implementation)
        changed, changed_gradients = run(
            with_start(other, inputs, border), cotangents, implementation
        )
        np.testing.assert_array_equal(
            bits(results["o"][:, :border]), bits(changed["o"][:, :border])
        )
        for name, x in gradients.items():
            y = changed_gradients[name]
            past = slice(None) if name == "initial_state" else (slice(None), slice(border))
            np.testing.assert_array_equal(bits(x[past]), bits(y[past]), err_msg=name)
        for name in "qkvgbw":
            assert not np.any(gradients[name][:, border:]), (name, border)


def test_a_sequence_does_not_depend_on_its_batch_neighbours_even_if_they_are_nan(implementation):
    inputs, cotangents = draw(LENGTHS[implementation], "mixture", 0)
    poisoned = jax.tree.map(np.copy, inputs)
    for x in poisoned[:7]:
        x[1] = np.nan
    results, gradients = run(inputs, cotangents, implementation)
    changed, changed_gradients = run(poisoned, cotangents, implementation)
    for one, two in ((results, changed), (gradients, changed_gradients)):
        for name in one:
            np.testing.assert_array_equal(one[name][0], two[name][0], err_msg=name)
            assert np.isfinite(one[name]).all(), name
    assert np.isnan(changed["o"][1]).all()


def test_a_value_head_does_not_depend_on_the_other_heads(implementation):
    inputs, cotangents = draw(LENGTHS[implementation], "mixture", 0)
    results, gradients = run(inputs, cotangents, implementation)
    changed, changed_gradients = run(
        inputs._replace(v=inputs.v * np.float32([[1], [3]])), cotangents, implementation
    )
    np.testing.assert_allclose(results["o"][:, :, 0], changed["o"][:, :, 0], rtol=1e-6)
    np.testing.assert_allclose(
        gradients["v"][:, :, 0], changed_gradients["v"][:, :, 0], rtol=1e-6, atol=1e-7
    )
    assert not np.allclose(results["o"][:, :, 1], changed["o"][:, :, 1])


def test_results_are_deterministic(implementation):
    inputs, cotangents = draw(LENGTHS[implementation], "mixture", 0)
    first = run(inputs, cotangents, implementation)
    second = run(inputs, cotangents, implementation)
    jax.tree.map(np.testing.assert_array_equal, first, second)
