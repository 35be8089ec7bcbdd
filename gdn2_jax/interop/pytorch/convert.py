"""From tensors to parameters and back, lazily: nothing is read before its turn to be written."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Sharding

from gdn2_jax.interop.pytorch.files import StoredTensor
from gdn2_jax.interop.pytorch.layouts import Entry, Path

Leaf = tuple[Path, int | None]


def flatten(params: Any) -> dict[Path, Any]:
    """Returns the leaves of a tree of dicts by their paths.

    Flax's `flatten_dict` would take boxes and variables for leaves.

    Raises:
      TypeError: there are other nodes than dicts, as the boxes and variables of Flax.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, _ in leaves:
        if not all(isinstance(part, jax.tree_util.DictKey) for part in path):
            raise TypeError(
                "params: expected dicts of arrays, as nn.unbox and nnx.to_pure_dict give, "
                f"got another tree at {jax.tree_util.keystr(path)}"
            )
    return {tuple(part.key for part in path): leaf for path, leaf in leaves}


def check_params(params: Any, abstract: Any) -> None:
    """Checks that parameters are a model's.

    Args:
      params: the parameters.
      abstract: what the model's `init` gives.

    Raises:
      ValueError: some are missing, too many or of a wrong shape; the message lists them all.
    """
    own, expected = (
        {"/".join(path): tuple(leaf.shape) for path, leaf in flatten(tree).items()}
        for tree in (params, abstract)
    )
    if complaints := _misfits(own, expected):
        raise ValueError(f"params do not fit the model: {'; '.join(complaints)}")


def leaf_shapes(params: Any, entries: Iterable[Entry]) -> dict[Leaf, tuple[int, ...]]:
    """Returns the shape of every parameter in the entries; without the axis of stacked layers."""
    flat = flatten(params)
    return {
        (path, entry.index): tuple(flat[path].shape[0 if entry.index is None else 1 :])
        for entry in entries
        for path in entry.paths
    }


def leaves_of_params(params: Any, entries: Iterable[Entry]) -> dict[Leaf, StoredTensor]:
    """Returns every parameter, taken to the host when read."""
    flat = flatten(params)

    def read(path: Path, index: int | None) -> np.ndarray:
        return np.asarray(flat[path] if index is None else flat[path][index])

    return {
        (path, index): StoredTensor(
            shape, np.dtype(flat[path].dtype), functools.partial(read, path, index)
        )
        for (path, index), shape in leaf_shapes(params, entries).items()
    }


def leaves_of_tensors(
    tensors: Mapping[str, StoredTensor],
    entries: Iterable[Entry],
    shapes: Mapping[Leaf, tuple[int, ...]],
) -> dict[Leaf, StoredTensor]:
    """Returns every parameter, read from the tensors; entries without a parameter are ignored.

    Raises:
      ValueError: tensors are missing, too many, of a wrong shape or not of floats; the message
        lists them all.
    """
    unused = {entry.name for entry in entries if not entry.paths}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    complaints = _misfits(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {entry.name: _tensor_shape(entry, shapes) for entry in entries if entry.paths},
    )
    if no_floats := [
        f"{name} ({tensor.dtype})"
        for name, tensor in sorted(tensors.items())
        if not jnp.issubdtype(tensor.dtype, jnp.floating)
    ]:
        complaints.append(f"not of floats: {', '.join(no_floats)}")
    if complaints:
        raise ValueError(f"tensors do not fit the model: {'; '.join(complaints)}")

    def read(entry: Entry, position: int) -> np.ndarray:
        own = [shapes[path, entry.index] for path in entry.paths]
        return entry.layout.split(tensors[entry.name].read(), own)[position]

    return {
        (path, entry.index): StoredTensor(
            shapes[path, entry.index],
            tensors[entry.name].dtype,
            functools.partial(read, entry, position),
        )
        for entry in entries
        for position, path in enumerate(entry.paths)
    }


def tensors_of_leaves(
    leaves: Mapping[Leaf, StoredTensor], entries: Iterable[Entry]
) -> dict[str, StoredTensor]:
    """Returns the tensors of a state dict, in the order of the entries."""

    def read(entry: Entry, dtype: np.dtype) -> np.ndarray:
        arrays = (leaves[path, entry.index].read() for path in entry.paths)
        return entry.layout.join(*(array.astype(dtype, copy=False) for array in arrays))

    shapes = {leaf: stored.shape for leaf, stored in leaves.items()}
    tensors = {}
    for entry in entries:
        if entry.paths:
            dtype = _common_dtype(leaves[path, entry.index] for path in entry.paths)
            tensors[entry.name] = StoredTensor(
                _tensor_shape(entry, shapes), dtype, functools.partial(read, entry, dtype)
            )
    return tensors


def params_of_leaves(
    leaves: Mapping[Leaf, StoredTensor], sharding: Sharding | dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the tree of parameters; each goes to the device before the next is read.

    Stacked layers of several dtypes come in the narrowest that holds all of them exactly.

    Args:
      leaves: all of the tree, and all layers of each.
      sharding: of every parameter, or a tree of them; on the default device if None.

    Raises:
      ValueError: JAX would narrow a dtype.
    """
    parts: dict[Path, dict[int | None, StoredTensor]] = {}
    for (path, index), stored in leaves.items():
        parts.setdefault(path, {})[index] = stored
    shardings = flatten(sharding) if isinstance(sharding, dict) else dict.fromkeys(parts, sharding)
    params = {}
    for path, layers in parts.items():
        dtype = _common_dtype(layers.values())
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"{'/'.join(path)}: expected float64 only if jax_enable_x64 is set, got {dtype}"
            )
        if None in layers:
            array = layers[None].read()
        else:
            array = np.empty((len(layers), *layers[0].shape), dtype)
            for index, stored in layers.items():
                array[index] = stored.read()
        params[path] = jax.device_put(array, shardings[path])
    return unflatten_dict(params)


def _common_dtype(tensors: Iterable[StoredTensor]) -> np.dtype:
    """The narrowest that holds all exactly: float32 for bfloat16 beside float16."""
    dtypes = {tensor.dtype for tensor in tensors}
    # Not JAX's promotion, which knows no float64 unless jax_enable_x64 is set.
    if len(dtypes) == 1:
        return dtypes.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def _tensor_shape(entry: Entry, shapes: Mapping[Leaf, tuple[int, ...]]) -> tuple[int, ...]:
    zeros = [np.broadcast_to(np.int8(0), shapes[path, entry.index]) for path in entry.paths]
    return entry.layout.join(*zeros).shape


def _misfits(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    complaints = []
    if missing := sorted(expected.keys() - shapes.keys()):
        complaints.append(f"missing: {', '.join(missing)}")
    if extra := sorted(shapes.keys() - expected.keys()):
        complaints.append(f"not expected: {', '.join(extra)}")
    if wrong := [
        f"{name} (expected {expected[name]}, got {shapes[name]})"
        for name in sorted(expected.keys() & shapes.keys())
        if shapes[name] != expected[name]
    ]:
        complaints.append(f"of a wrong shape: {', '.join(wrong)}")
    return complaints
