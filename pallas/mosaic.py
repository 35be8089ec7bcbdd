"""What the kernels share: operand tiles, accumulators, and interpret mode.

JAX's GPU interpreter runs neither wgmma with an operand in registers nor stores to an accumulator.
`Accumulator` stands in for both, so that a kernel is one text that runs on a Hopper GPU and, under
`interpret_mode`, on a CPU.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import layout_inference
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

CHUNK = 64
"""Tokens in a chunk: the rows of a wgmma."""

# A load names a layout only where no reader has one. JAX guesses the layout before each cast to a named
# one, and a guess goes through all variables of the kernel.
WGMMA = plgpu.Layout.WGMMA
COLUMNS = WGMMA.reduce(0)
WARP_COLUMNS = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 32), (16, 8), (4,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
"""Registers of a [K, 32] slab: a warp has all rows of 8 columns, so sums over rows stay within it. The
memory for sums over several warps is one for all warpgroups of a block: two that sum at a time race."""

# Barriers between writes of shared memory and their readers are placed by hand with commit_smem.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpret_mode(*, detect_races: bool = False) -> Iterator[None]:
    """Runs every kernel traced inside it in GPU interpret mode, on any backend."""
    token = _interpreting.set(True)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether `interpret_mode` is on."""
    return _interpreting.get()


def tile(shape: tuple[int, ...], dtype, swizzle: int = 128) -> pl.MemoryRef:
    """Shared memory that TMA fills and wgmma reads: 8-row tiles, swizzled."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def overlaid(*groups: tuple):
    """Groups of refs in the same shared memory; one group is in use at a time.

    In the interpreter every ref has its own memory: its race detection takes a union for one buffer,
    though warpgroups use disjoint slabs of the union.
    """
    return groups if interpreting() else plgpu.RefUnion(*groups)


def check_shapes(**operands: tuple[jax.Array, tuple[int, ...]]) -> None:
    """Raises a ValueError for an array of another shape: its kernel would read what is not there."""
    for name, (array, shape) in operands.items():
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")


def is_scalar(gate: jax.Array) -> bool:
    """Whether a gate has one number a head and token, fp32 [B, H, T], for all of its channels."""
    return gate.ndim == 3


def gate_shape(gate: jax.Array, full: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a gate over the channels of `full`, [B, T, H, C], or over the heads alone."""
    batch, length, heads, _ = full
    return (batch, heads, length) if is_scalar(gate) else full


def kernel(body: Callable, *, scratch_types: dict[str, Any], **options) -> Callable:
    """`plgpu.kernel` whose body takes its scratch by name.

    `plgpu.kernel` takes a dict, too, but allocates its parts in the alphabet's order.
    """
    names = tuple(scratch_types)

    @functools.wraps(body)
    def positional(*refs):
        first = len(refs) - len(names)
        return body(*refs[:first], **dict(zip(names, refs[first:], strict=True)))

    return plgpu.kernel(positional, scratch_types=tuple(scratch_types.values()), **options)


def on_cuda(run: Callable) -> Callable:
    """`run`, lowered for "cuda" alone where several platforms share the program.

    Pallas refuses to lower for several platforms, even in a branch of `jax.lax.platform_dependent`.
    """

    @functools.wraps(run)
    def call(*arguments, **options):
        if interpreting():  # on one platform, with effects
            return run(*arguments, **options)
        leaves, tree = jax.tree.flatten((arguments, options))

        def of_arrays(*arrays):
            given = iter(arrays)
            given = [next(given) if isinstance(x, jax.Array) else x for x in leaves]
            arguments, options = jax.tree.unflatten(tree, given)
            return run(*arguments, **options)

        arrays = [x for x in leaves if isinstance(x, jax.Array)]
        jaxpr, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
        results = _kernel.bind(*arrays, jaxpr=jaxpr)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


_kernel = Primitive("hopper_kernel")
_kernel.multiple_results = True
_kernel.def_abstract_eval(lambda *_, jaxpr: jaxpr.out_avals)
_kernel.def_impl(lambda *arrays, jaxpr: jaxpr_as_fun(jaxpr)(*arrays))


def _lower_on_cuda(context, *operands, jaxpr):
    if len(context.module_context.platforms) > 1:
        context = context.replace(platforms=("cuda",))
    return mlir.lower_fun(jaxpr_as_fun(jaxpr))(context, *operands)


mlir.register_lowering(_kernel, _lower_on_cuda)


def _map_on_cuda(arrays, axes, *, jaxpr):
    results = on_cuda(jax.vmap(jaxpr_as_fun(jaxpr), axes))(*arrays)
    return results, [0] * len(results)


batching.primitive_batchers[_kernel] = _map_on_cuda


class _Unverified(NamedTuple):
    """An operation that is printed without looking at all of the kernel that it is in."""

    operation: Any

    def __str__(self) -> str:
        return self.operation.get_asm(assume_verified=True, use_local_scope=True, skip_regions=True)


