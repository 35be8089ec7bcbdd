"""Everything inside a chunk that needs no state: one warpgroup for each chunk and key head.

With G the running sum of the log-decay, e = b * k, z = w * v (spec: arXiv 2605.22791, eqs. 18-25):

    T = stril(e exp(G_r - G_s) k^T)    X = (I + T)^-T    Aqk = tril(q exp(G_r - G_s) k^T)
    Qg = q exp(G)    Kt = k exp(G_C - G)    Y = (I + T)^-1 (e exp(G))    U = (I + T)^-1 z

Pair products are formed in blocks of 16 rows, relative to where the block begins: with P the sum of
g from there, 2^(P_r + c) and 2^(-c - P_s) both stay in range for every g, because log-decays below
`CLAMP` count as `CLAMP` in T and Aqk, which changes no pair's weight by more than 2^-12 = 2.4e-4. The
constant c centres the range. Neither factor looks at later rows, so that no bit of an output does.
Keys of earlier blocks move on by a block's decay, in two factors of 8 rows each: one alone would
underflow where the pair it belongs to does not. The state's path (Qg, Kt, Y's decay, gamma_C) uses
the true log-decays.

Where all channels of a head decay alike, the weight of a pair is one number: T and Aqk are k k^T and
q k^T times a matrix of weights, with no block, no clamp and no move.

A product with a masked zero keeps NaN and infinity. With segments, the kernel therefore replaces
such values by zero and counts them in each row.
"""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32

from gdn2_jax.pallas import mosaic
from gdn2_jax.pallas.mosaic import CHUNK, COLUMNS, matmul, split, tile
from gdn2_jax.pallas.segments import Masks

CLAMP = -12.0
"""Smallest log2 of a token's decay between the tokens of a chunk; bf16 holds it exactly."""

UNDERFLOW = -100.0
"""exp of this is 0 in fp32, and a chunk's sum of it is still finite."""

LOG2_E = math.log2(math.e)

BLOCK = 16
"""Rows of a chunk whose sums of g start together; the clamp bounds them."""

HALF = BLOCK // 2
"""Rows whose decays one factor can hold beside an operand in fp32."""

_CENTRE = -CLAMP * HALF
_STEPS = (CHUNK - BLOCK) // HALF
_PIECE = 32
_SWIZZLE = 2 * _PIECE


def sum_matrices() -> BFloat16[Array, "3 64 64"]:
    """Sums over the rows up to each row, over those rows in its block, and over the later rows."""
    block = jnp.arange(CHUNK) // BLOCK
    up_to = jnp.tril(jnp.ones((CHUNK, CHUNK), jnp.bfloat16))
    return jnp.stack([up_to, jnp.where(block[:, None] == block, up_to, 0), 1 - up_to])


def sums_in_chunks(g: Float32[Array, "B H T"]) -> Float32[Array, "B H N 2 64"]:
    """Base-2 log-decays of a head, summed up to each row of a chunk and over the later rows."""
    g = jnp.maximum(g, UNDERFLOW) * LOG2_E
    up_to = jnp.tri(CHUNK, dtype=g.dtype)
    chunks = g.reshape(*g.shape[:2], -1, CHUNK)
    return jnp.einsum("bhns,irs->bhnir", chunks, jnp.stack([up_to, 1 - up_to]), precision="highest")


