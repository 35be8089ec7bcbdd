"""States along a sequence: those after its prefixes."""

import functools

import jax
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops import gated_delta_rule_2_states
from gdn2_jax.testing import operator_inputs

# Documents that begin within a span of 4 tokens, and with it.
SEGMENT_IDS = np.array([[0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2], [5] * 7 + [6] * 5])


recurrent = jax.jit(functools.partial(gated_delta_rule_2, implementation="recurrent"))


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def inputs():
    return operator_inputs(2, 12, 1, 4, 3, value_heads=2, dtype="float64")


@pytest.mark.parametrize("segment_ids", [None, SEGMENT_IDS], ids=["one document", "packed"])
@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
def test_states_are_those_after_the_prefixes(inputs, implementation, segment_ids):
    *six, state = map(np.asarray, inputs[:7])
    run = functools.partial(
        gated_delta_rule_2_states, every=4, segment_ids=segment_ids, implementation=implementation
    )
    outputs, states = jax.jit(run)(*six, initial_state=state)
    assert states.shape == (2, 3, *state.shape[1:])
    for number, end in enumerate((4, 8, 12)):
        expected, final = recurrent(
            *(x[:, :end] for x in six),
            initial_state=state,
            segment_ids=None if segment_ids is None else segment_ids[:, :end],
        )
        np.testing.assert_allclose(np.asarray(states)[:, number], final, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(outputs, expected, rtol=1e-10, atol=1e-12)


def test_gradients_reach_the_inputs_through_every_state(inputs):
    six = inputs[:6]

    def loss(fn):
        return lambda *arrays: sum(jax.tree.map(lambda x: (x * x).sum(), fn(*arrays)))

    def by_prefixes(*arrays):
        pairs = [
            gated_delta_rule_2(*(x[:, :end] for x in arrays), implementation="recurrent")
            for end in (6, 12)
        ]
        return pairs[-1][0], jax.numpy.stack([state for _, state in pairs], 1)

    def states(*arrays):
        return gated_delta_rule_2_states(*arrays, every=6, implementation="recurrent")

    found, expected = (
        jax.jit(jax.grad(loss(fn), argnums=range(6)))(*six) for fn in (states, by_prefixes)
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


def test_spans_that_do_not_fill_the_sequence_are_refused(inputs):
    with pytest.raises(ValueError, match="^every: expected a divisor of the length 12, got 5$"):
        gated_delta_rule_2_states(*inputs[:6], every=5)
