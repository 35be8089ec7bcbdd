"""The short convolution of a layer on a Hopper GPU, SiLU and unit length included: one pass over memory.

    c[t] = sum_i kernel[i] x[t - 3 + i]    s = SiLU(c)    y = s / |s| of each head, or y = s

A block owns some tokens of one head, or of 128 channels without heads. It copies them and a few of the
tokens beside them to shared memory, where rows are read once for each tap. The backward computes dc of
its own tokens and of the three after them, which lie in the next block, and convolves it.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from gdn2_jax.pallas import mosaic

TAPS = 4
WIDTH = 128
"""Channels of a block."""
TOKENS = 32
"""Of a block."""
_ROWS = 4
"""Tokens that the threads of a block hold at once, 4 channels each: a token is one warp's."""
_SHAPE = (_ROWS, WIDTH)
_UNROLL = 2
_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((_ROWS, WIDTH), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


@functools.partial(jax.jit, static_argnames=("unit",))
@mosaic.on_cuda
def convolve(
    x: BFloat16[Array, "B T D"], kernel: Float[Array, "B 4 D"], *, unit: bool
) -> BFloat16[Array, "B T D"]:
    """Convolution, SiLU and unit length.

    Args:
      x: T is a multiple of `TOKENS`.
      kernel: fp32, of each row.
      unit: divide every `WIDTH` channels by their length; D is a multiple.
    """

    def short_convolution_kernel(x, kernel, y, *, tile, arrived):
        row, start, channels, _, has_past = _place()
        _copy(x.at[row, :, channels], start, tile, _ROWS, 0, arrived)
        taps = _taps(kernel.at[row, :, channels])
        plgpu.barrier_wait(arrived)
        _clear(has_past, tile, 0)
        plgpu.commit_smem()

        def of(first, _):
            s, *_ = _silu(_convolved(taps, _seen(tile, first)))
            if unit:
                s *= mosaic.over_columns(_per_length(s), _SHAPE)
            target = y.at[row, pl.ds(start + first, _ROWS), channels]
            mosaic.store_global(target, s.astype(y.dtype))

        _loop(of, None)

    return mosaic.kernel(
        short_convolution_kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types={
            "tile": plgpu.SMEM((_ROWS + TOKENS, WIDTH), x.dtype),
            "arrived": plgpu.Barrier(num_arrivals=2),
        },
        **_options(x),
    )(x, kernel)


@functools.partial(jax.jit, static_argnames=("unit",))
@mosaic.on_cuda
def convolve_backward(
    x: BFloat16[Array, "B T D"],
    kernel: Float[Array, "B 4 D"],
    dy: BFloat16[Array, "B T D"],
    *,
    unit: bool,
) -> tuple[BFloat16[Array, "B T D"], Float[Array, "B 4 D"]]:
    """Gradients of x and of the kernel of each row; see `convolve`."""

    def short_convolution_backward_kernel(
        x, kernel, dy, dx, d_kernel, *, tile, dy_tile, dc_tile, arrived
    ):
        row, start, channels, has_next, has_past = _place()
        _copy(x.at[row, :, channels], start, tile, _ROWS, _ROWS, arrived)
        _copy(dy.at[row, :, channels], start, dy_tile, 0, _ROWS, arrived)
        taps = _taps(kernel.at[row, :, channels])
        plgpu.barrier_wait(arrived)
        _clear(has_past, tile, 0)
        _clear(has_next, tile, _ROWS + TOKENS)
        _clear(has_next, dy_tile, TOKENS)
        plgpu.commit_smem()

        def of(first, d_taps):
            seen = _seen(tile, first)
            s, gate, slope = _silu(_convolved(taps, seen))
            d = _load(dy_tile.at[pl.ds(first, _ROWS)])
            if unit:
                inverse = _per_length(s)
                along = jnp.sum(s * d, axis=1) * inverse * inverse
                d -= s * mosaic.over_columns(along, _SHAPE)
                d *= mosaic.over_columns(inverse, _SHAPE)
            dc = d * gate * slope
            dc_tile[pl.ds(first, _ROWS)] = dc
            return tuple(total + dc * u for total, u in zip(d_taps, seen))

        d_taps = _loop(of, (_zeros(jnp.float32),) * TAPS)
        of(TOKENS, d_taps)
        plgpu.commit_smem()
        for tap, total in enumerate(d_taps):
            target = d_kernel.at[row, lax.axis_index("tile"), tap, channels]
            mosaic.store_global(target, jnp.sum(total, axis=0))

        def convolved(first, _):
            later = [_load(dc_tile.at[pl.ds(first + TAPS - 1 - tap, _ROWS)]) for tap in range(TAPS)]
            target = dx.at[row, pl.ds(start + first, _ROWS), channels]
            mosaic.store_global(target, _convolved(taps, later).astype(dx.dtype))

        _loop(convolved, None)

    batch, length, depth = x.shape
    partial = (batch, length // TOKENS, TAPS, depth)
    dx, d_kernel = mosaic.kernel(
        short_convolution_backward_kernel,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(partial, jnp.float32),
        ),
        scratch_types={
            "tile": plgpu.SMEM((_ROWS + TOKENS + _ROWS, WIDTH), x.dtype),
            "dy_tile": plgpu.SMEM((TOKENS + _ROWS, WIDTH), dy.dtype),
            "dc_tile": plgpu.SMEM((TOKENS + _ROWS, WIDTH), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=5),
        },
        **_options(x),
    )(x, kernel, dy)
    return dx, jnp.sum(d_kernel, axis=1)


def _options(x) -> dict:
    batch, length, depth = x.shape
    return {
        "grid": (depth // WIDTH, length // TOKENS, batch),
        "grid_names": ("channels", "tile", "row"),
        "compiler_params": mosaic.COMPILER_PARAMS,
    }


def _place():
    """Row, first token and channels of a block; whether blocks of its row follow and precede it."""
    tile, count = lax.axis_index("tile"), lax.axis_size("tile")
    channels = pl.ds(lax.axis_index("channels") * WIDTH, WIDTH)
    return lax.axis_index("row"), tile * TOKENS, channels, tile < count - 1, tile > 0


def _copy(x, start, tile, before: int, after: int, arrived) -> None:
    """Copies a block's tokens and so many beside them; where there are none, any others."""
    plgpu.copy_gmem_to_smem(x.at[pl.ds(start, TOKENS)], tile.at[pl.ds(before, TOKENS)], arrived)
    if before:
        first = jnp.maximum(start - before, 0)
        plgpu.copy_gmem_to_smem(x.at[pl.ds(first, before)], tile.at[pl.ds(0, before)], arrived)
    if after:
        first = jnp.minimum(start + TOKENS, x.shape[0] - after)
        target = tile.at[pl.ds(before + TOKENS, after)]
        plgpu.copy_gmem_to_smem(x.at[pl.ds(first, after)], target, arrived)


def _loop(of, carry):
    """Runs `of(first token, carry)` over a block's tokens, so many at a time."""
    turn = _UNROLL * _ROWS

    def body(index, carry):
        for part in range(_UNROLL):
            carry = of(index * turn + part * _ROWS, carry)
        return carry

    return lax.fori_loop(0, TOKENS // turn, body, carry)


def _clear(is_there, tile, first: int) -> None:
    """Zeros in place of tokens before the first or after the last of a sequence."""

    @pl.when(jnp.logical_not(is_there))
    def _():
        tile[pl.ds(first, _ROWS)] = _zeros(tile.dtype)


def _zeros(dtype) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(_SHAPE, dtype), _LAYOUT)


def _taps(kernel) -> list[jax.Array]:
    layout = _LAYOUT.reduce(0)
    return [plgpu.load(kernel.at[tap], layout=layout, optimized=False) for tap in range(TAPS)]


def _seen(tile, first) -> list[jax.Array]:
    """What each tap sees of a tile that begins with `_ROWS` tokens of the past."""
    begin = first + _ROWS - (TAPS - 1)
    return [_load(tile.at[pl.ds(begin + tap, _ROWS)]) for tap in range(TAPS)]


def _load(ref) -> Float[Array, "R W"]:
    return plgpu.load(ref, layout=_LAYOUT, optimized=False).astype(jnp.float32)


def _convolved(taps: list[jax.Array], seen: list[jax.Array]) -> Float[Array, "R W"]:
    terms = [u * mosaic.over_rows(tap, _SHAPE) for tap, u in zip(taps, seen)]
    return functools.reduce(jnp.add, terms)


def _silu(c: Float[Array, "R W"]):
    """SiLU(c), and its derivative as two factors."""
    root = lax.rsqrt(1 + jnp.exp(-c))
    gate = root * root  # A division takes longer.
    return c * gate, gate, 1 + c * (1 - gate)


def _per_length(s: Float[Array, "R W"]) -> Float[Array, "R"]:
    return lax.rsqrt(jnp.sum(s * s, axis=1) + 1e-6)