@mosaic.on_cuda
def intra_chunk_forward(
    q: BFloat16[Array, "B T H K"],
    k: BFloat16[Array, "B T H K"],
    v: BFloat16[Array, "B T H V"],
    g: Float32[Array, "B T H K"] | Float32[Array, "B H N 2 64"],
    b: BFloat16[Array, "B T H K"] | Float32[Array, "B H T"],
    w: BFloat16[Array, "B T H V"] | Float32[Array, "B H T"],
    masks: Masks | None,
    *,
    scale: float,
    save: bool,
) -> tuple[
    BFloat16[Array, "BH N K 64"],
    BFloat16[Array, "BH N V 64"],
    BFloat16[Array, "BH T K"],
    BFloat16[Array, "BH T K"],
    BFloat16[Array, "BH N 64 64"],
    Float32[Array, "BH N K"] | None,
    BFloat16[Array, "BH N 2 64 64"] | None,
    Float32[Array, "BH N 6 K"] | None,
    Float32[Array, "BH T"] | None,
]:
    """Computes a chunk's operands for the pass over states.

    K is 64 or 128; T and V are multiples of 64; the log-decay g is <= 0. A gate b or w has a number
    for each channel, or one for all channels of a head, which is not read again for each. Beside such
    a b, g may be the `sums_in_chunks` of one log-decay a head. `scale` is a factor on q, `masks` are
    those of the segments, and `save` also returns what only the backward needs.

    Returns:
      Y^T, U^T, Kt, Qg, Aqk^T and the decay of a whole chunk; or None, X in two parts and the clamped
      decays of the halves of all blocks but the last; or None, without masks, the number of elements
      that are not finite in each row. Decays are None, too, and gates are not counted, where all
      channels of a head decay alike.
    """
    batch, length, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    chunks = length // CHUNK
    key_side = (batch, chunks * CHUNK, heads, key_dim)
    value_side = (*key_side[:3], value_dim)
    scalar_b, scalar_w = (mosaic.is_scalar(x) for x in (b, w))
    scalar_g = scalar_b and g.shape != key_side
    mosaic.check_shapes(
        q=(q, key_side),
        k=(k, key_side),
        g=(g, (batch, heads, chunks, 2, CHUNK) if scalar_g else key_side),
        b=(b, mosaic.gate_shape(b, key_side)),
        v=(v, value_side),
        w=(w, mosaic.gate_shape(w, value_side)),
    )
    value_block = 128 if value_dim % 128 == 0 else 64
    # A row of g, one channel a thread; 64 channels do not fill the 128 threads.
    row_layout = plgpu.Layout.WG_STRIDED((128,), vec_size=1) if key_dim == 128 else COLUMNS
    pieces = range(key_dim // _PIECE)
    shape, square = (CHUNK, _PIECE), (CHUNK, CHUNK)
    bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32
    at_least = mosaic.at_least if masks is None else mosaic.known_at_least

    def intra_chunk_forward_kernel(
        *refs,
        g_union,
        q_union,
        ks,
        bs,
        x_union,
        loaded,
        loaded_values,
        steps_tile: Any = None,
        flaws_tile: Any = None,
    ):
        q, k, v, g, b, w, *refs = refs
        nothing: Any = None
        if scalar_g:
            sums, (column_g, column_b, *refs) = nothing, refs
        else:
            sums, *refs = refs
        if masks is not None:
            row_segment, column_segment, reads, writes, *refs = refs
        y_t, u_t, k_tail, q_gamma, a_qk_t, *refs = refs
        decay, *refs = (nothing, *refs) if scalar_g else refs
        if save:
            x_out, *refs = refs
            steps, *refs = (nothing, *refs) if scalar_g else refs
        if masks is not None:
            (flaws,) = refs
        *g_areas, (vs, *ws), (_, a_qk_tile) = g_union
        (qs,), (y_tile,), (u_tile,) = q_union
        *sum_tiles, (xs, ps), (x_high, x_low) = x_union
        row, head, chunk = (lax.axis_index(name) for name in ("b", "h", "c"))
        rows = pl.ds(chunk * CHUNK, CHUNK)
        index = row * heads + head

        def without_flaws(*values):
            """The values, all zero where one is not finite, and the number of those in each row."""
            finite = jnp.abs(sum(values)) < jnp.inf
            values = [jnp.where(finite, value, jnp.float32(0)) for value in values]
            return *values, jnp.sum(jnp.where(finite, jnp.float32(0), jnp.float32(1)), axis=1)

        def load_keys():
            for source, target in ((k, ks), *(() if scalar_b else ((b, bs),)), (q, qs)):
                plgpu.copy_gmem_to_smem(source.at[row, rows, head], target, loaded)

        def row_masks() -> Any:
            """Of what reads the incoming state, and of what writes to the outgoing one."""
            if masks is None:
                return None, None
            return (mosaic.load_scalars(x.at[row, rows], shape) for x in (reads, writes))

        def store_keys():
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(qs, q_gamma.at[index, rows])
            plgpu.copy_smem_to_gmem(ks, k_tail.at[index, rows])

        def pairs_by_channel():
            """Sums over pairs, in blocks of 16 columns, and what is not finite in each row."""
            (gs,), (parts,) = g_areas
            for p in pieces:
                columns = pl.ds(p * _PIECE, _PIECE)
                plgpu.copy_gmem_to_smem(g.at[row, rows, head, columns], gs.at[p], loaded)
            load_keys()
            plgpu.copy_gmem_to_smem(sums, sum_tiles[0][0], loaded)

            # Meanwhile, channel by channel: decays of the whole chunk and of the halves of blocks.
            total, clamped, halves = 0.0, 0.0, []
            for r in range(CHUNK):
                at = g.at[row, chunk * CHUNK + r, head]
                # The first row's layout is that of all.
                value = plgpu.load(at, layout=None if r else row_layout, optimized=False)
                total += at_least(UNDERFLOW, value)
                clamped += at_least(CLAMP / LOG2_E, value)
                if (r + 1) % HALF == 0:
                    halves.append(clamped)
                    clamped = 0.0
            decay.at[index, chunk][...] = jnp.exp2(total * LOG2_E)
            for i, value in enumerate(halves[:_STEPS]):
                step = jnp.exp2(value * LOG2_E)
                steps_tile[i] = step
                if save:
                    steps.at[index, chunk, i][...] = step

            def store_parts(p, value):
                for i, part in enumerate(split(value)):
                    parts.at[p, i][...] = part
                plgpu.commit_smem()

            def sum_g(p, matrix):
                return matmul(shape, *((matrix, parts.at[p, i]) for i in range(2)))

            reads_mask, writes_mask = row_masks()
            if scalar_b:
                scalar_erase = mosaic.load_scalars(b.at[row, head, rows], shape)
            plgpu.barrier_wait(loaded)
            keys, all_flaws = [], jnp.float32(0)
            for p in pieces:
                columns = (slice(None), pl.ds(p * _PIECE, _PIECE))
                log_decay = plgpu.load(gs.at[p])
                if masks is not None:
                    known = log_decay < jnp.inf
                log_decay = at_least(UNDERFLOW, log_decay) * LOG2_E
                plgpu.commit_smem()  # the parts take the place of g
                store_parts(p, log_decay)
                gamma = jnp.exp2(sum_g(p, sum_tiles[0][0].at[0]))
                tail = jnp.exp2(sum_g(p, sum_tiles[0][0].at[2]))
                if masks is not None:
                    gamma, tail = gamma * reads_mask, tail * writes_mask
                plgpu.commit_smem()
                store_parts(p, jnp.maximum(log_decay, CLAMP))
                to_row = sum_g(p, sum_tiles[0][0].at[1]) + _CENTRE
                plgpu.commit_smem()  # every warp is done with the parts of g
                up, down = jnp.exp2(to_row), jnp.exp2(-to_row)
                key, *erase, query = (
                    plgpu.load(x.at[columns]).astype(f32)
                    for x in ((ks, qs) if scalar_b else (ks, bs, qs))
                )
                erase, query = (scalar_erase if scalar_b else erase[0]) * key, query * scale
                if masks is not None:
                    key = jnp.where(known, key, jnp.float32(jnp.nan))
                    key, erase, query, flawed = without_flaws(key, erase, query)
                    all_flaws = all_flaws + flawed
                keys.append(key * down)
                for target, value in (
                    (parts.at[p, 0], erase * up),
                    (parts.at[p, 1], query * up),
                    (bs.at[columns], erase * gamma),
                    (qs.at[columns], query * gamma),
                    (ks.at[columns], key * tail),
                ):
                    target[...] = value.astype(bf16)
            store_keys()

            strip_row = mosaic.indices(shape, 0)
            blocks = []
            for i in range(CHUNK // BLOCK):
                at = pl.ds(BLOCK * i, BLOCK)
                if i:
                    for p in pieces:
                        moved = keys[p]
                        for half in (2 * i - 2, 2 * i - 1):
                            step = steps_tile.at[half, pl.ds(p * _PIECE, _PIECE)]
                            moved *= mosaic.load_for_columns(step, shape)
                        keys[p] = jnp.where(strip_row < BLOCK * i, moved, keys[p])

                def products(for_erase, for_read, at=at):
                    for p in pieces:
                        key = keys[p].astype(bf16)
                        for_erase.add(key, parts.at[p, 0, at].transpose((1, 0)))
                        for_read.add(key, parts.at[p, 1, at].transpose((1, 0)))
                    return for_erase.get(), for_read.get()

                blocks.append(mosaic.with_accumulators(products, *((CHUNK, BLOCK),) * 2))
            return blocks, all_flaws

        def pairs_by_head():
            """Sums over pairs and what is not finite, where all channels of a head decay alike."""
            load_keys()
            to_row, from_row = (
                mosaic.load_scalars(g.at[row, head, chunk, i], shape) for i in range(2)
            )
            to_column = mosaic.load_for_columns(column_g.at[row, head, chunk, 0], square)
            erase_column = mosaic.load_for_columns(column_b.at[row, head, rows], square)
            scalar_erase = mosaic.load_scalars(b.at[row, head, rows], shape)
            reads_mask, writes_mask = row_masks()
            gamma, tail = jnp.exp2(to_row), jnp.exp2(from_row)
            if masks is not None:
                erase_column, scalar_erase = map(mosaic.finite, (erase_column, scalar_erase))
                gamma, tail = gamma * reads_mask, tail * writes_mask
            plgpu.barrier_wait(loaded)
            all_flaws = jnp.float32(0)
            for p in pieces if masks is not None else ():
                columns = (slice(None), pl.ds(p * _PIECE, _PIECE))
                key, query = (plgpu.load(x.at[columns]).astype(f32) for x in (ks, qs))
                key, query, flawed = without_flaws(key, query)
                all_flaws = all_flaws + flawed
                for target, value in ((ks, key), (qs, query)):
                    target.at[columns][...] = value.astype(bf16)
            plgpu.commit_smem()

            def products(for_erase, for_read):
                for_erase.add(ks, ks.transpose((1, 0)))
                for_read.add(ks, qs.transpose((1, 0)))
                return for_erase.get(), for_read.get()

            erase, read = mosaic.with_accumulators(products, square, square)
            plgpu.commit_smem()  # every warp is done with the keys and queries
            to_row = mosaic.load_scalars(g.at[row, head, chunk, 0], square)
            weight = jnp.exp2(jnp.minimum(to_column - to_row, 0.0))
            erase, read = erase * weight * erase_column, read * weight
            for p in pieces:
                columns = (slice(None), pl.ds(p * _PIECE, _PIECE))
                key, query = (plgpu.load(x.at[columns]).astype(f32) for x in (ks, qs))
                for target, value in (
                    (bs, scalar_erase * key * gamma),
                    (qs, query * scale * gamma),
                    (ks, key * tail),
                ):
                    target.at[columns][...] = value.astype(bf16)
            store_keys()
            return (erase, read * scale), all_flaws

        pairs, all_flaws = (pairs_by_head if scalar_g else pairs_by_channel)()
        ri, ci = mosaic.indices(square, 0), mosaic.indices(square, 1)
        erase, read = pairs if scalar_g else (jnp.concatenate(x, axis=1) for x in zip(*pairs))
        # Rows of later blocks can overflow: they are selected away, not multiplied by zero.
        erase = jnp.where(ri < ci, erase, 0.0)
        read = jnp.where(ri <= ci, read, 0.0)
        if masks is not None:
            same = mosaic.load_scalars(row_segment.at[row, rows], square) == (
                mosaic.load_for_columns(column_segment.at[row, rows], square)
            )
            erase = jnp.where(same, erase, 0.0)
            read = jnp.where(same, read, 0.0)
        plgpu.commit_smem()  # every warp is done with the parts of e and q

        def load_values(start):
            for source, target in zip((v, w), (vs, *ws)):
                columns = pl.ds(start, value_block)
                plgpu.copy_gmem_to_smem(source.at[row, rows, head, columns], target, loaded_values)

        load_values(0)
        if scalar_w:
            scalar_write = mosaic.load_scalars(w.at[row, head, rows], (CHUNK, value_block))

        # The inverse of I + T^T (unit upper triangular) by doubling its diagonal blocks.
        def invert(accumulator):
            diagonal = jnp.where(ri == ci, jnp.float32(1), jnp.float32(0))
            accumulator.set(diagonal - jnp.where((ri >> 1) == (ci >> 1), erase, 0.0))

            def double(i):
                level = i + 1
                inner = ((ci >> i) & 2) > 0
                corner = inner & ((ri >> level) == (ci >> level) - 1)
                x16 = accumulator.get().astype(f16)
                xs[...] = x16
                plgpu.commit_smem()
                corner = jnp.where(corner, erase, 0.0).astype(f16)
                product = matmul(square, (corner, xs))
                ps[...] = product.astype(f16)
                plgpu.commit_smem()
                accumulator.add(-x16, ps)
                mosaic.wait_for_products()

            mosaic.loop(5, double)
            return accumulator.get()

        x = mosaic.with_accumulators(invert, square)
        plgpu.commit_smem()
        x_high[...], x_low[...] = split(x)
        # q_gamma has left the area that y_tile takes.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        for start in range(0, value_dim, value_block):
            if start:
                load_values(start)
            plgpu.barrier_wait(loaded_values)
            z = plgpu.load(vs).astype(jnp.float32)
            z *= scalar_write if scalar_w else plgpu.load(ws[0]).astype(jnp.float32)
            if masks is not None:
                z, flawed = without_flaws(z)
                all_flaws = all_flaws + flawed
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
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            u_tile[...] = u.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(u_tile, u_t.at[index, chunk, pl.ds(start, value_block)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if masks is not None:
            flaws_tile[...] = all_flaws
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(flaws_tile, flaws.at[index, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def out(dtype, *shape):
        return jax.ShapeDtypeStruct((batch * heads, *shape), dtype)

    key_tile, value_tile = (
        tile((CHUNK, columns), bf16, _SWIZZLE) for columns in (key_dim, value_block)
    )
    g_tiles = (
        (tile((len(pieces), *shape), f32),),
        (tile((len(pieces), 2, *shape), bf16, _SWIZZLE),),
    )
    copies = (2 if scalar_b else 3) + (0 if scalar_g else len(pieces) + 1)
    results: Any = mosaic.kernel(
        intra_chunk_forward_kernel,
        out_type=(
            out(bf16, chunks, key_dim, CHUNK),
            out(bf16, chunks, value_dim, CHUNK),
            out(bf16, length, key_dim),
            out(bf16, length, key_dim),
            out(bf16, chunks, *square),
            *([] if scalar_g else [out(f32, chunks, key_dim)]),
            *([out(bf16, chunks, 2, *square)] if save else []),
            *([out(f32, chunks, _STEPS, key_dim)] if save and not scalar_g else []),
            *([] if masks is None else [out(f32, length)]),
        ),
        grid=(chunks, batch, heads),
        grid_names=("c", "b", "h"),
        scratch_types={
            "g_union": mosaic.overlaid(
                *(() if scalar_g else g_tiles),
                (value_tile,) if scalar_w else (value_tile, value_tile),
                (value_tile, tile(square, bf16)),
            ),
            "q_union": mosaic.overlaid(
                (key_tile,), (tile((key_dim, CHUNK), bf16),), (tile((value_block, CHUNK), bf16),)
            ),
            "ks": key_tile,
            "bs": key_tile,
            "x_union": mosaic.overlaid(
                *(() if scalar_g else ((tile((3, *square), bf16, _SWIZZLE),),)),
                (tile(square, f16),) * 2,
                (tile(square, bf16, _SWIZZLE),) * 2,
            ),
            **({} if scalar_g else {"steps_tile": plgpu.SMEM((_STEPS, key_dim), f32)}),
            "loaded": plgpu.Barrier(num_arrivals=copies),
            "loaded_values": plgpu.Barrier(num_arrivals=1 if scalar_w else 2),
            **({} if masks is None else {"flaws_tile": plgpu.SMEM((CHUNK,), f32)}),
        },
        compiler_params=mosaic.COMPILER_PARAMS,
    )(
        q,
        k,
        v,
        g,
        b,
        w,
        *((g, b) if scalar_g else (sum_matrices(),)),
        *(() if masks is None else (masks.segment, masks.segment, masks.reads, masks.writes)),
    )
    y_t, u_t, k_tail, q_gamma, a_qk_t, *rest = results
    decay, *rest = (None, *rest) if scalar_g else rest
    x, *rest = rest if save else (None, *rest)
    steps, *rest = rest if save and not scalar_g else (None, *rest)
    return y_t, u_t, k_tail, q_gamma, a_qk_t, decay, x, steps, rest[0] if rest else None
