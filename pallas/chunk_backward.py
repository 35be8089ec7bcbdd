"""Backward of a chunk's products with the state and with the inverse (paper eqs. 49-66).

Four warpgroups for each chunk, head and block of value channels, a product or two each:

    0: dQg = dO S^T, dAqk = tril(dO R^T)    1: dKt = R dS'^T, dgamma_C = sum over V of dS' * S
    2: dY = -dR S^T, dE = X dY              3: dZ = X dR, dT = -stril(dZ U^T + dE Y^T)

with dv = w dZ and dw = v dZ. Everything but dv and dw is a sum over value channels.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas import mosaic
from pallas.mosaic import CHUNK, COLUMNS, ROWS, WGMMA, matmul, split, tile


def chunk_backward(d_o, r_t, d_r, states, d_states, u_t, y_t, x, v, w, masks):
    """Computes the gradients of a chunk's operands.

    Args:
      d_o: [B, T, H, V] bf16, cotangent of the outputs.
      r_t: [BH, N, V, 64] bf16, R^T.
      d_r: [BH, T, V] bf16.
      states: [BH, N, V, K] bf16, before each chunk.
      d_states: [BH, N, V, K] bf16, gradient of the state after each chunk.
      u_t: [BH, N, V, 64] bf16.
      y_t: [BH, N, K, 64] bf16.
      x: [BH, N, 64, 64] fp16, the transposed inverse.
      v: [B, T, H, V] bf16.
      w: [B, T, H, V] bf16.
      masks: None, or `Masks` of the segments.

    Returns:
      dQg, dKt and dE [BH, T, K], and dAqk (below the diagonal) and dT [BH, N, 64, 64] in bf16; the
      diagonal of dAqk [BH, T] and dgamma_C [BH, N, K] in fp32; dv and dw [B, T, H, V] in bf16.
    """
    batch, length, heads, value_dim = v.shape
    chunks, key_dim = y_t.shape[1:3]
    block = 128 if value_dim % 128 == 0 else 64
    blocks = value_dim // block
    bf16, f32 = jnp.bfloat16, jnp.float32
    square = (CHUNK, CHUNK)
    key_shape, value_shape = (CHUNK, key_dim), (CHUNK, block)

    def chunk_backward_kernel(*refs):
        d_o, r_t, d_r, states, d_states, u_t, y_t, x, v, w, *refs = refs
        if masks is not None:
            row_segment, column_segment, *refs = refs
        dq_gamma, dk_tail, de_gamma, da_qk, dt, diagonal, d_decay, dv, dw, *refs = refs
        (d_o_area, r_ts, d_rs, hs, d_hs, u_ts, y_ts, xs, vs, ws, es, da_tile, dt_tile, *refs) = refs
        (d_os,), (dq_tile,) = d_o_area
        first, with_d_o, with_d_states, with_values, with_e, d_o_free = refs
        row, head = lax.axis_index("b"), lax.axis_index("h")
        part, chunk = lax.div(lax.axis_index("c"), chunks), lax.rem(lax.axis_index("c"), chunks)
        warpgroup = lax.axis_index("wg")
        rows, values = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * block, block)
        index = row * heads + head
        partial = part * (batch * heads) + index
        load = plgpu.copy_gmem_to_smem

        def stage(tile, value, target):
            tile[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, target)

        def inverse():
            return split(plgpu.load(xs, layout=WGMMA).astype(f32))

        def below_diagonal(value):
            ri, ci = mosaic.indices(square, 0), mosaic.indices(square, 1)
            value = jnp.where(ri > ci, value, 0.0)
            if masks is None:
                return value
            same = mosaic.over_columns(
                plgpu.load(row_segment.at[row, rows], layout=ROWS, optimized=False), square
            ) == mosaic.over_rows(
                plgpu.load(column_segment.at[row, rows], layout=COLUMNS, optimized=False), square
            )
            return jnp.where(same, value, 0.0)

        @pl.when(warpgroup == 2)
        def _():
            load(d_r.at[index, rows, values], d_rs, first)
            load(states.at[index, chunk, values], hs, first)
            load(x.at[index, chunk], xs, first)
            plgpu.barrier_wait(first)
            es[...] = (-matmul(key_shape, (d_rs, hs))).astype(bf16)
            plgpu.commit_smem()
            e = matmul(key_shape, *((part, es) for part in inverse())).astype(bf16)
            plgpu.commit_smem()  # every warp has read dY
            es[...] = e
            plgpu.commit_smem()
            plgpu.barrier_arrive(with_e)
            plgpu.copy_smem_to_gmem(es, de_gamma.at[partial, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == 0)
        def _():
            load(d_o.at[row, rows, head, values], d_os, with_d_o)
            load(r_t.at[index, chunk, values], r_ts, with_d_o)
            plgpu.barrier_wait(with_d_o)
            pairs = matmul(square, (d_os, r_ts))
            stage(da_tile, below_diagonal(pairs).astype(bf16), da_qk.at[partial, chunk])
            plgpu.barrier_wait(first)
            dq = matmul(key_shape, (d_os, hs)).astype(bf16)
            plgpu.commit_smem()
            plgpu.barrier_wait(d_o_free)
            stage(dq_tile, dq, dq_gamma.at[partial, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == 1)
        def _():
            load(d_states.at[index, chunk, values], d_hs, with_d_states)
            plgpu.barrier_wait(with_d_o)
            on_diagonal = mosaic.indices(square, 0) == mosaic.indices(square, 1)
            pairs = jnp.where(on_diagonal, matmul(square, (d_os, r_ts)), 0.0)
            plgpu.barrier_arrive(d_o_free)
            diagonal.at[partial, rows][...] = jnp.sum(pairs, axis=1)
            plgpu.barrier_wait(with_d_states)
            dk = matmul(key_shape, (r_ts.transpose((1, 0)), d_hs)).astype(bf16)
            plgpu.barrier_wait(first)
            # Reductions share one scratch area: only this warpgroup may use them.
            for start in range(0, key_dim, 64):
                columns = pl.ds(start, 64)
                products = [
                    plgpu.load(d_hs.at[pl.ds(i, 64), columns], layout=WGMMA).astype(f32)
                    * plgpu.load(hs.at[pl.ds(i, 64), columns], layout=WGMMA).astype(f32)
                    for i in range(0, block, 64)
                ]
                d_decay.at[partial, chunk, columns][...] = jnp.sum(sum(products), axis=0)
            plgpu.commit_smem()
            stage(d_hs.at[pl.ds(0, CHUNK)], dk, dk_tail.at[partial, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == 3)
        def _():
            load(v.at[row, rows, head, values], vs, with_values)
            load(w.at[row, rows, head, values], ws, with_values)
            load(u_t.at[index, chunk, values], u_ts, with_values)
            load(y_t.at[index, chunk], y_ts, with_values)
            plgpu.barrier_wait(first)
            dz = matmul(value_shape, *((part, d_rs) for part in inverse()))
            plgpu.barrier_wait(with_values)
            for start in range(0, block, 64):
                columns = pl.ds(start, 64)
                dz_part = dz[:, start : start + 64]
                write = plgpu.load(ws.at[:, columns], layout=WGMMA).astype(f32)
                value = plgpu.load(vs.at[:, columns], layout=WGMMA).astype(f32)
                vs.at[:, columns][...] = (dz_part * write).astype(bf16)
                ws.at[:, columns][...] = (dz_part * value).astype(bf16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(vs, dv.at[row, rows, head, values])
            plgpu.copy_smem_to_gmem(ws, dw.at[row, rows, head, values])
            dz16 = dz.astype(bf16)

            def erase(accumulator):
                accumulator.add(dz16, u_ts)
                plgpu.barrier_wait(with_e)
                accumulator.add(es, y_ts)
                return accumulator.get()

            pairs = below_diagonal(-mosaic.with_accumulators(erase, square))
            stage(dt_tile, pairs.astype(bf16), dt.at[partial, chunk])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def out(dtype, *shape):
        return jax.ShapeDtypeStruct((blocks * batch * heads, *shape), dtype)

    key_tile, value_tile = tile(key_shape, bf16), tile(value_shape, bf16)
    *partials, dv, dw = plgpu.kernel(
        chunk_backward_kernel,
        out_type=(
            *(out(bf16, length, key_dim),) * 3,
            *(out(bf16, chunks, *square),) * 2,
            out(f32, length),
            out(f32, chunks, key_dim),
            *(jax.ShapeDtypeStruct(v.shape, bf16),) * 2,
        ),
        grid=(chunks * blocks, batch, heads),
        grid_names=("c", "b", "h"),
        num_threads=4,
        thread_name="wg",
        scratch_types=[
            plgpu.RefUnion((value_tile,), (key_tile,)),
            tile((block, CHUNK), bf16),
            value_tile,
            tile((block, key_dim), bf16),
            tile((block, key_dim), bf16),
            tile((block, CHUNK), bf16),
            tile((key_dim, CHUNK), bf16),
            tile(square, jnp.float16),
            value_tile,
            value_tile,
            key_tile,
            tile(square, bf16),
            tile(square, bf16),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
        compiler_params=mosaic.COMPILER_PARAMS,
    )(
        *(d_o, r_t, d_r, states, d_states, u_t, y_t, x, v, w),
        *(() if masks is None else (masks.segment, masks.segment)),
    )
    if blocks > 1:
        partials = [
            jnp.sum(y.reshape(blocks, -1, *y.shape[1:]), 0, dtype=f32).astype(y.dtype)
            for y in partials
        ]
    return *partials, dv, dw
