"""Names of axes become places on a mesh, or nothing without one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gdn2_jax.parallel import MeshConfig, make_mesh, param_shardings, partitioned
from gdn2_jax.parallel.logical import ambient_mesh, axis_size, constrain, partition_spec, per_device

ROWS = ("batch", "sequence", "heads")


def init():
    """A table whose vocabulary "tensor" does not divide, and a kernel."""
    ones = nn.initializers.ones
    table = partitioned(ones, "vocab", "embed")(jax.random.key(0), (9, 8))
    return {"table": table, "kernel": partitioned(ones, "embed", "heads")(None, (8, 4))}


def test_names_are_split_over_the_axes_of_the_rules():
    assert partition_spec(ROWS) == P(("data", "fsdp"), "sequence", "tensor")
    assert partition_spec(("layers", "embed", None)) == P(None, "fsdp", None)


def test_an_axis_that_its_mesh_axis_does_not_divide_stays_whole():
    shardings = param_shardings(init, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    assert {name: x.spec for name, x in shardings.items()} == {
        "table": P(None, "fsdp"),
        "kernel": P("fsdp", "tensor"),
    }
    with pytest.raises(ValueError, match="^init: expected a function"):
        param_shardings(lambda: jnp.ones(3), make_mesh())


def test_without_a_mesh_nothing_is_named_or_split():
    x = jnp.ones((8, 4, 2))
    assert ambient_mesh() is None and axis_size("tensor") == 1
    assert constrain(x, *ROWS) is x
    assert all(isinstance(leaf, jax.Array) for leaf in init().values())
    assert per_device(lambda x: x.shape, (ROWS,), ROWS)(x) == x.shape


def test_on_a_mesh_a_function_sees_the_part_of_its_device():
    mesh, seen = make_mesh(MeshConfig(sequence=2, tensor=2)), []

    def function(x):
        seen.append(x.shape)
        return 2 * x

    with jax.set_mesh(mesh):
        run = jax.jit(lambda x: per_device(function, (ROWS,), ROWS)(constrain(x, *ROWS)))
        y = run(np.ones((8, 4, 2), np.float32))
    assert seen[0] == (4, 2, 1)
    assert y.sharding.shard_shape(y.shape) == (4, 2, 1) and (y == 2).all()
