"""The decode kernel on a Hopper GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.ops import rounding_seeds
from gdn2_jax.ops.choice import hopper_attached
from gdn2_jax.pallas.decode_step import Tuning, decode_step
from gdn2_jax.testing import REGIMES, assert_matches_recurrence, operator_inputs

pytestmark = pytest.mark.skipif(not hopper_attached(), reason="needs a Hopper GPU")

step = functools.partial(gated_delta_rule_2_step, implementation="pallas")


def stepped(*arrays, initial_state, segment_ids=None, step=step):
    """The whole operator, by steps."""
    assert segment_ids is None

    def body(state, token):
        return step(state, *token)

    time_major = [jnp.moveaxis(x, 1, 0) for x in arrays]
    state, outputs = jax.lax.scan(body, initial_state, time_major)
    return jnp.moveaxis(outputs, 0, 1), state


def one_token(batch, heads, dim=128, **options):
    inputs = operator_inputs(batch, 1, heads, dim, **{"dtype": "bfloat16", **options})
    return inputs.initial_state, *(x[:, 0] for x in inputs[:6])


@pytest.mark.parametrize("regime", REGIMES)
def test_steps_match_the_recurrence_with_all_gradients(regime):
    inputs = operator_inputs(3, 20, 2, 128, value_heads=4, regime=regime, dtype="bfloat16")
    assert_matches_recurrence(stepped, inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("key_dim, value_dim", [(64, 64), (64, 128), (128, 64)])
def test_other_channels_match_the_recurrence(key_dim, value_dim, dtype):
    inputs = operator_inputs(2, 20, 3, key_dim, value_dim, dtype=dtype, regime="mixture")
    assert_matches_recurrence(stepped, inputs)


@pytest.mark.parametrize("columns", [16, 32, 64])
@pytest.mark.parametrize("batch", [1, 40])
def test_every_tuning_computes_the_same(batch, columns):
    arrays = one_token(batch, 16)
    results = decode_step(*arrays, 0.3, Tuning(columns=columns))
    expected = gated_delta_rule_2_step(*arrays, scale=0.3, implementation="xla")
    np.testing.assert_allclose(results[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(
        *(x[1].astype(jnp.float32) for x in (results, expected)), rtol=1e-2, atol=1e-5
    )


@pytest.mark.parametrize("columns", [16, 32, 64])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_bfloat16_state_is_rounded_as_by_xla(dim, rounding, columns):
    state, *arrays = one_token(3, 16, dim)
    state = state.astype(jnp.bfloat16)
    seeds = None
    if rounding == "stochastic":
        seeds = jnp.arange(48, dtype=jnp.uint32).reshape(3, 16)
    found, output = decode_step(state, *arrays, 0.3, Tuning(columns=columns), seeds)
    expected, expected_output = gated_delta_rule_2_step(
        state, *arrays, scale=0.3, rounding_seeds=seeds, implementation="xla"
    )
    # Approximate exponentials and sums in another order move a value over the border between its
    # neighbours, where it is near.
    assert found.dtype == jnp.bfloat16 and np.mean(found != expected) < 1e-2
    found, expected, *outputs = (
        x.astype(jnp.float32) for x in (found, expected, output, expected_output)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(*outputs, rtol=1e-2, atol=1e-4)


def test_a_bfloat16_state_stays_near_over_many_steps():
    inputs = operator_inputs(2, 500, 4, 128, dtype="bfloat16")
    *six, state = inputs[:7]
    expected, expected_state = gated_delta_rule_2(*six, initial_state=state)

    def body(carry, token):
        state, position = carry
        position += jnp.uint32(1)
        state, output = step(state, *token, rounding_seeds=rounding_seeds(position, 4))
        return (state, position), output

    carry = state.astype(jnp.bfloat16), jnp.zeros(2, jnp.uint32)
    (state, _), outputs = jax.lax.scan(body, carry, [jnp.moveaxis(x, 1, 0) for x in six])
    for x, y in ((jnp.moveaxis(outputs, 0, 1), expected), (state, expected_state)):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.linalg.norm(x - y) < 3e-2 * np.linalg.norm(y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_a_donated_state_is_updated_in_place(implementation, dtype):
    state, *arrays = one_token(8, 16)
    arrays = (state.astype(dtype), *arrays)
    donating = jax.jit(
        functools.partial(gated_delta_rule_2_step, implementation=implementation),
        donate_argnums=0,
    )
    compiled = donating.lower(*arrays).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == arrays[0].nbytes
    assert memory.temp_size_in_bytes < arrays[0].nbytes
    assert not re.search(r"= b?f\d+\[8,16,128,128\]\S* copy", compiled.as_text())
    address = arrays[0].unsafe_buffer_pointer()
    state, _ = compiled(*arrays)
    assert state.unsafe_buffer_pointer() == address


def test_a_state_that_is_not_donated_stays_as_it_was():
    arrays = one_token(2, 4)
    before = np.array(arrays[0])
    new_state, _ = jax.jit(step)(*arrays)
    np.testing.assert_array_equal(arrays[0], before)
    assert np.abs(new_state - before).max() > 0.1


def test_the_kernel_is_the_default():
    arrays = one_token(2, 4)
    assert "mosaic_gpu" in jax.jit(gated_delta_rule_2_step).lower(*arrays).as_text()


def test_steps_are_bitwise_repeatable():
    inputs = operator_inputs(40, 30, 16, 128, dtype="bfloat16", regime="mixture")
    run = jax.jit(lambda *x: stepped(*x[:6], initial_state=x[6]))
    first, second = (run(*inputs[:7]) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_prefill_and_steps_by_default_equal_one_run():
    *six, state, _ = operator_inputs(2, 90, 2, 128, value_heads=4, dtype="bfloat16")
    xla = functools.partial(gated_delta_rule_2, implementation="xla")
    expected, expected_state = xla(*six, initial_state=state)
    _, state = xla(*(x[:, :70] for x in six), initial_state=state)
    rest = [x[:, 70:] for x in six]
    outputs, state = stepped(*rest, initial_state=state, step=gated_delta_rule_2_step)
    for x, y in ((outputs, expected[:, 70:]), (state, expected_state)):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.linalg.norm(x - y) < 1e-2 * np.linalg.norm(y)


def test_a_mapped_axis_joins_the_batch():
    arrays = one_token(6, 4)
    expected = jax.jit(step)(*arrays)
    mapped = jax.jit(jax.vmap(step))(*(x.reshape(3, 2, *x.shape[1:]) for x in arrays))
    for x, y in zip(mapped, expected, strict=True):
        np.testing.assert_array_equal(x.reshape(y.shape), y)