def _print_names_unverified() -> None:
    """Makes the layout inference of jax 0.11 name its variables faster; the names stay the same.

    It sorts them by the text of their operations, and MLIR verifies the whole kernel before it prints
    one of them. jax 0.12 sorts nothing.
    """
    site: Any = layout_inference.ValueSite
    verified = site.__str__
    if jax.__version_info__ >= (0, 12) or hasattr(verified, "__wrapped__"):
        return

    @functools.wraps(verified)
    def unverified(site):
        return verified(dataclasses.replace(site, operation=_Unverified(site.operation)))

    site.__str__ = unverified


_print_names_unverified()


class Accumulator:
    """An fp32 wgmma accumulator: `add` issues a product, `get` waits for it."""

    def __init__(self, ref, shape: tuple[int, int]):
        """Wraps an ACC ref; in interpret mode there is none."""
        self._ref = ref
        self._value: Any = jnp.zeros(shape, jnp.float32) if ref is None else None

    def add(self, a, b) -> None:
        """Adds a @ b; `a` is an array or a ref, `b` a ref. Not waited for."""
        if self._ref is None:
            a = a if isinstance(a, jax.Array) else a[...]
            self._value += jnp.dot(
                a.astype(jnp.float32), b[...].astype(jnp.float32), precision="highest"
            )
        else:
            plgpu.wgmma(self._ref, a, b)

    def set(self, value: jax.Array) -> None:
        """Overwrites the accumulator."""
        if self._ref is None:
            self._value = value
        else:
            self._ref[...] = value

    def get(self, pending: int = 0) -> jax.Array:
        """The value, once at most `pending` of the products issued later than it are unfinished."""
        if self._ref is None:
            return self._value
        return plgpu.wgmma_accumulator_load(self._ref, wait_n=pending)


def with_accumulators(body: Callable, *shapes: tuple[int, int]):
    """Calls `body` with zeroed accumulators of these shapes and returns its result."""
    if interpreting():
        return body(*(Accumulator(None, shape) for shape in shapes))
    return pl.run_scoped(
        lambda *refs: body(*map(Accumulator, refs, shapes)),
        *(plgpu.ACC(shape, jnp.float32) for shape in shapes),
    )


def matmul(shape: tuple[int, int], *products: tuple) -> jax.Array:
    """The sum of products a @ b, waited for."""

    def body(accumulator):
        for a, b in products:
            accumulator.add(a, b)
        return accumulator.get()

    return with_accumulators(body, shape)


def loop(count: int, body: Callable[[jax.Array], None]) -> None:
    """Calls `body` with 0 to count - 1, in a loop that adds to accumulators.

    One copy of the code on the GPU: a kernel that outgrows the instruction cache runs at half speed.
    In interpret mode accumulators are values, which a traced loop could not add to.
    """
    if interpreting():
        for i in range(count):
            body(jnp.int32(i))
    else:
        lax.fori_loop(jnp.int32(0), jnp.int32(count), lambda i, _: body(i), None)


def wait_for_products() -> None:
    """Waits for every product issued so far."""
    if not interpreting():
        plgpu.wgmma_wait(0)


def at_least(limit: float, x: jax.Array) -> jax.Array:
    """The larger of both; NaN stays NaN."""
    return jnp.maximum(x, limit)


def known_at_least(limit: float, x: jax.Array) -> jax.Array:
    """The larger of both; the limit in place of NaN and infinity."""
    return jnp.where((x > limit) & (x < jnp.inf), x, jnp.float32(limit))


def finite(x: jax.Array) -> jax.Array:
    """Zero in place of NaN and infinity, which a product with zero would keep."""
    return jnp.where(jnp.abs(x) < jnp.inf, x, jnp.float32(0))


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bf16 arrays whose sum keeps 16 bits of an fp32 one."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def store_global(ref, value: jax.Array) -> None:
    """Stores to global memory, also in pieces shorter than a cache line."""
    # jax 0.11 has no `plgpu.store`, and takes such pieces from an assignment.
    if interpreting() or not hasattr(plgpu, "store"):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]


def load_scalars(ref, shape: tuple[int, int]) -> jax.Array:
    """A number for each row, repeated along the columns."""
    return over_columns(plgpu.load(ref, optimized=False), shape)


def load_for_columns(ref, shape: tuple[int, int]) -> jax.Array:
    """A number for each column, repeated along the rows.

    The kernel must have another operand of it for `load_scalars`: Mosaic takes two loads of the same
    numbers for one, and finds no layout for that.
    """
    return over_rows(plgpu.load(ref, optimized=False), shape)


def over_rows(per_column: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Repeats one value a column along the rows."""
    return lax.broadcast_in_dim(per_column, shape, [1])


def over_columns(per_row: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Repeats one value a row along the columns."""
    return lax.broadcast_in_dim(per_row, shape, [0])


def indices(shape: tuple[int, int], axis: int) -> jax.Array:
    """The row (axis 0) or column (axis 1) of each element."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)
