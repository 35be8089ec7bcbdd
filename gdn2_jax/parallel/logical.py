"""Names of array axes, and the mesh axes that they are split over."""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
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
"""Logical axis rules for flax.linen. "embed" names the model's width in parameters only.
Activations do not name it, because "fsdp" already splits their rows."""

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
    """Lets the layers of a function that jit traces run on `mesh`."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def partitioned(init: Callable, *names: str | None, like: Callable | None = None) -> Callable:
    """Names the axes of a parameter, as flax's metadata.

    Without logical axis rules in force the parameter is a plain array, so that a layer in someone's
    model needs no unboxing; unless `like`, or else `init`, is of nn.with_logical_partitioning or
    nn.with_partitioning: then the parameter is such a box, with the names given there.

    Args:
      init: initialiser of the parameter.
      names: our names of its axes.
      like: initialiser of matrices [width, channels] whose two names stand for our "embed" and for
        our other names.
    """

    def initialize(*args, **kwargs):
        value = init(*args, **kwargs)
        named = None if like is None else _box_of(like)
        if named is not None:
            theirs = (name and named.names[name != "embed"] for name in names)
            return named.replace(value=nn.unbox(value), names=tuple(theirs))
        if _is_box(value):
            return value
        if not (rules := nn.get_logical_axis_rules()):
            return value
        if not {"embed", "heads", "mlp"} & {rule[0] for rule in rules}:
            warnings.warn(
                "the logical axis rules in force have none of embed, heads, mlp: all parameters will "
                "be replicated; give kernel_init names that they have: "
                "nn.with_logical_partitioning(init, (NAME_OF_WIDTH, NAME_OF_CHANNELS))",
                stacklevel=2,
            )
        return nn.LogicallyPartitioned(value, names)

    return initialize


def partition_spec(names: Names) -> PartitionSpec | None:
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


def per_device(
    function: Callable,
    inputs: tuple[Any, ...],
    outputs: Any,
    *,
    heads: int | None = None,
    check_vma: bool = True,
) -> Callable:
    """Runs `function` on every device's parts of its arguments; plainly without a mesh.

    On the ambient mesh the names tell the parts, on a mesh of Explicit axes the types do: see
    `as_typed`.

    Args:
      function: of positional arrays or None; communicates only along axes it names itself.
      inputs: for each argument, the names of its axes. One tuple may serve all its leaves.
      outputs: such names for each result.
      heads: as in `as_typed`.
      check_vma: as in jax.shard_map, on the ambient mesh.
    """
    if ambient_mesh() is None:
        return as_typed(function, inputs, outputs, heads)
    in_specs, out_specs = (_map_names(partition_spec, names) for names in (inputs, outputs))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def as_typed(
    function: Callable, inputs: tuple[Any, ...], outputs: Any, heads: int | None = None
) -> Callable:
    """Runs `function` on each device's part of arguments on Explicit axes; on others as usual.

    Rows stay split as the arguments' are, and heads where each device gets whole ones of all. The
    first three arguments are those of `per_device`. `heads` is their number, where axes of that name
    hold several channels of each.
    """

    def run(*arrays):
        sharding = explicit_sharding(arrays)
        if sharding is None:
            return function(*arrays)
        places = _places(inputs, arrays, heads)

        def spec(names):
            return PartitionSpec(*(places.get(name) for name in names))

        def lay_out(names, tree):
            target = NamedSharding(sharding.mesh, spec(names))
            return jax.tree.map(lambda x: jax.sharding.reshard(x, target), tree)

        mapped = jax.shard_map(
            function,
            mesh=None if jax.sharding.get_abstract_mesh().axis_names else sharding.mesh,
            in_specs=_map_names(spec, inputs),
            out_specs=_map_names(spec, outputs),
            axis_names=_explicit_axes(sharding.mesh),
        )
        return mapped(*_map_names(lay_out, inputs, arrays))

    return run


def explicit_sharding(arrays: Any) -> NamedSharding | None:
    """Sharding of the first array on a mesh of Explicit axes; None if there is no such array."""
    for x in jax.tree.leaves(arrays):
        sharding = jax.typeof(x).sharding
        if _explicit_axes(sharding.mesh) and sharding.mesh.size > 1:
            return sharding
    return None


def beside(array: Array, x: Array) -> Array:
    """Lays the first axes of `array` out as those of `x`, where that lies on Explicit axes."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return array
    spec = PartitionSpec(*sharding.spec[: array.ndim])
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def dense_product(
    x: Array, kernel: Array, dimensions: Any, *, split_channels: bool = True, **options: Any
) -> Array:
    """`jax.lax.dot_general` of a Dense layer [..., D] [D, F] -> [..., F].

    On a mesh of Explicit axes, where the product of two split operands asks for a decision, rows
    stay split as those of `x`; with `split_channels` channels are as the kernel's, where the rows
    leave its axes free.
    """
    sharding = explicit_sharding((x, kernel))
    if sharding is not None:
        rows = tuple(jax.typeof(x).sharding.spec)[:-1]
        channels = tuple(jax.typeof(kernel).sharding.spec)[-1]
        if not split_channels or set(_axes(channels)) & {
            axis for place in rows for axis in _axes(place)
        }:
            channels = None
        options["out_sharding"] = NamedSharding(sharding.mesh, PartitionSpec(*rows, channels))
    if x.ndim > 1 and math.prod(x.shape[:-1]) == 1:
        # XLA makes of a product with one row a multiplication, which writes as many numbers as the
        # kernel has, and a sum.
        rows = jnp.broadcast_to(x, (*x.shape[:-2], 8, x.shape[-1]))
        return jax.lax.dot_general(rows, kernel, dimensions, **options)[..., :1, :]
    return jax.lax.dot_general(x, kernel, dimensions, **options)


