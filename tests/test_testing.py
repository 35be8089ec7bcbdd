"""The judges themselves: each must reject what is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.testing import (
    REGIMES,
    OperatorInputs,
    assert_matches_recurrence,
    check_gradients,
    compare_with_recurrence,
    error_bound,
    operator_inputs,
)

recurrent = functools.partial(gated_delta_rule_2, implementation="recurrent")
TENSORS = ["o", "final_state", "dq", "dk", "dv", "dg", "db", "dw", "dinitial_state"]


def draw(**options):
    return operator_inputs(2, 9, 1, 4, 3, value_heads=2, **options)


@pytest.mark.parametrize("regime", REGIMES)
def test_inputs_have_the_shapes_dtypes_and_ranges_of_the_operator(regime):
    inputs = operator_inputs(3, 50, 2, 8, 6, value_heads=4, regime=regime, dtype="bfloat16")
    assert {x.shape for x in (inputs.q, inputs.k, inputs.g, inputs.b)} == {(3, 50, 2, 8)}
    assert {x.shape for x in (inputs.v, inputs.w)} == {(3, 50, 4, 6)}
    assert inputs.initial_state.shape == (3, 4, 8, 6) and inputs.segment_ids is None
    assert inputs.g.dtype == inputs.initial_state.dtype == jnp.float32
    assert {x.dtype.name for x in (*inputs[:3], inputs.b, inputs.w)} == {"bfloat16"}
    settings = REGIMES[regime]
    assert inputs.g.max() <= 0 and not jnp.isnan(inputs.g).any()
    assert settings.erase[0] <= inputs.b.min() and inputs.b.max() <= settings.erase[1]
    assert settings.write[0] <= inputs.w.min() and inputs.w.max() <= settings.write[1]
    lengths = np.linalg.norm(np.asarray(inputs.k, np.float32), axis=-1)
    np.testing.assert_allclose(lengths, 1, atol=1e-2)
    repeats = (inputs.k[:, 1:] == inputs.k[:, :-1]).all(-1)
    assert repeats.all() if settings.keys == "repeated" else not repeats.any()
    assert (inputs.k >= 0).all() == (settings.keys == "positive")
    if isinstance(settings.decay, float):
        np.testing.assert_array_equal(inputs.g, np.float32(settings.decay))
    if settings.decay == "mixture":
        chunk = inputs.g[0, :16]
        assert chunk.min() == -1000 and chunk.max() == 0
    if settings.decay in ("uniform", "extremes", "borders", "resets"):
        block = inputs.g[0, :16]
        assert (block.std(axis=0) > 1).all() | ~np.isfinite(block).all()
        assert np.isneginf(inputs.g).any() == (settings.decay == "resets")


def test_inputs_of_all_dtypes_are_the_same_numbers_rounded():
    wide, low = draw(dtype="float64", seed=3), draw(dtype="float16", seed=3)
    for x, y in zip(wide[:7], low[:7]):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
    assert wide.q.dtype == wide.g.dtype == jnp.float64


def test_segments_start_anywhere_and_differ_between_rows():
    inputs = operator_inputs(8, 30, 1, 2, segments=4)
    assert inputs.segment_ids.dtype == jnp.int32
    starts = np.diff(inputs.segment_ids, axis=1)
    assert set(starts.ravel()) == {0, 1}
    np.testing.assert_array_equal(starts.sum(1), 3)
    assert len(np.unique(starts, axis=0)) == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"regime": "wild"}, "regime: .*mixture.*'wild'"),
        ({"dtype": "float8"}, "dtype: .*bfloat16.*'float8'"),
        ({"segments": 10}, "segments: .*1 to 9.*10"),
        ({"segments": 0}, "segments: .*1 to 9.*0"),
    ],
)
def test_a_bad_option_of_the_inputs_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


def test_the_recurrence_agrees_with_itself_to_the_rounding_of_float64():
    rows = compare_with_recurrence(recurrent, draw(dtype="float64", segments=2))
    assert [row.tensor for row in rows] == TENSORS
    # Not 0: the reference is compiled with optimisation, which may contract a product and a sum.
    assert all(row.error < 1e-14 and row.passed for row in rows)
    rows = compare_with_recurrence(recurrent, draw(initial_state=False))
    assert [row.tensor for row in rows] == TENSORS[:-1]
    assert all(0 < row.error < 1e-6 for row in rows)


def with_wrong_gradient(name, factor):
    @jax.custom_jvp
    def wrong(x):
        return x

    wrong.defjvp(lambda primals, tangents: (primals[0], factor * tangents[0]))

    def fn(*six, initial_state, segment_ids):
        arrays = OperatorInputs(*six, initial_state, segment_ids)
        arrays = arrays._replace(**{name: wrong(getattr(arrays, name))})
        return recurrent(*arrays[:6], initial_state=arrays[6], segment_ids=segment_ids)

    return fn


@pytest.mark.parametrize("name", OperatorInputs._fields[:-1])
def test_an_error_in_one_gradient_is_found_and_is_its_relative_size(name):
    rows = compare_with_recurrence(with_wrong_gradient(name, 1 + 1e-3), draw())
    for row in rows:
        assert row.passed == (row.tensor != f"d{name}")
    (wrong,) = (row for row in rows if not row.passed)
    np.testing.assert_allclose(wrong.error, 1e-3, rtol=1e-2)


@pytest.mark.parametrize("result", ["o", "final_state"])
def test_an_error_in_one_output_is_found(result):
    def fn(*six, **options):
        outputs, state = recurrent(*six, **options)
        zero_slope = jax.lax.stop_gradient
        if result == "o":
            return outputs + 1e-3 * zero_slope(outputs), state
        return outputs, state + 1e-3 * zero_slope(state)

    rows = compare_with_recurrence(fn, draw())
    assert [row.tensor for row in rows if not row.passed] == [result]


def test_a_forward_that_is_wrong_only_without_gradients_is_found():
    @jax.custom_vjp
    def wrong_alone(x):
        return 1.01 * x

    wrong_alone.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent,))

    def fn(*six, **options):
        outputs, state = recurrent(*six, **options)
        return wrong_alone(outputs), state

    rows = compare_with_recurrence(fn, draw())
    (failed,) = (row for row in rows if not row.passed)
    assert failed.tensor == "o"
    np.testing.assert_allclose(failed.error, 1e-2, rtol=1e-2)


def test_nan_and_infinity_fail():
    def fn(*six, **options):
        outputs, state = recurrent(*six, **options)
        return outputs.at[0, 0, 0, 0].set(jnp.nan), state.at[0, 0, 0, 0].set(jnp.inf)

    errors = {row.tensor: row.error for row in compare_with_recurrence(fn, draw())}
    assert errors["o"] == errors["final_state"] == np.inf
    with pytest.raises(AssertionError, match="o: relative error inf > 2e-05; final_state: "):
        assert_matches_recurrence(fn, draw())


def test_a_reference_of_zero_is_compared_absolutely():
    inputs = draw(regime="g=-1000")

    def fn(*six, **options):
        outputs, state = recurrent(*six, **options)
        return outputs + 1e-4 * jnp.sum(six[3] - jax.lax.stop_gradient(six[3])), state

    errors = {row.tensor: row for row in compare_with_recurrence(fn, inputs)}
    assert 1e-4 < errors["dg"].error < 1e-2 and not errors["dg"].passed
    assert errors["db"].error == 0


def test_vanishing_gate_gradients_in_half_precision_are_measured_beside_that_of_q():
    wrong = with_wrong_gradient("b", 1.5)
    half = {
        row.tensor: row
        for row in compare_with_recurrence(wrong, draw(regime="g=-20", dtype="bfloat16"))
    }
    assert half["db"].passed
    single = {row.tensor: row for row in compare_with_recurrence(wrong, draw(regime="g=-20"))}
    assert not single["db"].passed


def test_bounds_follow_the_coarsest_dtype_and_the_hardness_of_the_inputs():
    assert error_bound(draw(dtype="float64")) == 1e-10
    assert error_bound(draw()) == error_bound(draw(regime="positive_keys")) == 2e-5
    for dtype in ("bfloat16", "float16"):
        inputs = operator_inputs(1, 40, 1, 16, dtype=dtype)
        assert error_bound(inputs) == 1e-2
        assert error_bound(inputs._replace(b=2 * inputs.b)) == 3e-2
        assert error_bound(inputs._replace(k=inputs.k.at[:, 30].set(inputs.k[:, 2]))) == 3e-2
    assert error_bound(draw()._replace(q=inputs.q)) == 1e-2


def test_inputs_on_which_the_recurrence_overflows_are_refused():
    inputs = draw(regime="g=0")
    with pytest.raises(ValueError, match="recurrence in float64 is not finite"):
        compare_with_recurrence(recurrent, inputs._replace(v=inputs.v.at[0, 0, 0, 0].set(jnp.inf)))


def test_check_gradients_accepts_right_and_rejects_wrong_gradients_of_any_function():
    x, y = np.linspace(0.1, 1, 12).reshape(3, 4), {"a": np.ones(4), "b": np.arange(3.0)}
    index = np.array([0, 2])

    def fn(x, y, index):
        return jnp.sin(x @ y["a"])[index], jnp.exp(-y["b"])

    check_gradients(fn, (x, y, index))

    def halved(x, y, index):
        x = 0.5 * x + jax.lax.stop_gradient(0.5 * x)
        return fn(x, y, index)

    with pytest.raises(AssertionError, match="argument 0"):
        check_gradients(halved, (x, y, index))

    def wrong_in_one_leaf(x, y, index):
        return fn(x, y | {"b": jax.lax.stop_gradient(y["b"])}, index)

    with pytest.raises(AssertionError, match="argument 1"):
        check_gradients(wrong_in_one_leaf, (x, y, index))


def test_check_gradients_finds_a_wrong_gradient_that_is_small_beside_the_others():
    def fn(x, y):
        hidden = jax.lax.stop_gradient(y)
        return jnp.sum(1e6 * x) + 1e-3 * jnp.sum(y * hidden)

    with pytest.raises(AssertionError, match="argument 1"):
        check_gradients(fn, (np.ones(5), np.ones(5)))


def test_check_gradients_needs_something_to_differentiate():
    with pytest.raises(ValueError, match="args: .*floating-point"):
        check_gradients(lambda x: x, (np.arange(3),))
