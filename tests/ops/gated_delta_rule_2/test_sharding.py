"""The operator under shard_map with its default check of varying axes, on eight CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.testing import OperatorInputs, operator_inputs

DATA, TENSOR = 4, 2
NAMES = OperatorInputs._fields[:7]


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices("cpu")[: DATA * TENSOR]
    return jax.make_mesh(
        (DATA, TENSOR), ("data", "tensor"), devices=devices, axis_types=(AxisType.Auto,) * 2
    )


def specs(name):
    """Batch over "data", heads over "tensor"."""
    return P("data", "tensor") if name == "initial_state" else P("data", None, "tensor")


def local_part(name, x):
    """What one device holds, as the value of an input that is replicated over the mesh."""
    heads = 1 if name == "initial_state" else 2
    return jax.lax.slice_in_dim(x[: x.shape[0] // DATA], 0, x.shape[heads] // TENSOR, axis=heads)


def spread(name, x):
    """The inverse: the whole array of a single-device run."""
    heads = 1 if name == "initial_state" else 2
    return jnp.tile(x, [{0: DATA, heads: TENSOR}.get(axis, 1) for axis in range(x.ndim)])


def loss(arrays, segment_ids, weights, implementation):
    *six, initial_state = arrays
    outputs, state = gated_delta_rule_2(
        *six, initial_state=initial_state, segment_ids=segment_ids, implementation=implementation
    )
    return jnp.vdot(outputs, weights[0]) + jnp.vdot(state, weights[1])


@pytest.mark.parametrize(
    "implementation, taken, replicated",
    [
        ("xla", "outside", ("w", "initial_state")),
        ("xla", "outside", ("q", "k", "v", "g", "b", "w")),
        ("xla", "inside", ("q", "v", "b")),
        ("recurrent", "inside", ("q", "initial_state")),
    ],
    ids=str,
)
def test_gradients_under_shard_map_equal_those_of_one_device(
    mesh, implementation, taken, replicated
):
    """Gradients taken outside shard_map or inside its body, some inputs replicated."""
    *arrays, segment_ids = operator_inputs(
        DATA, 12, TENSOR, 4, 3, value_heads=2 * TENSOR, dtype="float64", segments=3
    )
    others = operator_inputs(
        DATA, 12, TENSOR, 4, 3, value_heads=2 * TENSOR, dtype="float64", seed=1
    )
    weights = (others.v, others.initial_state)
    with jax.enable_x64(True):
        arrays = [local_part(n, x) if n in replicated else x for n, x in zip(NAMES, arrays)]
        in_specs = [P() if n in replicated else specs(n) for n in NAMES]

        def one_device(arrays):
            whole = [spread(n, x) if n in replicated else x for n, x in zip(NAMES, arrays)]
            return loss(whole, segment_ids, weights, "recurrent")

        shard_map = functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(in_specs, P("data"), (specs("v"), specs("initial_state"))),
        )
        if taken == "inside":
            body = functools.partial(jax.grad(loss), implementation=implementation)
            gradient = shard_map(body, out_specs=in_specs)
        else:

            def summed(*args):
                return jax.lax.psum(loss(*args, implementation), ("data", "tensor"))

            gradient = jax.grad(shard_map(summed, out_specs=P()))
        result = jax.jit(gradient)(arrays, segment_ids, weights)
        expected = jax.jit(jax.grad(one_device))(arrays)
    for name, x, y in zip(NAMES, result, expected):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12, err_msg=f"d{name}")


def test_segment_ids_alone_may_vary(mesh):
    *arrays, segment_ids = operator_inputs(1, 12, 1, 4, 3, segments=3, initial_state=False)
    segment_ids = jnp.concatenate([segment_ids] * 3 + [0 * segment_ids])

    def run(segment_ids, implementation):
        six = arrays[:6]
        if segment_ids.shape[0] > 1:
            six = [jnp.tile(x, (segment_ids.shape[0], 1, 1, 1)) for x in six]
        return gated_delta_rule_2(*six, segment_ids=segment_ids, implementation=implementation)[0]

    body = functools.partial(run, implementation="xla")
    sharded = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    expected = jax.jit(functools.partial(run, implementation="recurrent"))(segment_ids)
    np.testing.assert_allclose(jax.jit(sharded)(segment_ids), expected, atol=1e-6)


def test_a_step_under_shard_map_equals_that_of_one_device(mesh):
    inputs = operator_inputs(DATA, 1, TENSOR, 4, 3, value_heads=2 * TENSOR)
    arrays = (inputs.initial_state, *(x[:, 0] for x in inputs[:6]))
    spec = P("data", "tensor")
    step = jax.shard_map(gated_delta_rule_2_step, mesh=mesh, in_specs=spec, out_specs=spec)
    for x, y in zip(jax.jit(step)(*arrays), gated_delta_rule_2_step(*arrays)):
        np.testing.assert_allclose(x, y, atol=1e-6)
