"""The precision contract of the Hopper kernels, on a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops.choice import hopper_attached
from gdn2_jax.testing import REGIMES, assert_matches_recurrence, operator_inputs

pytestmark = pytest.mark.skipif(not hopper_attached(), reason="needs a Hopper GPU")

kernels = functools.partial(gated_delta_rule_2, implementation="pallas")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    "layout", [{"segments": 5, "value_heads": 4}, {}], ids=["segments, grouped", "plain"]
)
def test_kernels_match_the_recurrence(regime, layout, seed):
    inputs = operator_inputs(2, 300, 2, 128, regime=regime, dtype="bfloat16", seed=seed, **layout)
    assert_matches_recurrence(kernels, inputs, seed=seed)


@pytest.mark.parametrize("seed", range(2, 8))
def test_repeated_keys_in_short_segments_match_the_recurrence(seed):
    inputs = operator_inputs(
        2, 300, 2, 128, regime="repeated_keys", dtype="bfloat16", seed=seed, segments=5
    )
    assert_matches_recurrence(kernels, inputs, seed=seed)


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "value_heads"), [(64, 64, 6), (64, 128, 2), (128, 64, 2)]
)
def test_other_channels_match_the_recurrence(key_dim, value_dim, value_heads):
    inputs = operator_inputs(
        *(2, 300, 2, key_dim, value_dim),
        regime="mixture",
        dtype="bfloat16",
        value_heads=value_heads,
        segments=5,
    )
    assert_matches_recurrence(kernels, inputs)


def test_the_default_is_the_kernels():
    *arrays, state, _ = operator_inputs(2, 128, 2, 128, dtype="bfloat16")
    default, expected = (
        jax.jit(functools.partial(form, initial_state=state))(*arrays)
        for form in (gated_delta_rule_2, kernels)
    )
    for x, y in zip(default, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_float16_matches_the_recurrence():
    assert_matches_recurrence(kernels, operator_inputs(2, 300, 2, 128, dtype="float16"))


@jax.jit
def gradients(arrays, segment_ids):
    def loss(arrays):
        *operands, state = arrays
        outputs, final_state = kernels(*operands, initial_state=state, segment_ids=segment_ids)
        return jnp.sum(outputs.astype(jnp.float32) ** 2) + jnp.sum(final_state**2)

    return jax.value_and_grad(loss)(arrays)


def poison():
    """Fills memory that later results will lie in with NaN, and frees it."""
    jax.block_until_ready(jnp.full(2**28, jnp.nan))


def assert_repeatable(inputs):
    *arrays, segment_ids = inputs
    first = jax.tree.map(np.asarray, gradients(arrays, segment_ids))
    poison()
    second = gradients(arrays, segment_ids)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("regime", REGIMES)
def test_results_are_bitwise_the_same_again_whatever_memory_held(regime):
    assert_repeatable(
        operator_inputs(
            2, 300, 2, 128, regime=regime, dtype="bfloat16", seed=9, segments=5, value_heads=4
        )
    )


def test_results_of_a_full_gpu_are_bitwise_the_same_again():
    assert_repeatable(operator_inputs(4, 2048, 16, 128, dtype="bfloat16"))


def test_kernels_work_under_vmap_and_remat():
    *arrays, state, _ = operator_inputs(2, 128, 2, 128, dtype="bfloat16")
    run = jax.checkpoint(lambda *x: kernels(*x[:6], initial_state=x[6])[0])
    together = jax.jit(run)(*arrays, state)
    one_by_one = jax.jit(jax.vmap(lambda *x: run(*(y[None] for y in x))[0]))(*arrays, state)
    np.testing.assert_array_equal(together, one_by_one)
