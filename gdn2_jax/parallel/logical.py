"""Names of array axes, and the mesh axes that they are split over."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gdn2_jax.parallel.mesh import AXES, BATCH_AXES

RULES = (
    ("batch", BATCH_AXES),
    ("sequence", "sequence"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("layers", None),
)
"""Logical axis rules for flax.linen. "embed" is the model's width in parameters; in activations,
whose rows are split over "fsdp", that axis has no name."""

Names = tuple[str | None, ...]


def ambient_mesh() -> AbstractMesh | None:
    """The mesh that layers run on: of several devices, with the axes `AXES`, all Auto; or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2 or not set(AXES) <= set(mesh.axis_names):
        return None
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def axis_size(axis: str) -> int:
    """Number of devices along an axis of the ambient mesh, 1 without one."""
    mesh = ambient_mesh()
    return 1 if mesh is None else mesh.shape[axis]


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Within a function that jit traces: lets its layers run on `mesh`."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def partitioned(init: Initializer, *names: str | None) -> Callable:
    """Names the axes of a parameter, as flax's metadata.

    Without logical axis rules in force the parameter is a plain array, so that a layer in someone's
    model needs no unboxing.
    """

    def initialize(*args, **kwargs):
        value = init(*args, **kwargs)
        return nn.LogicallyPartitioned(value, names) if nn.get_logical_axis_rules() else value

    return initialize


def partition_spec(names: Names) -> PartitionSpec:
    """Translates names of axes to mesh axes."""
    return nn.logical_to_mesh_axes(names, RULES)


def constrain(x: Array, *names: str | None) -> Array:
    """Tells the compiler how `x` lies on the ambient mesh; `x` itself without one."""
    if ambient_mesh() is None:
        return x
    return nn.with_logical_constraint(x, names, rules=RULES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: Array, names: Names, whole: Names) -> Array:
    """A parameter whose axes have `names`, laid out as `whole` on the ambient mesh for use.

    The transpose of `constrain` would sum the gradient whole on every device; here a device gets the
    part alone that it keeps of the parameter.
    """
    return constrain(x, *whole)


def _gathered_forward(x, names, whole):
    return constrain(x, *whole), None


def _gathered_backward(names, whole, _, gradient):
    return (constrain(gradient, *names),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def param_shardings(init: Callable[[], Any], mesh: Mesh) -> Any:
    """Shardings of the parameters that `init` returns, from the names their modules gave them.

    An axis that its mesh axis does not divide, such as a vocabulary of 257, stays whole.

    Raises:
      ValueError: no parameter has names, as where `init` is jitted and was called before.
    """
    with nn.logical_axis_rules(RULES):
        boxed = jax.eval_shape(lambda: init())
    if not any(map(_is_box, jax.tree.leaves(boxed, is_leaf=_is_box))):
        raise ValueError("init: expected a function, not jitted, of modules that name axes")
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)

    def sharding(x, spec):
        axes = [
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for size, axis in zip(x.shape, spec)
        ]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, nn.unbox(boxed), specs)


def per_device(function: Callable, inputs: tuple[Names, ...], outputs: Any) -> Callable:
    """Runs `function` on every device's parts of its arguments; plainly without an ambient mesh.

    Args:
      function: of positional arrays or None; communicates only along axes it names itself.
      inputs: names of the axes of each argument, or of all leaves of it.
      outputs: the same of its results.
    """
    if ambient_mesh() is None:
        return function

    def specs(tree):
        return jax.tree.map(partition_spec, tree, is_leaf=_is_names)

    return jax.shard_map(function, in_specs=specs(inputs), out_specs=specs(outputs))


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _is_names(x: Any) -> bool:
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)