def _explicit_axes(mesh: AbstractMesh | Mesh) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {axis for axis, kind in kinds if kind == AxisType.Explicit}


def _axes(place: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes in one entry of a PartitionSpec."""
    return () if place is None else place if isinstance(place, tuple) else (place,)


def _places(inputs: Any, arrays: Any, heads: int | None) -> dict[str, Any]:
    """The mesh axes that rows and heads of the arguments lie over already."""
    sizes: dict[str, set[int]] = {"batch": set(), "heads": {heads} if heads else set()}
    found: dict[str, Any] = {}
    mesh: Any = None

    def visit(names, tree):
        nonlocal mesh
        for x in jax.tree.leaves(tree):
            sharding = jax.typeof(x).sharding
            for name, size, place in zip(names, x.shape, sharding.spec):
                if name in sizes:
                    sizes[name].add(size)
                    if place is not None and name not in found:
                        found[name], mesh = place, sharding.mesh

    _map_names(visit, inputs, arrays)

    def parts(name):
        return math.prod(mesh.shape[axis] for axis in _axes(found[name]))

    if "heads" in found and (
        any(size % parts("heads") for size in sizes["heads"])
        or set(_axes(found["heads"])) & set(_axes(found.get("batch")))
    ):
        del found["heads"]
    return found


def _box_of(init: Callable) -> nn.Partitioned | None:
    """The box that an initialiser of matrices makes, if any."""
    box = jax.eval_shape(lambda: init(jax.random.key(0), (1, 1), jnp.float32))
    if not _is_box(box):
        return None
    if len(box.names) != 2:
        raise ValueError(
            "kernel_init: expected names of two axes, the model's width and the channels, "
            f"got {box.names}"
        )
    return box


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


def _map_names(function: Callable, names: Any, *trees: Any) -> Any:
    """Maps names of axes, and what the other trees have in their place."""
    return jax.tree.map(function, names, *trees, is_leaf=_is_names)


def _is_names(x: Any) -> bool:
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)
