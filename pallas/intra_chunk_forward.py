"""Everything inside a chunk that needs no state: one warpgroup for each chunk and key head.

With G the running sum of the log-decay, e = b * k, z = w * v (spec: arXiv 2605.22791, eqs. 18-25):

    T = stril(e exp(G_r - G_s) k^T)    X = (I + T)^-T    Aqk = tril(q exp(G_r - G_s) k^T)
    Qg = q exp(G)    Kt = k exp(G_C - G)    Y = (I + T)^-1 (e exp(G))    U = (I + T)^-1 z

Pair products are formed in blocks of 16 rows around a reference row in their middle, so that both
factors of exp(G_r - a) exp(a - G_s) stay in range; operands are split in two bf16 parts. For that,
log-decays below `CLAMP` count as `CLAMP` in T and Aqk, which changes no pair's weight by more than
exp(-10) = 4.5e-5. The state's path (Qg, Kt, Y's decay, gamma_C) uses the true ones.
"""

import itertools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas import mosaic
from pallas.mosaic import CHUNK, COLUMNS, ROWS, WGMMA, matmul, split, tile

CLAMP = -10.0
"""Smallest log-decay of a token between the tokens of a chunk."""

UNDERFLOW = -100.0
"""exp of this is 0 in fp32, and a chunk's sum of it is still finite."""

LOG2_E = math.log2(math.e)

BLOCK = 16
"""Rows of a chunk that share a reference row: their pairs' decays are bounded by the clamp."""

_MIDDLE = BLOCK // 2 - 1
_BLOCK_LAYOUT = plgpu.Layout.MMA_ACC(jnp.float16, m_warps=1)
_SCAN_UNROLL = 8


