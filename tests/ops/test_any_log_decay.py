"""Every log-decay <= 0 is served, however large, and -inf, which resets the state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops.precision import finite_log_decay

LENGTH = 20
SEGMENT_IDS = np.asarray([[0] * 7 + [1] * 13])
LOWEST = float(jnp.finfo(jnp.float32).min)


@functools.partial(jax.jit, static_argnames=("run", "implementation"))
def outputs_and_gradients(run, tokens, state, implementation):
    results, pullback = jax.vjp(lambda *x: run(*x, SEGMENT_IDS, implementation), tokens, state)
    return results, pullback(jax.tree.map(jnp.ones_like, results))


def assert_close(results, expected, tolerance):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(results), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(y).max()
        np.testing.assert_allclose(x, y, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
def test_any_log_decay_down_to_minus_infinity_is_one_that_forgets(operator, implementation):
    run, _, tokens, state = operator(1, LENGTH)
    levels = jnp.asarray([-0.1, -1000.0, LOWEST / 2, LOWEST, -jnp.inf])
    shape = tokens["g"].shape
    choice = np.random.default_rng(1).choice(len(levels), shape, p=[0.6, 0.1, 0.1, 0.1, 0.1])
    # Whole blocks of rows too, whose sums overflow.
    choice[:, 8:16] = 3
    g = levels[choice]
    extreme = outputs_and_gradients(run, tokens | {"g": g}, state, implementation)
    moderate = jnp.maximum(g, -1000)
    expected = outputs_and_gradients(run, tokens | {"g": moderate}, state, "recurrent")
    assert_close(extreme, expected, 1e-5)
    d_g = extreme[1][0]["g"]
    assert not np.any(np.asarray(d_g)[choice > 0])


def test_the_step_forgets_at_minus_infinity(operator):
    _, step, tokens, state = operator(2, 1)
    token = {name: x[:, 0] for name, x in tokens.items()}

    def gradients(g):
        results, pullback = jax.vjp(step, state, token | {"g": g})
        return results, pullback(jax.tree.map(jnp.ones_like, results))

    extreme, moderate = (
        jax.jit(gradients)(jnp.full_like(token["g"], g)) for g in (-jnp.inf, -1000)
    )
    jax.tree.map(np.testing.assert_array_equal, extreme, moderate)


def test_two_tokens_at_the_lowest_float_read_themselves():
    ones = jnp.ones((1, 2, 1, 1))
    g = jnp.full_like(ones, LOWEST)
    outputs, _ = jax.jit(gated_delta_rule_2)(ones, ones, ones, g, ones, ones)
    np.testing.assert_array_equal(outputs, ones)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_only_log_decays_whose_exponential_is_zero_are_changed(dtype):
    with jax.enable_x64(True):
        smallest = np.log(np.finfo(dtype).smallest_subnormal)
        g = jnp.asarray([0, -1, smallest, np.finfo(dtype).min, -np.inf], dtype)
        finite = finite_log_decay(g)
        np.testing.assert_array_equal(finite[:3], g[:3])
        assert finite.dtype == g.dtype and np.isfinite(1e6 * finite).all()
        assert not np.exp(np.asarray(finite[3:])).any()
