"""States of packed documents: as if each document were run by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.testing import operator_inputs

# Borders inside chunks of 64 and at them; a row with fewer documents.
LENGTHS = [[1, 63, 64, 2], [100, 30]]
COUNT = 4
SEGMENT_IDS = np.stack([np.repeat(np.arange(len(row)), row) for row in LENGTHS])


@pytest.fixture(scope="module", params=["gentle", "resets"])
def inputs(request):
    inputs = operator_inputs(2, 130, 1, 4, 3, value_heads=2, dtype="float64", regime=request.param)
    states = operator_inputs(2 * COUNT, 1, 1, 4, 3, value_heads=2, dtype="float64").initial_state
    return *inputs[:6], states.reshape(2, COUNT, *states.shape[1:])


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(fn, *arrays):
    results, pullback = jax.vjp(fn, *arrays)
    # Different cotangents for every number.
    return results, pullback(jax.tree.map(jnp.cos, results))


def run_packed(implementation, *arrays):
    *six, states = arrays
    return gated_delta_rule_2(
        *six,
        initial_state=states,
        segment_ids=SEGMENT_IDS,
        num_documents=COUNT,
        implementation=implementation,
    )


PACKED = {name: functools.partial(run_packed, name) for name in ("xla", "recurrent")}


# [row and document, token of the document]: what is behind a document's end is not real.
ROWS = np.repeat([0, 1], COUNT)[:, None]
STARTS = np.array([np.cumsum([0, *row, *[0] * COUNT])[:COUNT] for row in LENGTHS])
ENDS = np.array([np.cumsum([*row, *[0] * COUNT])[:COUNT] for row in LENGTHS])
PLACES = STARTS.reshape(-1, 1) + np.arange(100)
REAL = PLACES < ENDS.reshape(-1, 1)


def one_by_one(*arrays):
    """Each document is a row; behind its end zeros, which leave its state alone."""
    *six, states = arrays
    real = REAL[..., None, None]
    apart = (jnp.where(real, x[ROWS, np.minimum(PLACES, 129)], 0) for x in six)
    flat = states.reshape(2 * COUNT, *states.shape[2:])
    outputs, finals = gated_delta_rule_2(*apart, initial_state=flat, implementation="recurrent")
    offsets = np.arange(130) - np.take_along_axis(STARTS, SEGMENT_IDS, axis=1)
    return outputs[SEGMENT_IDS + np.array([[0], [COUNT]]), offsets], finals.reshape(states.shape)


@pytest.mark.parametrize("implementation", PACKED)
def test_documents_of_a_row_run_from_and_to_states_of_their_own(inputs, implementation):
    packed = PACKED[implementation]
    with jax.enable_x64(True):
        actual = outputs_and_gradients(packed, *inputs)
        expected = outputs_and_gradients(one_by_one, *inputs)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-10)


def test_one_document_without_segment_ids_and_without_a_state():
    six = operator_inputs(1, 9, 1, 4, initial_state=False)[:6]
    outputs, states = jax.jit(functools.partial(gated_delta_rule_2, num_documents=2))(*six)
    expected, state = jax.jit(functools.partial(gated_delta_rule_2, implementation="recurrent"))(
        *six
    )
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_allclose(states[:, 0], state, atol=1e-5)
    assert not np.any(states[:, 1])


@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
def test_documents_beyond_their_number_are_nan_and_a_nan_stays_in_its_document(implementation):
    inputs = operator_inputs(1, 6, 1, 4, initial_state=False)[:6]
    run = functools.partial(
        gated_delta_rule_2,
        segment_ids=np.asarray([[0, 0, 1, 1, 2, 2]]),
        implementation=implementation,
    )
    poisoned = [np.array(x) for x in inputs]
    poisoned[2][:, 0] = np.nan
    outputs, states = jax.jit(functools.partial(run, num_documents=2))(*poisoned)
    outputs, states, expected = jax.device_get((outputs, states, jax.jit(run)(*inputs)[0]))
    np.testing.assert_allclose(outputs[:, 2:4], expected[:, 2:4], rtol=1e-6)
    assert np.isnan(outputs[:, 0]).any() and np.isnan(outputs[:, 4:]).all()
    assert np.isnan(states[:, 0]).any() and np.isfinite(states[:, 1]).all()


def test_the_kernels_refuse_states_of_documents():
    inputs = operator_inputs(1, 4, 1, 64, dtype="bfloat16", initial_state=False)[:6]
    with pytest.raises(NotImplementedError, match="pallas.*num_documents"):
        gated_delta_rule_2(*inputs, num_documents=1, implementation="pallas")
    with pytest.raises(ValueError, match="num_documents: expected a positive integer .*got 0"):
        gated_delta_rule_2(*inputs, num_documents=0)
    with pytest.raises(ValueError, match=r"initial_state: .*\(1, 2, 1, 64, 64\).*\(1, 1, 64, 64\)"):
        gated_delta_rule_2(*inputs, num_documents=2, initial_state=jnp.ones((1, 1, 64, 64)))