def intra_chunk_forward(q, k, v, g, b, w, masks, *, scale: float, save: bool):
    """Computes a chunk's operands for the pass over states.

    Args:
      q: [B, T, H, K] bf16, T a multiple of 64, K 64 or 128; also `k` and `b`.
      k: keys.
      v: [B, T, H, V] bf16, V a multiple of 64; also `w`.
      g: [B, T, H, K] fp32, <= 0.
      b: erase gate.
      w: write gate.
      masks: None, or `Masks` of the segments.
      scale: factor on q.
      save: also return what only the backward needs.

    Returns:
      y_t [BH, N, K, 64], u_t [BH, N, V, 64], k_tail and q_gamma [BH, T, K], a_qk_t
      [BH, N, 64, 64] in bf16, the decay of a whole chunk [BH, N, K] in fp32; and, or None, X in two
      parts [BH, N, 2, 64, 64] in bf16 and the decays from each block's middle row to the next
      one's [BH, N, 3, K] in fp32, of clamped gates.
    """
    batch, length, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    chunks = length // CHUNK
    value_block = 128 if value_dim % 128 == 0 else 64
    # A row of g, one channel a thread; 64 channels do not fill the 128 threads.
    scan_layout = plgpu.Layout.WG_STRIDED((128,), vec_size=1) if key_dim == 128 else COLUMNS
    halves = [pl.ds(start, 64) for start in range(0, key_dim, 64)]

    def intra_chunk_forward_kernel(*refs):
        q, k, v, g, b, w, *refs = refs
        if masks is not None:
            row_segment, column_segment, reads, writes, *refs = refs
        y_t, u_t, k_tail, q_gamma, a_qk_t, decay, *refs = refs
        if save:
            x_out, steps, *refs = refs
        (g_area, q_area, ks, bs, high, low, x_area, loaded, loaded_values, reloaded) = refs
        (gs,), (vs, ws), (_, a_qk_tile) = g_area
        (qs,), (y_tile,), (u_tile,) = q_area
        (xs, ps), (x_high, x_low) = x_area
        row = lax.axis_index("b")
        head = lax.axis_index("h")
        chunk = lax.axis_index("c")
        rows = pl.ds(chunk * CHUNK, CHUNK)
        index = row * heads + head

        plgpu.copy_gmem_to_smem(g.at[row, rows, head], gs, loaded)
        for source, target in ((k, ks), (b, bs), (q, qs)):
            plgpu.copy_gmem_to_smem(source.at[row, rows, head], target, loaded)
        plgpu.barrier_wait(loaded)

        def scan(limit):
            """Sums gs over rows in place (in log2 units); the unclamped sum and the lowest gate."""

            def step(j, carry):
                total, true_total, lowest = carry
                # Loads first: a store to the same tile would hold them up.
                values = [
                    plgpu.load(gs.at[j * _SCAN_UNROLL + i], layout=scan_layout)
                    for i in range(_SCAN_UNROLL)
                ]
                for i, value in enumerate(values):
                    value = jnp.maximum(value, UNDERFLOW)
                    lowest = jnp.minimum(lowest, value)
                    true_total += value * LOG2_E
                    total += jnp.maximum(value, limit) * LOG2_E
                    gs[j * _SCAN_UNROLL + i] = total
                return total, true_total, lowest

            zero = plgpu.layout_cast(jnp.zeros((key_dim,), jnp.float32), scan_layout)
            return lax.fori_loop(0, CHUNK // _SCAN_UNROLL, step, (zero,) * 3)

        _, total, lowest = scan(CLAMP)
        decay.at[index, chunk][...] = jnp.exp2(total)
        # A reduction over the layout that 64 channels need hangs: those always scan again.
        below = jnp.max(-lowest) > -CLAMP if key_dim == 128 else head >= 0
        plgpu.commit_smem()
        if save:
            middles = [
                plgpu.load(gs.at[BLOCK * i + _MIDDLE], layout=scan_layout)
                for i in range(CHUNK // BLOCK)
            ]
            for i, (before, after) in enumerate(itertools.pairwise(middles)):
                steps.at[index, chunk, i][...] = jnp.exp2(after - before)

        accumulated = []
        for i in range(CHUNK // BLOCK):
            if i:
                plgpu.commit_smem()  # a wait for wgmma covers one warp; the tile is everybody's
            block = pl.ds(BLOCK * i, BLOCK)
            middle = BLOCK * i + _MIDDLE

            def load_block(ref, block=block):
                return plgpu.load(ref.at[block], layout=_BLOCK_LAYOUT, optimized=False)

            reference = plgpu.load(gs.at[middle], layout=_BLOCK_LAYOUT.reduce(0), optimized=False)
            factor = jnp.exp2(load_block(gs) - mosaic.over_rows(reference, (BLOCK, key_dim)))
            e = load_block(ks).astype(jnp.float32) * load_block(bs).astype(jnp.float32) * factor
            scaled_q = load_block(qs).astype(jnp.float32) * factor * scale
            for value, offset in ((e, 0), (scaled_q, BLOCK)):
                value_high, value_low = split(value)
                high.at[pl.ds(offset, BLOCK)][...] = value_high
                low.at[pl.ds(offset, BLOCK)][...] = value_low
            plgpu.commit_smem()

            def products(accumulator, middle=middle):
                for half in halves:
                    reference = plgpu.load(gs.at[middle, half], layout=COLUMNS, optimized=False)
                    sums = plgpu.load(gs.at[:, half], layout=WGMMA, optimized=False)
                    # Rows of later blocks overflow; the triangular selection drops them.
                    factor = jnp.exp2(
                        jnp.minimum(mosaic.over_rows(reference, (CHUNK, 64)) - sums, 120.0)
                    )
                    keys = plgpu.load(ks.at[:, half], layout=WGMMA).astype(jnp.float32)
                    k_high, k_low = split(factor * keys)
                    accumulator.add(k_high, high.at[:, half].transpose((1, 0)))
                    accumulator.add(k_high, low.at[:, half].transpose((1, 0)))
                    accumulator.add(k_low, high.at[:, half].transpose((1, 0)))
                return accumulator.get()

            accumulated.append(mosaic.with_accumulators(products, (CHUNK, 2 * BLOCK)))
        ri = mosaic.indices((CHUNK, CHUNK), 0)
        ci = mosaic.indices((CHUNK, CHUNK), 1)
        erase = jnp.concatenate([x[:, :BLOCK] for x in accumulated], axis=1)
        read = jnp.concatenate([x[:, BLOCK:] for x in accumulated], axis=1)
        erase = jnp.where(ri < ci, erase, 0.0)
        read = jnp.where(ri <= ci, read, 0.0)
        if masks is not None:
            same = mosaic.over_columns(
                plgpu.load(row_segment.at[row, rows], layout=ROWS, optimized=False), (CHUNK, CHUNK)
            ) == mosaic.over_rows(
                plgpu.load(column_segment.at[row, rows], layout=COLUMNS, optimized=False),
                (CHUNK, CHUNK),
            )
            erase = jnp.where(same, erase, 0.0)
            read = jnp.where(same, read, 0.0)

        @pl.when(below)
        def _():
            plgpu.commit_smem()
            plgpu.copy_gmem_to_smem(g.at[row, rows, head], gs, reloaded)
            plgpu.barrier_wait(reloaded)
            scan(UNDERFLOW)
            plgpu.commit_smem()

        if masks is not None:
            reads_mask, writes_mask = (
                mosaic.over_columns(
                    plgpu.load(x.at[row, rows], layout=ROWS, optimized=False), (CHUNK, 64)
                )
                for x in (reads, writes)
            )
        for half in halves:
            sums = plgpu.load(gs.at[:, half], layout=WGMMA, optimized=False)
            gamma = jnp.exp2(sums)
            keys = plgpu.load(ks.at[:, half], layout=WGMMA).astype(jnp.float32)
            end = plgpu.load(gs.at[CHUNK - 1, half], layout=COLUMNS, optimized=False)
            tail = jnp.exp2(mosaic.over_rows(end, (CHUNK, 64)) - sums)
            if masks is not None:
                gamma, tail = gamma * reads_mask, tail * writes_mask
            gates = plgpu.load(bs.at[:, half], layout=WGMMA).astype(jnp.float32)
            queries = plgpu.load(qs.at[:, half], layout=WGMMA).astype(jnp.float32)
            bs.at[:, half][...] = (gamma * keys * gates).astype(jnp.bfloat16)
            qs.at[:, half][...] = (gamma * scale * queries).astype(jnp.bfloat16)
            ks.at[:, half][...] = (tail * keys).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(qs, q_gamma.at[index, rows])
        plgpu.copy_smem_to_gmem(ks, k_tail.at[index, rows])

        def load_values(start):
            for source, target in ((v, vs), (w, ws)):
                columns = pl.ds(start, value_block)
                plgpu.copy_gmem_to_smem(source.at[row, rows, head, columns], target, loaded_values)

        load_values(0)
        # The inverse of I + T^T (unit upper triangular) by doubling its diagonal blocks.
        x = jnp.where(ri == ci, 1.0, 0.0) - jnp.where((ri >> 1) == (ci >> 1), erase, 0.0)
        for level in range(1, 6):
            size = 1 << level
            corner = ((ci & size) > 0) & ((ri >> level) == (ci >> level) - 1)
            x16 = x.astype(jnp.float16)
            xs[...] = x16
            plgpu.commit_smem()
            product = matmul(
                (CHUNK, CHUNK), (jnp.where(corner, erase, 0.0).astype(jnp.float16), xs)
            )
            ps[...] = product.astype(jnp.float16)
            plgpu.commit_smem()
            x = x - matmul((CHUNK, CHUNK), (x16, ps))
        plgpu.commit_smem()
        x_high[...], x_low[...] = split(x)
        plgpu.wait_smem_to_gmem(1)  # q_gamma has left the area that y_tile takes
        for start in range(0, value_dim, value_block):
            if start:
                load_values(start)
            plgpu.barrier_wait(loaded_values)
            z = plgpu.load(vs, layout=WGMMA).astype(jnp.float32)
            z *= plgpu.load(ws, layout=WGMMA).astype(jnp.float32)
            vs[...] = z.astype(jnp.bfloat16)
            plgpu.commit_smem()
            if not start:
                a_qk_tile[...] = read.astype(jnp.bfloat16)
                e_t = bs.transpose((1, 0))
                y = matmul((key_dim, CHUNK), (e_t, x_high), (e_t, x_low))
                y_tile[...] = y.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(a_qk_tile, a_qk_t.at[index, chunk])
                if save:
                    for i, part in enumerate((x_high, x_low)):
                        plgpu.copy_smem_to_gmem(part, x_out.at[index, chunk, i])
                plgpu.copy_smem_to_gmem(y_tile, y_t.at[index, chunk])
            z_t = vs.transpose((1, 0))
            u = matmul((value_block, CHUNK), (z_t, x_high), (z_t, x_low))
            plgpu.wait_smem_to_gmem(0)
            u_tile[...] = u.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(u_tile, u_t.at[index, chunk, pl.ds(start, value_block)])
            plgpu.wait_smem_to_gmem(0)

    def out(dtype, *shape):
        return jax.ShapeDtypeStruct((batch * heads, *shape), dtype)

    bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32
    square = (CHUNK, CHUNK)
    key_tile, value_tile = tile((CHUNK, key_dim), bf16), tile((CHUNK, value_block), bf16)
    results = plgpu.kernel(
        intra_chunk_forward_kernel,
        out_type=(
            out(bf16, chunks, key_dim, CHUNK),
            out(bf16, chunks, value_dim, CHUNK),
            out(bf16, length, key_dim),
            out(bf16, length, key_dim),
            out(bf16, chunks, *square),
            out(f32, chunks, key_dim),
            *([out(bf16, chunks, 2, *square), out(f32, chunks, 3, key_dim)] if save else []),
        ),
        grid=(chunks, batch, heads),
        grid_names=("c", "b", "h"),
        scratch_types=[
            plgpu.RefUnion(
                (plgpu.SMEM((CHUNK, key_dim), f32),),
                (value_tile, value_tile),
                (value_tile, tile(square, bf16)),
            ),
            plgpu.RefUnion(
                (key_tile,), (tile((key_dim, CHUNK), bf16),), (tile((value_block, CHUNK), bf16),)
            ),
            key_tile,
            key_tile,
            tile((2 * BLOCK, key_dim), bf16),
            tile((2 * BLOCK, key_dim), bf16),
            plgpu.RefUnion((tile(square, f16),) * 2, (tile(square, bf16),) * 2),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(),
        ],
        compiler_params=mosaic.COMPILER_PARAMS,
    )(
        q,
        k,
        v,
        g,
        b,
        w,
        *(() if masks is None else (masks.segment, masks.segment, masks.reads, masks.writes)),
    )
    return results if save else (*results, None, None)
