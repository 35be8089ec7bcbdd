"""What is not finite in a document stays in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LENGTH = 20
SEGMENT_IDS = np.asarray([[1] * 3 + [2] * 6 + [3] * 11, [0] * 18 + [7] * 2], np.int32)


@functools.partial(jax.jit, static_argnames=("run", "implementation"))
def outputs_and_gradients(run, tokens, state, cotangents, implementation):
    results, pullback = jax.vjp(lambda *x: run(*x, SEGMENT_IDS, implementation), tokens, state)
    return results, pullback(cotangents)


@pytest.fixture(params=["xla", "recurrent"])
def outcome(operator, request):
    """Tokens, state and cotangents of each operator, and what it makes of them."""
    run, _, tokens, state = operator(2, LENGTH)
    cotangents = jax.eval_shape(lambda *x: run(*x, SEGMENT_IDS, "xla"), tokens, state)
    cotangents = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), cotangents)

    def apply(tokens, state, cotangents):
        return outputs_and_gradients(run, tokens, state, cotangents, request.param)

    return apply, tokens, state, cotangents


def assert_same_elsewhere(result, expected, row, documents):
    """Equal to the last bit in all rows but `row`, and there in all documents but these."""
    (outputs, final), (d_tokens, d_state) = result
    (expected_outputs, expected_final), (expected_d_tokens, expected_d_state) = expected
    own = np.isin(SEGMENT_IDS, documents) & (np.arange(2) == row)[:, None]
    by_token = {"outputs": (outputs, expected_outputs)}
    by_token |= {name: (x, expected_d_tokens[name]) for name, x in d_tokens.items()}
    for name, (x, y) in by_token.items():
        np.testing.assert_array_equal(x[~own], y[~own], err_msg=name)
    for first, (x, y) in ((0, (d_state, expected_d_state)), (-1, (final, expected_final))):
        for leaf, expected_leaf in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            safe = ~own[:, first]
            np.testing.assert_array_equal(leaf[safe], expected_leaf[safe])
    assert not np.isfinite(outputs[own]).all() or not np.isfinite(d_tokens["g"][own]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_that_is_not_finite_stays_in_its_document(outcome, value):
    apply, tokens, state, cotangents = outcome
    expected = apply(*outcome[1:])
    for name, x in tokens.items():
        changed = tokens | {name: x.at[0, 4].set(value)}
        assert_same_elsewhere(apply(changed, state, cotangents), expected, 0, [2])
    bad_state = jax.tree.map(lambda x: x.at[1].set(value), state)
    assert_same_elsewhere(apply(tokens, bad_state, cotangents), expected, 1, [0])


def test_a_cotangent_that_is_not_finite_stays_in_its_document(outcome):
    apply, tokens, state, (d_outputs, d_state) = outcome
    expected = apply(*outcome[1:])
    result = apply(tokens, state, (d_outputs.at[0, 5].set(jnp.nan), d_state))
    assert_same_elsewhere(result, expected, 0, [2])
    np.testing.assert_array_equal(result[0][0], expected[0][0])
    bad_state = jax.tree.map(lambda x: x.at[1].set(jnp.nan), d_state)
    assert_same_elsewhere(apply(tokens, state, (d_outputs, bad_state)), expected, 1, [7])


def test_tokens_before_a_nan_are_read_as_without_it(outcome):
    apply, tokens, state, cotangents = outcome
    (expected, _), _ = apply(*outcome[1:])
    changed = tokens | {"v": tokens["v"].at[0, 5].set(jnp.nan)}
    (outputs, _), _ = apply(changed, state, cotangents)
    np.testing.assert_array_equal(outputs[0, :5], expected[0, :5])
    assert np.isnan(outputs[0, 5]).any()
