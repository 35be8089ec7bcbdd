"""One token of the recurrence on a Hopper GPU: reads the state once and writes it in place.

A block owns some value columns of one head's state [K, V], all its rows: it needs no other block.
The state lies in memory in float32 or, half as many bytes, in bfloat16.

    s = exp(g) S    r = z - s^T e    S' = s + k r^T    o = S'^T q    with e = b k, z = w v

Memory bound with many heads, latency bound with few.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from gdn2_jax.pallas import mosaic
from gdn2_jax.pallas.rounding import round_stochastically

_FEW_BLOCKS = 512


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the state is cut.

    Attributes:
      columns: value columns a block owns, 16, 32 or 64; fewer make more blocks, which shortens a
        step that does not fill the GPU, but read the state in shorter pieces of rows.
    """

    columns: int

    def __post_init__(self):
        """Raises a ValueError where no register layout exists."""
        if self.columns not in (16, 32, 64):
            raise ValueError(f"columns: expected 16, 32 or 64, got {self.columns}")


def default_tuning(states: int, value_dim: int) -> Tuning:
    """The cut for this number of states (B * Hv)."""
    return Tuning(columns=32 if states * value_dim // 64 < _FEW_BLOCKS else 64)


@functools.partial(jax.jit, static_argnames=("scale", "tuning"))
@mosaic.on_cuda
def decode_step(
    state: Float[Array, "B Hv K V"],
    q: Float[Array, "B Hk K"],
    k: Float[Array, "B Hk K"],
    v: Float[Array, "B Hv V"],
    g: Float[Array, "B Hk K"],
    b: Float[Array, "B Hk K"],
    w: Float[Array, "B Hv V"],
    scale: float,
    tuning: Tuning | None = None,
    seeds: UInt32[Array, "B Hv"] | None = None,
) -> tuple[Float[Array, "B Hv K V"], Float[Array, "B Hv V"]]:
    """Advances the state by one token and reads it.

    The state's buffer is updated in place where the caller donates it, and copied first where not;
    inside shard_map it is never updated in place.

    K and V are 64 or 128. q, k, v, b and w are bf16 or fp16, the log-decay g is fp32. A bf16 state is
    rounded stochastically with `seeds`, else to nearest. The number of states chooses the tuning if
    it is None.

    Returns:
      The new state and the output, of `v`'s shape and dtype. All arithmetic is fp32; the output is
      read from the state before rounding.
    """
    batch, value_heads, key_dim, value_dim = state.shape
    group = value_heads // q.shape[1]
    key_side, value_side = (batch, q.shape[1], key_dim), (batch, value_heads, value_dim)
    mosaic.check_shapes(
        **{name: (x, key_side) for name, x in {"q": q, "k": k, "g": g, "b": b}.items()},
        **{name: (x, value_side) for name, x in {"v": v, "w": w}.items()},
    )
    columns = (tuning or default_tuning(batch * value_heads, value_dim)).columns
    layout = _layout(columns)
    shape = (key_dim, columns)
    is_nearest = seeds is None

    def divide(x, divisor):
        return lax.div(x, jnp.int32(divisor)), lax.rem(x, jnp.int32(divisor))

    def kernel(q, k, v, g, b, w, *refs, slab, arrived):
        seeds, refs = ((), refs) if is_nearest else (refs[:1], refs[1:])
        state, *new_state, o = refs
        # One flat axis: a GPU grid's other axes end at 65535.
        index, cut = divide(lax.axis_index("block"), value_dim // columns)
        row, head = divide(index, value_heads)
        key_head, _ = divide(head, group)
        values = pl.ds(cut * columns, columns)
        plgpu.copy_gmem_to_smem(state.at[row, head, :, values], slab, arrived)

        def load(ref, vector_layout):
            return plgpu.load(ref, layout=vector_layout, optimized=False).astype(jnp.float32)

        # The vectors arrive while the slab is on its way.
        rows_layout = layout.reduce(1)
        decay = jnp.exp(load(g.at[row, key_head], rows_layout))
        key = load(k.at[row, key_head], rows_layout)
        erase = load(b.at[row, key_head], rows_layout) * key
        query = load(q.at[row, key_head], rows_layout) * scale
        columns_layout = layout.reduce(0)
        write = load(w.at[row, head, values], columns_layout)
        write *= load(v.at[row, head, values], columns_layout)
        seed = [ref[row, head] for ref in seeds]

        plgpu.barrier_wait(arrived)
        s = plgpu.load(slab, layout=layout, optimized=False).astype(jnp.float32)
        s = s * mosaic.over_columns(decay, shape)
        residual = write - jnp.sum(s * mosaic.over_columns(erase, shape), axis=0)
        s = s + mosaic.over_columns(key, shape) * mosaic.over_rows(residual, shape)
        # Every thread overwrites what it read itself.
        slab[...] = rounded_columns(s, layout, state.dtype, cut * columns, value_dim, *seed)
        plgpu.commit_smem()
        target = new_state[0] if new_state else state
        plgpu.copy_smem_to_gmem(slab, target.at[row, head, :, values])
        output = jnp.sum(s * mosaic.over_columns(query, shape), axis=0)
        mosaic.store_global(o.at[row, head, values], output.astype(o.dtype))
        plgpu.wait_smem_to_gmem(0)

    inputs = (q, k, v, g, b, w) if is_nearest else (q, k, v, g, b, w, seeds)
    # Kernels take no refs to arrays that vary over a mesh: inside shard_map the new state is a new
    # array.
    in_place = not jax.typeof(state).manual_axis_type.varying
    o_type = jax.ShapeDtypeStruct(v.shape, v.dtype)
    run = mosaic.kernel(
        kernel,
        out_type=o_type if in_place else (jax.ShapeDtypeStruct(state.shape, state.dtype), o_type),
        grid=(batch * value_heads * value_dim // columns,),
        grid_names=("block",),
        scratch_types={"slab": plgpu.SMEM(shape, state.dtype), "arrived": plgpu.Barrier()},
        compiler_params=mosaic.COMPILER_PARAMS,
    )
    if not in_place:
        return run(*inputs, state)
    state_ref = jax.new_ref(state)
    o = run(*inputs, state_ref)
    return jax.freeze(state_ref), o


def rounded_columns(s, layout, dtype, first, value_dim: int, seed=None) -> jax.Array:
    """Columns of a state, from column `first` of `value_dim`, in the dtype in which it is kept."""
    if seed is None:
        return s.astype(dtype)
    key_channel, column = (
        plgpu.broadcasted_iota(jnp.uint32, s.shape, axis, layout=layout) for axis in (0, 1)
    )
    column += first.astype(jnp.uint32)
    return round_stochastically(s, seed, key_channel * np.uint32(value_dim) + column)


def _layout(columns: int):
    """Registers of a [K, columns] slab: 4 adjacent columns a thread, the rows over lanes and warps."""
    lanes = columns // 4
    rows = 32 // lanes
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4 * rows, columns), (rows, columns), (4,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
