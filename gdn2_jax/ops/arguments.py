"""Checks and small preparations of an operator's arguments."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Implementation = Literal["pallas", "triton", "xla", "recurrent"]

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
"""What an operator takes for arrays that need no full precision."""


def as_arrays[Tree](arguments: Tree) -> Tree:
    """JAX arrays of the arguments; NumPy's 64-bit ones become 32-bit unless 64-bit mode is on."""
    # A list of numbers is an array, not a tree of them.
    return jax.tree.map(jnp.asarray, arguments, is_leaf=lambda x: isinstance(x, list))


def check_shape(name: str, array: Array, expected: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` has the shape expected."""
    if tuple(array.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(array.shape)}")


def check_layout(name: str, array: Array, layout: str) -> None:
    """Raises ValueError unless `array` is not empty and has one dimension for each of `layout`."""
    if array.ndim != len(layout.split()) or 0 in array.shape:
        raise ValueError(
            f"{name}: expected a non-empty array [{layout}], got shape {tuple(array.shape)}"
        )


def check_dtypes(low: dict[str, Array], full: dict[str, Array]) -> jnp.dtype:
    """Returns the dtype of the arithmetic, which all of `full` must have.

    Args:
      low: arrays of any dtype in `DTYPES`, by name.
      full: arrays in float32, or float64 (if any of `low` is float64, they must be), by name.

    Raises:
      ValueError: an array has another dtype.
    """
    for name, array in low.items():
        if array.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected bfloat16, float16, float32 or float64, got {array.dtype}"
            )
    dtype = next(iter(full.values())).dtype
    double = any(array.dtype == jnp.float64 for array in low.values()) or dtype == jnp.float64
    expected = jnp.dtype(jnp.float64 if double else jnp.float32)
    for name, array in full.items():
        if array.dtype != expected:
            raise ValueError(f"{name}: expected {expected} beside these inputs, got {array.dtype}")
    return expected


def check_segment_ids(segment_ids: Int[Array, "B T"] | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `segment_ids` is None or integers [B, T]."""
    if segment_ids is None:
        return
    check_shape("segment_ids", segment_ids, shape)
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids: expected an integer dtype, got {segment_ids.dtype}")


def check_heads(q: Array, v: Array, key_side: str, value_side: str) -> None:
    """Raises ValueError unless `q` and `v` have these layouts, equal "B T", and heads that divide.

    The last two axes of both are heads and channels.
    """
    check_layout("q", q, key_side)
    check_layout("v", v, value_side)
    lead = v.ndim - 2
    if v.shape[:lead] != q.shape[:lead]:
        raise ValueError(
            f"v: expected leading dimensions {tuple(q.shape[:lead])} as q's, "
            f"got {tuple(v.shape[:lead])}"
        )
    if v.shape[-2] % q.shape[-2]:
        raise ValueError(
            f"v: expected a number of heads that is a multiple of q's {q.shape[-2]}, "
            f"got {v.shape[-2]}"
        )


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or the name of one."""
    known = (None, *get_args(Implementation))
    if implementation not in known:
        raise ValueError(f"implementation: expected one of {known}, got {implementation!r}")


def check_no_kernel(implementation: str | None) -> None:
    """`check_implementation` for an operator without a GPU kernel.

    Raises:
      NotImplementedError: "pallas" or "triton" is asked for.
    """
    check_implementation(implementation)
    if implementation in ("pallas", "triton"):
        raise NotImplementedError(
            f'implementation="{implementation}": this operator has no GPU kernel; use "xla"'
        )


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a token's segment differs from the one before; false for the first token."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))


def opaque[Tree](arrays: Tree) -> Tree:
    """The arrays, each behind a barrier, so that the compiler does not see which are constant.

    XLA's CPU backend compiles a matrix product with a constant operand (a state of zeros, the
    cotangent of a sum) wrongly where it fuses the product with a reduction: the result reads
    memory that nothing wrote (docs/xla_cpu_constant_operand.md). An operator therefore passes its
    inputs and its results through here. Cotangents pass the same barriers on their way back, but
    the zeros that stand for a missing cotangent appear behind them: a custom backward calls this
    for its cotangents, too.
    """
    return jax.tree.map(jax.lax.optimization_barrier, arrays)


def match_varying_axes[Tree](arrays: Tree) -> Tree:
    """Inside shard_map, marks every array as varying over all mesh axes that any of them varies on.

    The transpose of the mark sums a replicated input's cotangent over the mesh.
    """

    def varying(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(varying, jax.tree.leaves(arrays)))

    def mark(x):
        missing = axes - varying(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(mark, arrays)
