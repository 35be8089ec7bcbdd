"""jit, vmap, scan, remat and nested differentiation of the chunkwise form."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.testing import check_gradients, operator_inputs

xla = functools.partial(gated_delta_rule_2, implementation="xla")


def draw(**options):
    return operator_inputs(2, 12, 1, 8, 6, value_heads=2, dtype="float64", **options)


def loss(op, *arrays):
    *six, initial_state = arrays
    outputs, state = op(*six, initial_state=initial_state)
    return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.cos(state))


def gradients(op, inputs):
    return _gradients(op, inputs[:7])


@functools.partial(jax.jit, static_argnums=0)
def _gradients(op, arrays):
    return jax.grad(functools.partial(loss, op), argnums=range(7))(*arrays)


def assert_trees_close(one, other, **tolerance):
    tolerance = {"rtol": 1e-11, "atol": 1e-12} | tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, other)


@pytest.fixture(scope="module")
def expected():
    inputs = draw()
    with jax.enable_x64(True):
        return jax.jit(xla)(*inputs[:6], initial_state=inputs[6]), gradients(xla, inputs)


def test_numerical_derivatives_agree_with_the_hand_derived_backward():
    inputs = operator_inputs(1, 15, 1, 5, 4, value_heads=2, dtype="float64", segments=3)

    def fn(q, k, v, g, b, w, initial_state, segment_ids):
        return xla(q, k, v, g, b, w, initial_state=initial_state, segment_ids=segment_ids)

    check_gradients(fn, inputs)


def test_without_jit_the_results_are_the_same(expected):
    inputs = draw()
    with jax.enable_x64(True):
        results = xla(*inputs[:6], initial_state=inputs[6])
    assert_trees_close(results, expected[0])


def test_remat_changes_no_gradient(expected):
    with jax.enable_x64(True):
        assert_trees_close(gradients(jax.checkpoint(xla), draw()), expected[1])


def test_vmap_equals_a_loop_also_where_an_input_is_not_mapped():
    first, second = draw(), draw(seed=1)
    with jax.enable_x64(True):
        mapped = [jnp.stack(pair) for pair in zip(first[:7], second[:7])]
        mapped[2], mapped[3] = first.v, first.g
        axes = [0, 0, None, None, 0, 0, 0]
        gradient = jax.grad(functools.partial(loss, xla), argnums=range(7))
        results = jax.jit(jax.vmap(gradient, in_axes=axes))(*mapped)
        for i, inputs in enumerate((first, second)):
            alone = gradients(xla, inputs._replace(v=first.v, g=first.g))
            assert_trees_close([x[i] for x in results], list(alone))


def test_scan_over_layers_equals_a_loop():
    inputs = draw(initial_state=False)

    def layer(v, w):
        return xla(*inputs[:2], v, *inputs[3:5], w)[0], None

    def scanned(v, gates):
        return jnp.sum(jax.lax.scan(layer, v, gates)[0] ** 2)

    def looped(v, gates):
        for w in gates:
            v, _ = layer(v, w)
        return jnp.sum(v**2)

    with jax.enable_x64(True):
        gates = jnp.stack([inputs.w, 1 - inputs.w])
        one, other = (
            jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(inputs.v, gates)
            for fn in (scanned, looped)
        )
        assert_trees_close(one, other)


def test_vmapped_segment_ids_reset_each_sequence_at_its_own_borders():
    inputs = operator_inputs(2, 12, 1, 8, 6, dtype="float64", segments=4)
    *six, initial_state, segment_ids = inputs

    def one_sequence(arrays, initial_state, segment_ids):
        batched = (x[None] for x in arrays)
        return xla(*batched, initial_state=initial_state[None], segment_ids=segment_ids[None])[0]

    with jax.enable_x64(True):
        together = jax.jit(xla)(*six, initial_state=initial_state, segment_ids=segment_ids)[0]
        alone = jax.jit(jax.vmap(one_sequence))(six, initial_state, segment_ids)[:, 0]
    np.testing.assert_allclose(alone, together, atol=1e-13)


def test_a_chunkwise_pass_continued_from_its_state_equals_one_pass(expected):
    inputs = draw()

    def in_two(*arrays, initial_state):
        outputs, state = xla(*(x[:, :7] for x in arrays), initial_state=initial_state)
        rest, state = xla(*(x[:, 7:] for x in arrays), initial_state=state)
        return jnp.concatenate([outputs, rest], axis=1), state

    with jax.enable_x64(True):
        assert_trees_close(gradients(in_two, inputs), expected[1])


def test_forward_mode_through_the_chunkwise_form_is_an_error_that_says_so():
    inputs = draw()[:7]
    with jax.enable_x64(True), pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(loss, xla), inputs, inputs)


def test_forward_over_reverse_is_right():
    """Not promised (a clear error would do), but a wrong curvature would be worse than none."""
    inputs, tangents = draw()[:7], draw(seed=1)[:7]

    def curvature(op):
        gradient = jax.grad(functools.partial(loss, op), argnums=range(7))
        return jax.jit(lambda x, y: jax.jvp(gradient, x, y)[1])(inputs, tangents)

    recurrent = functools.partial(gated_delta_rule_2, implementation="recurrent")
    with jax.enable_x64(True):
        expected = curvature(recurrent)
        try:
            result = curvature(xla)
        except (TypeError, NotImplementedError) as error:
            assert "forward-mode" in str(error)
        else:
            assert_trees_close(result, expected, atol=1e-10)


def test_numerical_checks_of_other_libraries_work_in_reverse_mode():
    inputs = operator_inputs(1, 3, 1, 2, dtype="float64")
    fn = jax.jit(xla)
    with jax.enable_x64(True):
        check_grads(fn, inputs[:6], order=1, modes=("rev",))
        chex.assert_numerical_grads(fn, inputs[:6], order=1, modes=("rev",))
        with pytest.raises(TypeError, match="forward-mode"):
            check_grads(fn, inputs[:6], order=1)
