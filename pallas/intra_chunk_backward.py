"""Backward of a chunk's pair products and decays (paper eqs. 67-82).

Each warpgroup owns 32 channels of one chunk and head. With reference rows a in the middle of
16-row blocks, as in the forward, the three sums over pairs are matrix products:

    dk_s = exp(a - G_s) (dT^T [e exp(G - a)] + dAqk^T [q exp(G - a)])    a in r's block
    de_r = exp(G_r - a) dT [k exp(a - G)]    dq_r = exp(G_r - a) dAqk [k exp(a - G)]    a in s's

The gradient of g sums what depends on each G over the rows below. dAqk comes without its diagonal:
those pairs do not decay, and their share of dg is zero only until it is rounded.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas import mosaic
from pallas.intra_chunk_forward import CLAMP, LOG2_E, UNDERFLOW
from pallas.mosaic import CHUNK, COLUMNS, ROWS, WGMMA, matmul, split, tile

_CHANNELS = 32
_BLOCK = 16
_PADDED = _CHANNELS + 8  # floats in a row of G, so that a column's rows lie in different banks


def intra_chunk_backward(
    q, k, g, b, dq_gamma, dk_tail, de_gamma, da_qk, dt, diagonal, d_decay, clamped, masks, *, scale
):
    """Computes the gradients of the key side.

    Args:
      q: [B, T, H, K] bf16.
      k: [B, T, H, K] bf16.
      g: [B, T, H, K] fp32.
      b: [B, T, H, K] bf16.
      dq_gamma: [BH, T, K] bf16, as the next six from `chunk_backward`.
      dk_tail: [BH, T, K] bf16.
      de_gamma: [BH, T, K] bf16.
      da_qk: [BH, N, 64, 64] bf16, zero on and above the diagonal.
      dt: [BH, N, 64, 64] bf16, zero on and above the diagonal.
      diagonal: [BH, T] fp32.
      d_decay: [BH, N, K] fp32, zero where the chunk's decay is masked.
      clamped: [BH, N] int32, from `intra_chunk_forward`.
      masks: None, or `Masks` of the segments.
      scale: factor on q.

    Returns:
      dq, dk, dg and db [B, T, H, K]: bf16, dg fp32.
    """
    batch, length, heads, key_dim = q.shape
    chunks = length // CHUNK
    shape = (CHUNK, _CHANNELS)
    bf16, f32 = jnp.bfloat16, jnp.float32

    def intra_chunk_backward_kernel(*refs):
        q, k, g, b, dq_gamma, dk_tail, de_gamma, da_qk, dt, diagonal, d_decay, clamped, *refs = refs
        lower_triangle, *refs = refs
        if masks is not None:
            reads, writes, *refs = refs
        dq_out, dk_out, dg_out, db_out, *refs = refs
        qs, ks, bs, g_area, dqs, dks, des, q_parts, sums, das, dts, *refs = refs
        triangle, d_decays, with_g, with_keys, with_gradients, with_pairs, with_triangle, *refs = (
            refs
        )
        (reloaded,) = refs
        gs, parts = g_area
        row, head, chunk = (lax.axis_index(name) for name in ("b", "h", "c"))
        wg = lax.axis_index("wg")
        rows, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(wg * _CHANNELS, _CHANNELS)
        index = row * heads + head
        place = (row, rows, head, channels)
        # The stride of `sums` admits 8 columns at a time.
        pieces = [(wg, slice(None), pl.ds(start, 8)) for start in range(0, _CHANNELS, 8)]

        plgpu.copy_gmem_to_smem(g.at[place], gs.at[wg], with_g.at[wg])
        for source, target in ((k, ks), (b, bs), (q, qs)):
            plgpu.copy_gmem_to_smem(source.at[place], target.at[wg], with_keys.at[wg])

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(lower_triangle, triangle, with_triangle)
            plgpu.copy_gmem_to_smem(dt.at[index, chunk], dts, with_pairs)
            plgpu.copy_gmem_to_smem(da_qk.at[index, chunk], das, with_pairs)
            plgpu.copy_gmem_to_smem(d_decay.at[index, chunk], d_decays, with_pairs)

        for source, target in ((de_gamma, des), (dq_gamma, dqs), (dk_tail, dks)):
            plgpu.copy_gmem_to_smem(
                source.at[index, rows, channels], target.at[wg], with_gradients.at[wg]
            )

        def load(ref):
            return plgpu.load(ref.at[wg], layout=WGMMA).astype(f32)

        def store_parts(ref, value):
            for i, part in enumerate(split(value)):
                ref.at[wg, i][...] = part

        def cumulate(limit):
            """Running sums of g over rows, in log2 units: kept in `sums`, and returned."""
            value = jnp.maximum(plgpu.load(gs.at[wg], layout=WGMMA), limit) * LOG2_E
            plgpu.commit_smem()
            store_parts(parts, value)
            plgpu.commit_smem()
            total = matmul(shape, *((triangle, parts.at[wg, i]) for i in range(2)))
            for start, piece in zip(range(0, _CHANNELS, 8), pieces):
                sums.at[piece][...] = total[:, start : start + 8]
            plgpu.commit_smem()
            return total

        def sums_at(i):
            at = sums.at[wg, i, pl.ds(0, _CHANNELS)]
            return mosaic.over_rows(plgpu.load(at, layout=COLUMNS, optimized=False), shape)

        def reference(i):
            return sums_at(_BLOCK * i + _BLOCK // 2 - 1)

        plgpu.barrier_wait(with_g.at[wg])
        plgpu.barrier_wait(with_triangle)
        total = cumulate(CLAMP)
        ri = mosaic.indices(shape, 0)
        references = [reference(i) for i in range(4)]
        own = jnp.where(
            ri < 32,
            jnp.where(ri < 16, references[0], references[1]),
            jnp.where(ri < 48, references[2], references[3]),
        )
        up, down = jnp.exp2(total - own), jnp.exp2(own - total)
        plgpu.barrier_wait(with_keys.at[wg])
        keys = load(ks)
        store_parts(parts, keys * load(bs) * up)
        store_parts(q_parts, load(qs) * scale * up)
        plgpu.commit_smem()
        plgpu.barrier_wait(with_pairs)

        dk_pairs = None
        for first in range(0, 4, 2):

            def by_column(*accumulators, first=first):
                for i, accumulator in enumerate(accumulators, first):
                    block = pl.ds(_BLOCK * i, _BLOCK)
                    for part in range(2):
                        accumulator.add(dts.at[block].transpose((1, 0)), parts.at[wg, part, block])
                        accumulator.add(
                            das.at[block].transpose((1, 0)), q_parts.at[wg, part, block]
                        )
                return sum(
                    jnp.exp2(jnp.minimum(reference(i) - total, 120.0))
                    * accumulator.get(4 * (first + 1 - i))
                    for i, accumulator in enumerate(accumulators, first)
                )

            pair = mosaic.with_accumulators(by_column, shape, shape)
            dk_pairs = pair if dk_pairs is None else dk_pairs + pair

        plgpu.commit_smem()  # every warp is done with the parts of e
        store_parts(parts, keys * down)
        plgpu.commit_smem()
        de = dq = None
        for i in range(4):

            def by_row(for_e, for_q, i=i):
                block = pl.ds(_BLOCK * i, _BLOCK)
                for part in range(2):
                    for_e.add(dts.at[:, block], parts.at[wg, part, block])
                    for_q.add(das.at[:, block], parts.at[wg, part, block])
                return for_e.get(), for_q.get()

            de_block, dq_block = mosaic.with_accumulators(by_row, shape, shape)
            factor = jnp.exp2(jnp.minimum(total - reference(i), 120.0))
            de = factor * de_block if de is None else de + factor * de_block
            dq = factor * dq_block if dq is None else dq + factor * dq_block

        plgpu.commit_smem()  # every warp is done with the parts of k

        @pl.when(clamped[index, chunk] > 0)
        def _():
            plgpu.copy_gmem_to_smem(g.at[place], gs.at[wg], reloaded.at[wg])
            plgpu.barrier_wait(reloaded.at[wg])
            cumulate(UNDERFLOW)

        plgpu.barrier_wait(with_gradients.at[wg])
        total = jnp.concatenate(
            [plgpu.load(sums.at[piece], layout=WGMMA, optimized=False) for piece in pieces], axis=1
        )
        gamma, tail = jnp.exp2(total), jnp.exp2(sums_at(CHUNK - 1) - total)
        if masks is not None:
            mask = [
                plgpu.load(x.at[row, rows], layout=ROWS, optimized=False) for x in (reads, writes)
            ]
            gamma *= mosaic.over_columns(mask[0], shape)
            tail *= mosaic.over_columns(mask[1], shape)
        de += gamma * load(des)
        dq += gamma * load(dqs)
        d_tail = tail * load(dks)
        keys, gates, queries = load(ks), load(bs), load(qs) * scale
        d_sums = queries * dq + keys * gates * de - keys * dk_pairs
        store_parts(q_parts, d_sums)
        store_parts(parts, keys * d_tail)
        on_diagonal = mosaic.over_columns(
            plgpu.load(diagonal.at[index, rows], layout=ROWS, optimized=False), shape
        )
        dqs[wg] = ((dq + on_diagonal * keys) * scale).astype(bf16)
        dks[wg] = (dk_pairs + d_tail + gates * de + on_diagonal * queries).astype(bf16)
        des[wg] = (keys * de).astype(bf16)
        plgpu.commit_smem()
        for source, target in ((dqs, dq_out), (dks, dk_out), (des, db_out)):
            plgpu.copy_smem_to_gmem(source.at[wg], target.at[place])
        # The sum over the rows above, the row itself left out.
        dg = matmul(
            shape,
            *((triangle.transpose((1, 0)), q_parts.at[wg, i]) for i in range(2)),
            *((triangle, parts.at[wg, i]) for i in range(2)),
        ) - sum(part.astype(f32) for part in split(keys * d_tail))
        d_end = plgpu.load(d_decays.at[channels], layout=COLUMNS, optimized=False)
        dg += jnp.exp2(sums_at(CHUNK - 1)) * mosaic.over_rows(d_end, shape)
        plgpu.commit_smem()
        gs[wg] = dg
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(gs.at[wg], dg_out.at[place])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    warpgroups = key_dim // _CHANNELS
    channels_tile = tile((warpgroups, *shape), bf16, 2 * _CHANNELS)
    parts_tile = tile((warpgroups, 2, *shape), bf16, 2 * _BLOCK)
    pairs_tile = tile((CHUNK, CHUNK), bf16, 2 * _BLOCK)
    per_warpgroup = {"num_barriers": warpgroups}
    return plgpu.kernel(
        intra_chunk_backward_kernel,
        out_type=tuple(jax.ShapeDtypeStruct(q.shape, dtype) for dtype in (bf16, bf16, f32, bf16)),
        grid=(chunks, batch, heads),
        grid_names=("c", "b", "h"),
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=[
            channels_tile,
            channels_tile,
            channels_tile,
            plgpu.RefUnion(
                tile((warpgroups, *shape), f32),
                parts_tile,
            ),
            channels_tile,
            channels_tile,
            channels_tile,
            parts_tile,
            plgpu.SMEM((warpgroups, CHUNK, _PADDED), f32),
            pairs_tile,
            pairs_tile,
            pairs_tile,
            plgpu.SMEM((key_dim,), f32),
            plgpu.Barrier(num_arrivals=1, **per_warpgroup),
            plgpu.Barrier(num_arrivals=3, **per_warpgroup),
            plgpu.Barrier(num_arrivals=3, **per_warpgroup),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=1, **per_warpgroup),
        ],
        compiler_params=mosaic.COMPILER_PARAMS,
    )(
        *(q, k, g, b, dq_gamma, dk_tail, de_gamma, da_qk, dt, diagonal, d_decay, clamped),
        jnp.tril(jnp.ones((CHUNK, CHUNK), bf16)),
        *(() if masks is None else (masks.reads, masks.writes)),
    )
