"""The operator on meshes of eight simulated devices, judged by the recurrence on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops import gated_delta_rule_2_on_mesh
from gdn2_jax.parallel import MeshConfig, make_mesh
from gdn2_jax.testing import OperatorInputs, operator_inputs

NAMES = OperatorInputs._fields[:7]


def results(operator, arrays, segment_ids, weights, **options):
    """Outputs, final state and all seven gradients of a function of both."""

    def loss(arrays):
        *six, initial_state = arrays
        outputs, state = operator(
            *six, initial_state=initial_state, segment_ids=segment_ids, **options
        )
        value = jnp.vdot(outputs.astype(state.dtype), weights[0]) + jnp.vdot(state, weights[1])
        return value, (outputs, state)

    gradients, values = jax.grad(loss, has_aux=True)(arrays)
    return (*values, *gradients)


@functools.partial(jax.jit, static_argnames="implementation")
def on_mesh(*args, **options):
    return results(gated_delta_rule_2_on_mesh, *args, **options)


def on_devices(mesh, *args, **options):
    with jax.set_mesh(mesh):
        return on_mesh(*args, **options)


@jax.jit
def on_one_device(*args):
    return results(gated_delta_rule_2, *args, implementation="recurrent")


def relative_errors(actual, expected):
    return {
        name: np.linalg.norm(np.asarray(x, np.float64) - y) / (np.linalg.norm(y) or 1)
        for name, x, y in zip(("o", "state", *NAMES), actual, map(np.asarray, expected))
    }


MESHES = {
    "sequence 8": MeshConfig(sequence=8),
    "sequence 4, tensor 2": MeshConfig(sequence=4, tensor=2),
    "data 2, fsdp 2, tensor 2": MeshConfig(fsdp=2, tensor=2),
}


@pytest.mark.parametrize(
    ("mesh", "length", "segments", "regime", "value_heads", "one_channel"),
    [
        ("sequence 8", 37, None, "gentle", 4, ""),
        ("sequence 8", 40, 7, "g=-1e-4", 2, "gbw"),
        ("sequence 4, tensor 2", 40, 7, "g=-1e-4", 4, "w"),
        ("data 2, fsdp 2, tensor 2", 37, None, "gentle", 4, "b"),
    ],
    ids=str,
)
def test_outputs_states_and_gradients_are_exact(
    mesh, length, segments, regime, value_heads, one_channel
):
    """T = 37 does not divide; segments cross the borders of spans, and 40 / 8 = 5 tokens."""
    with jax.enable_x64(True):
        sizes = {"value_heads": value_heads, "dtype": "float64"}
        inputs = operator_inputs(4, length, 2, 4, 3, regime=regime, segments=segments, **sizes)
        *arrays, ids = inputs._replace(**{n: getattr(inputs, n)[..., :1] for n in one_channel})
        other = operator_inputs(4, length, 2, 4, 3, seed=1, **sizes)
        weights = (other.v, other.initial_state)
        expected = on_one_device(arrays, ids, weights)
        actual = on_devices(make_mesh(MESHES[mesh]), arrays, ids, weights, implementation="xla")
    errors = relative_errors(actual, expected)
    assert max(errors.values()) < 1e-10, errors


def test_a_document_that_starts_with_a_span_sees_nothing_before_it():
    ids = jnp.repeat(jnp.array([[3, 3, 5, 5, 5, 9, 9, 9]]), 4, axis=1)
    with jax.enable_x64(True):
        *arrays, _ = operator_inputs(1, 32, 1, 4, dtype="float64", regime="g=0")
        other = operator_inputs(1, 32, 1, 4, dtype="float64", seed=1)
        weights = (other.v, other.initial_state)
        expected = on_one_device(arrays, ids, weights)
        mesh = make_mesh(MeshConfig(sequence=8))
        actual = on_devices(mesh, arrays, ids, weights, implementation="recurrent")
    errors = relative_errors(actual, expected)
    assert max(errors.values()) < 1e-10, errors


def test_a_nan_stays_in_its_document_on_every_device():
    ids = jnp.repeat(jnp.array([[0, 3, 3, 3, 3, 5, 9, 9]]), 2, axis=1)[:, 1:]
    *arrays, _ = operator_inputs(1, 15, 1, 4)
    weights = (arrays[2], arrays[-1])
    mesh = make_mesh(MeshConfig(sequence=8))
    expected = on_devices(mesh, arrays, ids, weights, implementation="recurrent")
    for place in (1, 8, 9):
        poisoned = [*arrays[:2], arrays[2].at[0, place].set(jnp.nan), *arrays[3:]]
        actual = on_devices(mesh, poisoned, ids, weights, implementation="recurrent")
        others = np.asarray(ids[0] != ids[0, place])
        for i, (x, y) in enumerate(zip(actual, expected)):
            if i in (1, 8):  # the final state, of document 9, and the initial one's gradient, of 0
                np.testing.assert_array_equal(x, y)
            else:
                np.testing.assert_array_equal(x[:, others], y[:, others])


@pytest.mark.parametrize("regime", ["gentle", "repeated_keys", "mixture"])
def test_sixteen_bit_inputs_keep_the_precision_contract(regime):
    shape = (1, 256, 2, 16)
    *arrays, ids = operator_inputs(*shape, regime=regime, dtype="bfloat16", segments=3)
    with jax.enable_x64(True):
        other = operator_inputs(*shape, seed=1, dtype="float64")
        weights = (other.v, other.initial_state)
        wide = [x.astype(jnp.float64) for x in arrays]
        expected = on_one_device(wide, ids, weights)
    weights = [x.astype(jnp.float32) for x in weights]
    actual = on_devices(make_mesh(MeshConfig(sequence=8)), arrays, ids, weights)
    errors = relative_errors(actual, expected)
    for name in "bg":
        least = 1e-2 * np.linalg.norm(expected[2])
        errors[name] *= np.linalg.norm(expected[2 + NAMES.index(name)])
        errors[name] /= max(np.linalg.norm(expected[2 + NAMES.index(name)]), least) or 1
    assert max(errors.values()) < (3e-2 if regime == "repeated_keys" else 1e-2), errors


@pytest.mark.slow
def test_spans_with_their_gradients_run_on_the_kernels_of_a_hopper_gpu():
    """Two kernels forward and two backward; other products join the spans or are the loss'."""
    *arrays, ids = operator_inputs(1, 40, 2, 64, dtype="bfloat16", segments=3)
    run = functools.partial(results, gated_delta_rule_2_on_mesh, implementation="pallas")
    with jax.set_mesh(make_mesh(MeshConfig(sequence=4, tensor=2))):
        text = str(jax.make_jaxpr(run)(arrays, ids, (arrays[2], arrays[-1])))
    assert text.count("kernel_name") == 4
    assert text.count(" = dot_general[") <= 10
    assert text.count(" = all_gather[") == text.count(" = reduce_scatter[") == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(tensor=2, sequence=4), "Hk to be a multiple of the mesh's 2, got 3"),
        (MeshConfig(fsdp=4, sequence=2), "B to be a multiple of the mesh's 4, got 2"),
    ],
)
def test_heads_and_rows_that_the_mesh_does_not_divide_are_refused(config, message):
    *arrays, _ = operator_inputs(2, 16, 3, 4)
    with pytest.raises(ValueError, match=message):
        on_devices(make_mesh(config), arrays, None, (arrays[2], arrays[-1]))
