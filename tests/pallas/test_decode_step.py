"""The decode kernel on a CPU: in GPU interpret mode, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.pallas.decode_step import Tuning, decode_step
from gdn2_jax.pallas.mosaic import interpret_mode
from gdn2_jax.testing import assert_matches_recurrence, operator_inputs

step = functools.partial(gated_delta_rule_2_step, implementation="pallas")


def stepped(*arrays, initial_state, segment_ids=None, step=step):
    """The whole operator, by steps."""
    assert segment_ids is None
    outputs, state = [], initial_state
    for t in range(arrays[0].shape[1]):
        state, output = step(state, *(x[:, t] for x in arrays))
        outputs.append(output)
    return jnp.stack(outputs, axis=1), state


def one_token(batch=1, heads=1, key_dim=64, value_dim=64, **options):
    inputs = operator_inputs(
        batch, 1, heads, key_dim, value_dim, **{"dtype": "bfloat16", **options}
    )
    return inputs.initial_state, *(x[:, 0] for x in inputs[:6])


@pytest.mark.parametrize(
    "key_dim, value_dim, options",
    [
        (128, 128, {"regime": "resets", "value_heads": 4}),
        (64, 128, {"regime": "extremes", "dtype": "float16"}),
        (128, 64, {"regime": "repeated_keys"}),
        (64, 64, {"regime": "positive_keys", "value_heads": 6}),
    ],
)
def test_steps_match_the_recurrence_with_all_gradients(key_dim, value_dim, options):
    options = {"dtype": "bfloat16", **options}
    inputs = operator_inputs(2, 2, 2, key_dim, value_dim, **options)
    with interpret_mode():
        assert_matches_recurrence(stepped, inputs)


@pytest.mark.parametrize("columns", [16, 32, 64])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_tuning_computes_the_same_without_races(dim, columns, races_found):
    arrays = one_token(2, 1, dim, dim, value_heads=2)
    with interpret_mode(detect_races=True):
        results = decode_step(*arrays, 0.3, Tuning(columns=columns))
    assert not races_found()
    expected = gated_delta_rule_2_step(*arrays, scale=0.3, implementation="xla")
    np.testing.assert_allclose(results[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(*(x[1].astype(jnp.float32) for x in (results, expected)), rtol=1e-2)


@pytest.mark.parametrize("seeds", [None, jnp.arange(4).reshape(2, 2)], ids=["nearest", "random"])
def test_a_bfloat16_state_is_rounded_as_by_xla(seeds, races_found):
    state, *arrays = one_token(2, 1, 64, 128, value_heads=2)
    state = state.astype(jnp.bfloat16)
    with interpret_mode(detect_races=True):
        found, output = step(state, *arrays, rounding_seeds=seeds)
    assert not races_found()
    expected, expected_output = gated_delta_rule_2_step(
        state, *arrays, rounding_seeds=seeds, implementation="xla"
    )
    np.testing.assert_array_equal(output, expected_output)
    # Sums in another order may move a value over the border between its neighbours.
    assert found.dtype == jnp.bfloat16 and np.mean(found != expected) < 1e-3
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, expected)), rtol=1e-2)


def test_a_mapped_axis_of_bfloat16_states_and_seeds_joins_the_batch():
    state, *arrays = (x[None] for x in one_token(2, value_heads=2))
    state, seeds = state.astype(jnp.bfloat16), jnp.arange(4).reshape(1, 2, 2)

    def rounded(state, seeds, *arrays):
        return step(state, *arrays, rounding_seeds=seeds)

    with interpret_mode():
        found = jax.vmap(rounded)(state, seeds, *arrays)
        expected = rounded(state[0], seeds[0], *(x[0] for x in arrays))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x[0], y)


@pytest.mark.parametrize("regime, factor", [("g=0", 1.0), ("g=-1000", 0.0)])
def test_decay_is_exact_at_its_ends(regime, factor):
    state, q, k, v, g, b, w = one_token(regime=regime)
    with interpret_mode():
        new_state, _ = step(state, q, k, v, g, b, 0 * w)
        undisturbed, _ = step(state, q, k, v, g, 0 * b, 0 * w)
    np.testing.assert_array_equal(undisturbed, factor * state)
    assert np.isfinite(new_state).all()


def test_prefill_by_xla_and_steps_equal_one_run():
    *six, state, _ = operator_inputs(1, 70, 1, 64, value_heads=2, dtype="bfloat16")
    xla = functools.partial(gated_delta_rule_2, implementation="xla")
    expected, expected_state = xla(*six, initial_state=state)
    _, state = xla(*(x[:, :68] for x in six), initial_state=state)
    with interpret_mode():
        outputs, state = stepped(*(x[:, 68:] for x in six), initial_state=state)
    for x, y in ((outputs, expected[:, 68:]), (state, expected_state)):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.linalg.norm(x - y) < 1e-2 * np.linalg.norm(y)


def test_a_mapped_axis_joins_the_batch():
    arrays = one_token(6, 1, value_heads=2)
    state, query, *rest = arrays
    split = [x.reshape(3, 2, *x.shape[1:]) for x in (state, *rest)]
    mapped = jax.vmap(step, in_axes=(0, None, 0, 0, 0, 0, 0))
    with interpret_mode():
        results = mapped(split[0], query[:2], *split[1:])
        expected = step(state, jnp.tile(query[:2], (3, 1, 1)), *rest)
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_array_equal(x.reshape(y.shape), y)


def test_a_mapped_step_lowers_to_one_kernel():
    arrays = [x[:, None] for x in one_token(5)]
    lowered = jax.jit(jax.vmap(step)).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_the_step_lowers_for_cuda_with_the_state_aliased(dims, dtype):
    arrays = one_token(2, 2, *dims, value_heads=4, dtype=dtype)
    donating = jax.jit(step, donate_argnums=0)
    text = donating.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == 1
    assert text.count("tf.aliasing_output = 0") == 1


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_the_step_of_a_bfloat16_state_lowers_for_cuda_with_its_gradients(dims):
    state, *arrays = one_token(2, 2, *dims, value_heads=4)
    state, seeds = state.astype(jnp.bfloat16), jnp.ones((2, 4), jnp.uint32)
    donating = jax.jit(
        lambda state, seeds, *arrays: step(state, *arrays, rounding_seeds=seeds), donate_argnums=0
    )
    for given in (None, seeds):
        lowered = donating.trace(state, given, *arrays).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("output_operand_alias<") == 1
        assert lowered.as_text().count("tf.aliasing_output = 0") == 1

    def both(state, *arrays):
        fn = functools.partial(step, rounding_seeds=seeds)
        results, pullback = jax.vjp(fn, state, *arrays)
        return results, pullback(results)

    text = jax.jit(both).trace(state, *arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize("x64", [False, True])
def test_a_step_with_its_gradients_lowers_for_cuda(x64):
    arrays = one_token(2)

    def both(*arrays):
        results, pullback = jax.vjp(step, *arrays)
        return results, pullback(results)

    with jax.enable_x64(x64):
        text = jax.jit(both).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


def test_a_step_under_shard_map_lowers_to_a_kernel_of_each_shard():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=P("data", "tensor"), out_specs=P("data", "tensor")
    )
    text = jax.jit(sharded).trace(*one_token(2, 2)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    "options, why",
    [
        ({"dtype": "float32"}, "takes q in bfloat16 or float16, got float32"),
        ({"key_dim": 32}, r"\(64, 128\) channels in q, got 32"),
        ({"value_dim": 256}, r"\(64, 128\) channels in v, got 256"),
    ],
)
def test_a_step_the_kernel_cannot_serve_is_refused_with_the_reason(options, why):
    arrays = one_token(**options)
    with pytest.raises(NotImplementedError, match=f'implementation="pallas": .*{why}; use "xla"'):
        step(*arrays)
    gated_delta_rule_2_step(*arrays)


def test_a_step_with_gates_in_float64_is_refused():
    with jax.enable_x64(True):
        state, q, k, v, g, b, w = one_token()
        with pytest.raises(NotImplementedError, match="g in float32, got float64"):
            step(state.astype("float64"), q, k, v, g.astype("float64"), b, w)


def test_a_tuning_without_a_layout_is_an_error():
    with pytest.raises(ValueError, match="columns: expected 16, 32 or 64, got 48"):
        Tuning(columns=48)
