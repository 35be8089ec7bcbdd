"""Backward of everything inside a chunk, given the gradients of its states (paper eqs. 49-82).

With dZ = (I + T)^-T dR from `state_pass_backward`, R = (I + T)^-1 (Z - Eg S), and S, S' the states
before and after the chunk:

    dQg = dO S^T    dEg = -dZ S^T    dKt = R dS'^T    dgamma_C = sum over V of S * dS'
    dAqk = tril(dO R^T)    dT = -stril(dZ R^T)    dv = w dZ    dw = v dZ

Two warpgroups for each chunk and head own half of the key channels each. Sums over pairs of rows go block by block
of 16 rows, as in the forward, with the sums P of g since each block began:

    dk_s = 2^(-c - P_s) (dT^T [e 2^(P + c)] + dAqk^T [q 2^(P + c)])
    de_r = 2^(P_r + c') dT [k 2^(-c' - P)]    dq_r = 2^(P_r + c') dAqk [k 2^(-c' - P)]

The sums so far move from one block's beginning to the next: they are multiplied by the decay of
each of the block's halves. Between underflow and overflow there is room for every g and for
gradients dT and dAqk of pairs from 1e-11 to 1e5 or so; where no gate is strong, far beyond 1e5.

Where all channels of a head decay alike, dT and dAqk are multiplied by the weights of their pairs
first; all sums are then products with q and k as they come.

The gradient of g sums what depends on each G over the rows below. That sum leaves out dAqk's
diagonal: those pairs do not decay, and their share of dg is zero only until it is rounded.
"""

import itertools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32

from gdn2_jax.pallas import mosaic
from gdn2_jax.pallas.intra_chunk_forward import BLOCK, CLAMP, HALF, LOG2_E, UNDERFLOW, sum_matrices
from gdn2_jax.pallas.mosaic import CHUNK, matmul, split, tile
from gdn2_jax.pallas.segments import Masks

_WARPGROUPS = 2
_BLOCKS = CHUNK // BLOCK
_BLOCK_SWIZZLE = 2 * BLOCK
_PIECE = 32
_VALUES = 128
_STEPS = (CHUNK - BLOCK) // HALF
# The constants c' and c: P is at least -192, and sums over pairs start with their operands' range.
_ROW_CENTRE, _COLUMN_CENTRE = -CLAMP * HALF - 16, -CLAMP * HALF + 8


def from_sums_in_chunks(d_sums: Float32[Array, "B H N W 2 64"]) -> Float32[Array, "B H T"]:
    """The gradient of a log-decay, of W summands for each row's share in both `sums_in_chunks`."""
    up_to = jnp.tri(CHUNK, dtype=d_sums.dtype)
    sums = jnp.stack([up_to, 1 - up_to])
    dg = jnp.einsum("bhnwir,irs->bhns", d_sums, sums, precision="highest")
    return dg.reshape(*dg.shape[:2], -1)


@mosaic.on_cuda
def chunk_backward(
    q: BFloat16[Array, "B T H K"],
    k: BFloat16[Array, "B T H K"],
    v: BFloat16[Array, "B T H V"],
    g: Float32[Array, "B T H K"] | Float32[Array, "B H N 2 64"],
    b: BFloat16[Array, "B T H K"] | Float32[Array, "B H T"],
    w: BFloat16[Array, "B T H V"] | Float32[Array, "B H T"],
    d_o: BFloat16[Array, "B T H V"],
    r_t: BFloat16[Array, "BH N V 64"],
    d_z: BFloat16[Array, "BH T V"],
    states: BFloat16[Array, "BH N V K"],
    d_states: BFloat16[Array, "BH N V K"],
    decay: Float32[Array, "BH N K"],
    steps: Float32[Array, "BH N 6 K"] | None,
    masks: Masks | None,
    poison: Float32[Array, "BH T"] | None,
    *,
    scale: float,
) -> tuple[
    BFloat16[Array, "B T H K"],
    BFloat16[Array, "B T H K"],
    Float32[Array, "B T H K"] | Float32[Array, "B H N 2 2 64"],
    BFloat16[Array, "B T H K"] | Float32[Array, "B H 2 T"],
    BFloat16[Array, "B T H V"],
    BFloat16[Array, "B T H V"] | Float32[Array, "B H M T"],
]:
    """Computes the gradients of a chunk's inputs.

    K is 64 or 128; T is a multiple of 64, V of 64 and of K; the log-decay g is <= 0. The other
    kernels give R^T and the states before each chunk (`state_pass_forward`), dZ and the gradients of
    the states after each chunk (`state_pass_backward`), and the steps (`intra_chunk_forward`). The
    decay of a chunk is zero where no segment spans it. With masks, what is not finite in the inputs
    counts as zero, and `poison` (NaN or zero) is added to the gradients of each row.

    Returns:
      dq, dk, dg, db, dv and dw. Of a gate with one number a head they are summands, not poisoned.
    """
    batch, length, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    chunks = length // CHUNK
    key_side = (batch, chunks * CHUNK, heads, key_dim)
    value_side = (*key_side[:3], value_dim)
    state_side = (batch * heads, chunks, value_dim, key_dim)
    scalar_b, scalar_w = (mosaic.is_scalar(x) for x in (b, w))
    scalar_g = scalar_b and g.shape != key_side
    mosaic.check_shapes(
        q=(q, key_side),
        k=(k, key_side),
        g=(g, (batch, heads, chunks, 2, CHUNK) if scalar_g else key_side),
        b=(b, mosaic.gate_shape(b, key_side)),
        **{name: (x, value_side) for name, x in {"v": v, "d_o": d_o}.items()},
        w=(w, mosaic.gate_shape(w, value_side)),
        r_t=(r_t, (*state_side[:3], CHUNK)),
        d_z=(d_z, (batch * heads, length, value_dim)),
        states=(states, state_side),
        d_states=(d_states, state_side),
        decay=(decay, (*state_side[:2], key_dim)),
        **({} if steps is None else {"steps": (steps, (*state_side[:2], _STEPS, key_dim))}),
    )
    wg_channels = key_dim // _WARPGROUPS
    swizzle = 2 * wg_channels
    block = _VALUES if value_dim % _VALUES == 0 else _VALUES // 2
    value_blocks = value_dim // block
    wg_values = block // _WARPGROUPS
    shape, square, piece_shape = (CHUNK, wg_channels), (CHUNK, CHUNK), (CHUNK, _PIECE)
    bf16, f32 = jnp.bfloat16, jnp.float32
    at_least = mosaic.at_least if masks is None else mosaic.known_at_least

    def chunk_backward_kernel(
        *refs,
        qs,
        ks,
        h_union,
        d_h_union,
        d_o_d_z_union,
        r_union,
        v_union,
        w_union,
        dt_low,
        decay_tile,
        diagonal,
        keys_loaded,
        states_loaded,
        values_loaded,
        tables_loaded,
        d_o_d_z_loaded,
        free,
        pairs_ready,
        sum_tiles: Any = None,
        steps_tile: Any = None,
        g_loaded: Any = None,
        dg_tile: Any = None,
        bs: Any = None,
        b_tile: Any = None,
        db_tile: Any = None,
        dw_tile: Any = None,
    ):
        q, k, v, g, b, w, d_o, r_t, d_z, states, d_states, decay, *refs = refs
        if scalar_g:
            column_g, *refs = refs
        else:
            steps, sums, *refs = refs
        if masks is not None:
            row_segment, column_segment, reads, writes, poison, *refs = refs
        dq_out, dk_out, dg_out, db_out, dv_out, dw_out = refs
        # Slabs of equal size for each warpgroup, which alone uses them.
        (hs,), (k_parts,) = h_union  # with one decay a head, dT b in two parts
        (d_hs,), *g_areas = d_h_union
        (d_o_d_z,), (pairs, d_decays) = d_o_d_z_union
        ((r_ts,), (d_tails,)), ((vs,), (dq_states,)), (*ws, (de_states,)) = (
            r_union,
            v_union,
            w_union,
        )
        row, head, chunk = (lax.axis_index(name) for name in ("b", "h", "c"))
        wg = lax.axis_index("wg")
        rows, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(wg * wg_channels, wg_channels)
        index = row * heads + head
        place = (row, rows, head, channels)
        load = plgpu.copy_gmem_to_smem
        ri, ci = mosaic.indices(square, 0), mosaic.indices(square, 1)
        strip_row = mosaic.indices(shape, 0)
        # Steps that read many arrays take a few columns at a time, to need fewer registers.
        pieces = [(slice(None), pl.ds(start, _PIECE)) for start in range(0, wg_channels, _PIECE)]

        def vector(ref):
            return mosaic.load_for_columns(ref, shape)

        def row_mask(ref, mask_shape=shape):
            return mosaic.load_scalars(ref.at[row, rows], mask_shape)

        def poisoned(value):
            if masks is None:
                return value
            return value + mosaic.load_scalars(poison.at[index, rows], value.shape)

        def load_piece(ref, piece):
            return plgpu.load(ref.at[wg, *piece]).astype(f32)

        def load_input(ref, piece):
            value = load_piece(ref, piece)
            return value if masks is None else mosaic.finite(value)

        def load_inputs(piece):
            keys, *gates, queries = (
                load_input(x, piece) for x in ((ks, qs) if scalar_b else (ks, bs, qs))
            )
            return keys, gates_of(piece_shape) if scalar_b else gates[0], queries

        def gates_of(shape):
            gates = mosaic.over_columns(plgpu.load(b_tile), shape)
            return gates if masks is None else mosaic.finite(gates)

        def part_of(value, piece):
            start = piece[1].start
            return value[:, start : start + _PIECE]

        def store_parts(ref, value, piece=()):
            for i, part in enumerate(split(value)):
                ref.at[wg, i, *piece][...] = part

        for source, target in ((k, ks), *(() if scalar_b else ((b, bs),)), (q, qs)):
            load(source.at[place], target.at[wg], keys_loaded.at[wg])

        @pl.when(wg == 0)
        def _():
            if not scalar_g:
                load(sums, sum_tiles, tables_loaded)
            load(decay.at[index, chunk], decay_tile, tables_loaded)
            if not scalar_g:
                load(steps.at[index, chunk], steps_tile, tables_loaded)
            if scalar_b:
                load(b.at[row, head, rows], b_tile, tables_loaded)

        def load_values(n):
            """Starts the copies of a block of value channels."""
            values = pl.ds(n * block, block)

            @pl.when(wg == 0)
            def _():
                load(d_o.at[row, rows, head, values], d_o_d_z.at[0], d_o_d_z_loaded)
                load(d_z.at[index, rows, values], d_o_d_z.at[1], d_o_d_z_loaded)
                load(r_t.at[index, chunk, values], r_ts, d_o_d_z_loaded)

            for source, target in ((v, vs), *((w, x) for (x,) in ws)):
                load(source.at[value_place(n)], target.at[wg], values_loaded.at[wg])
            for source, target in ((states, hs), (d_states, d_hs)):
                source = source.at[index, chunk, values, channels]
                load(source, target.at[wg, pl.ds(0, block)], states_loaded.at[wg])

        def value_place(n):
            return row, rows, head, pl.ds(n * block + wg * wg_values, wg_values)

        def store_values(n):
            """Writes this warpgroup's columns of dv and dw; returns S * dS' in 64 summands a channel."""
            if scalar_w:
                scalar_write = mosaic.load_scalars(w.at[row, head, rows], shape)
                dw = jnp.float32(0)
            plgpu.barrier_wait(d_o_d_z_loaded)
            plgpu.barrier_wait(values_loaded.at[wg])
            for start in range(0, wg_values, wg_channels):
                part = (wg, slice(None), pl.ds(start, wg_channels))
                columns = pl.ds(wg * wg_values + start, wg_channels)
                dz, value, *write = (
                    plgpu.load(x).astype(f32)
                    for x in (
                        d_o_d_z.at[1, :, columns],
                        vs.at[part],
                        *(x.at[part] for (x,) in ws),
                    )
                )
                write = scalar_write if scalar_w else write[0]
                vs.at[part][...] = poisoned(dz * write).astype(bf16)
                if scalar_w:
                    dw += jnp.sum(dz * value, axis=1)
                for (x,) in ws:
                    x.at[part][...] = poisoned(dz * value).astype(bf16)
            if scalar_w:
                dw_tile[wg] = dw
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(vs.at[wg], dv_out.at[value_place(n)])
            for (x,) in ws:
                plgpu.copy_smem_to_gmem(x.at[wg], dw_out.at[value_place(n)])
            if scalar_w:
                summand = dw_out.at[row, head, n * _WARPGROUPS + wg, rows]
                plgpu.copy_smem_to_gmem(dw_tile.at[wg], summand)
            plgpu.barrier_wait(states_loaded.at[wg])
            return sum(
                math.prod(plgpu.load(x.at[wg, pl.ds(start, CHUNK)]).astype(f32) for x in (hs, d_hs))
                for start in range(0, block, CHUNK)
            )

        load_values(0)
        d_decay = store_values(0)
        plgpu.barrier_wait(tables_loaded)

        def over_values(*accumulators):
            """dKt, dQg, -dEg, dAqk or -dT, and the gradient of the chunk's decay."""
            dk_acc, dq_acc, de_acc, pairs_acc = accumulators
            total = d_decay
            for n in range(value_blocks):
                if n:
                    plgpu.barrier_wait(free)
                    load_values(n)
                    total += store_values(n)
                half = (wg, pl.ds(0, block))
                pairs_acc.add(d_o_d_z.at[wg], r_ts)
                dk_acc.add(r_ts.transpose((1, 0)), d_hs.at[half])
                dq_acc.add(d_o_d_z.at[0], hs.at[half])
                de_acc.add(d_o_d_z.at[1], hs.at[half])
                results = [x.get() for x in accumulators]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()
                plgpu.barrier_arrive(free)
            return *results, total * vector(decay_tile.at[channels])

        dk_tail, dq, de, pair, d_decay = mosaic.with_accumulators(
            over_values, shape, shape, shape, square
        )
        if not scalar_g:
            (gs,), (q_parts,) = g_areas
            load(g.at[place], gs.at[wg], g_loaded.at[wg])

        @pl.when(wg == 0)
        def _():
            diagonal[...] = jnp.sum(jnp.where(ri == ci, pair, 0.0), axis=1)

        pair = jnp.where(ri > ci, pair * jnp.where(wg == 0, jnp.float32(1), jnp.float32(-1)), 0.0)
        if masks is not None:
            same = row_mask(row_segment, square) == (
                mosaic.load_for_columns(column_segment.at[row, rows], square)
            )
            pair = jnp.where(same, pair, 0.0)
        if scalar_g:
            to_row = mosaic.load_scalars(g.at[row, head, chunk, 0], square)
            to_column = mosaic.load_for_columns(column_g.at[row, head, chunk, 0], square)
            pair *= jnp.exp2(jnp.minimum(to_row - to_column, 0.0))
        plgpu.barrier_wait(free)  # everybody has read dO and dZ
        pair_high, pair_low = split(pair)
        pairs.at[wg][...] = pair_high

        @pl.when(wg == 1)
        def _():
            # With repeated keys sums over dT telescope: one bf16 number for each entry would be too
            # coarse.
            dt_low[...] = pair_low
            if scalar_g:
                for i, part in enumerate(split(pair * gates_of(square))):
                    k_parts.at[i][...] = part

        # The 64 summands will be summed: their rounding averages out.
        d_decays[wg] = d_decay.astype(bf16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(pairs_ready)

        # Sums of g: up to each row, beyond it, and from its block's beginning up to it.
        parts = [] if scalar_g else [k_parts.at[wg, i] for i in range(2)]

        def sum_g(limit, *matrices):
            value = at_least(limit, plgpu.load(gs.at[wg]) * LOG2_E)
            store_parts(k_parts, value)
            plgpu.commit_smem()
            return [matmul(shape, *((matrix, part) for part in parts)) for matrix in matrices]

        if scalar_g:
            gamma, tail = (
                jnp.exp2(mosaic.load_scalars(g.at[row, head, chunk, i], shape)) for i in range(2)
            )
        else:
            plgpu.barrier_wait(g_loaded.at[wg])
            to_row, from_row = sum_g(
                UNDERFLOW * LOG2_E, sum_tiles.at[0], sum_tiles.at[0].transpose((1, 0))
            )
            gamma = jnp.exp2(to_row)
            tail = jnp.exp2(from_row - sum(plgpu.load(x).astype(f32) for x in parts))
        if masks is not None:
            gamma, tail = gamma * row_mask(reads), tail * row_mask(writes)
        for target, value in (
            (dq_states, gamma * dq),
            (de_states, -gamma * de),
            (d_tails, tail * dk_tail),
        ):
            target[wg] = value.astype(bf16)
        plgpu.commit_smem()

        def pairs_by_head():
            """The sums over pairs, where all channels of a head decay alike: as `pairs_by_channel`."""
            plgpu.barrier_wait(keys_loaded.at[wg])
            if masks is not None:
                for x, piece in itertools.product((ks, qs), pieces):
                    x.at[wg, *piece][...] = load_input(x, piece).astype(bf16)
                plgpu.commit_smem()
            plgpu.barrier_wait(pairs_ready)

            def products(for_k, for_k_from_q, for_e, for_q):
                for part in range(2):
                    for_k.add(k_parts.at[part].transpose((1, 0)), ks.at[wg])
                for_k_from_q.add(pairs.at[0].transpose((1, 0)), qs.at[wg])
                for part in (pairs.at[1], dt_low):
                    for_e.add(part, ks.at[wg])
                for_q.add(pairs.at[0], ks.at[wg])
                return for_k.get() + scale * for_k_from_q.get(), for_e.get(), for_q.get()

            return mosaic.with_accumulators(products, *(shape,) * 4)

        def pairs_by_channel():
            """The sums over pairs for k, e and q, but for factors, and sums of g in blocks."""
            (in_block,) = sum_g(CLAMP, sum_tiles.at[1])
            plgpu.commit_smem()  # every warp is done with the parts of g
            plgpu.barrier_wait(keys_loaded.at[wg])
            for piece in pieces:
                keys, gates, queries = load_inputs(piece)
                up = jnp.exp2(part_of(in_block, piece) + _COLUMN_CENTRE)
                store_parts(k_parts, keys * gates * up, piece)
                store_parts(q_parts, queries * scale * up, piece)
            plgpu.commit_smem()
            plgpu.barrier_wait(pairs_ready)

            def move(i, rows, *accumulators):
                """Moves the sums of `rows` between the beginnings of block i and of the next block."""
                first, second = (vector(steps_tile.at[2 * i + half, channels]) for half in range(2))
                for accumulator in accumulators:
                    value = accumulator.get()
                    accumulator.set(jnp.where(rows, value * first * second, value))

            def by_column(accumulator):
                for i in reversed(range(_BLOCKS)):
                    at = pl.ds(BLOCK * i, BLOCK)
                    if i + 1 < _BLOCKS:
                        move(i, strip_row < BLOCK * (i + 1), accumulator)
                    for part in range(2):
                        accumulator.add(pairs.at[1, at].transpose((1, 0)), k_parts.at[wg, part, at])
                        accumulator.add(pairs.at[0, at].transpose((1, 0)), q_parts.at[wg, part, at])
                    accumulator.add(dt_low.at[at].transpose((1, 0)), k_parts.at[wg, 0, at])
                return accumulator.get()

            dk_pairs = mosaic.with_accumulators(by_column, shape)
            plgpu.commit_smem()  # every warp is done with the parts of e and q
            for piece in pieces:
                down = jnp.exp2(-_ROW_CENTRE - part_of(in_block, piece))
                store_parts(k_parts, load_input(ks, piece) * down, piece)
            plgpu.commit_smem()

            def by_row(for_e, for_q):
                for i in range(_BLOCKS):
                    at = pl.ds(BLOCK * i, BLOCK)
                    if i:
                        move(i - 1, strip_row >= BLOCK * i, for_e, for_q)
                    for part in range(2):
                        for_e.add(pairs.at[1, :, at], k_parts.at[wg, part, at])
                        for_q.add(pairs.at[0, :, at], k_parts.at[wg, part, at])
                    for_e.add(dt_low.at[:, at], k_parts.at[wg, 0, at])
                return for_e.get(), for_q.get()

            de_pairs, dq_pairs = mosaic.with_accumulators(by_row, shape, shape)
            return dk_pairs, de_pairs, dq_pairs, in_block

        if scalar_g:
            dk_pairs, de_pairs, dq_pairs = pairs_by_head()
        else:
            dk_pairs, de_pairs, dq_pairs, in_block = pairs_by_channel()
        plgpu.commit_smem()  # every warp is done with the parts of k
        db, d_sums = jnp.float32(0), [jnp.float32(0)] * 2

        def keep_share(i, share, piece):
            """Rows' shares in the gradients of their sums of g, up to the row and beyond it."""
            if scalar_g:
                d_sums[i] += jnp.sum(share, axis=1)
            else:
                store_parts((q_parts, k_parts)[i], share, piece)

        on_diagonal = mosaic.over_columns(plgpu.load(diagonal), piece_shape)
        for piece in pieces:
            keys, gates, queries = load_inputs(piece)
            queries *= scale
            up, down = 1.0, 1.0
            if not scalar_g:
                exponent = part_of(in_block, piece)
                up, down = jnp.exp2(exponent + _ROW_CENTRE), jnp.exp2(-_COLUMN_CENTRE - exponent)
            de = up * part_of(de_pairs, piece) + load_piece(de_states, piece)
            dq = up * part_of(dq_pairs, piece) + load_piece(dq_states, piece)
            dk = down * part_of(dk_pairs, piece)
            d_tail, d_decay = load_piece(d_tails, piece), load_piece(d_decays, piece)
            keep_share(0, queries * dq + keys * gates * de - keys * dk + d_decay, piece)
            keep_share(1, keys * d_tail + d_decay, piece)
            dk += d_tail + gates * de + on_diagonal * queries
            for target, value in (
                (qs, (dq + on_diagonal * keys) * scale),
                (ks, dk),
                *(() if scalar_b else ((bs, keys * de),)),
            ):
                target.at[wg, *piece][...] = poisoned(value).astype(bf16)
            if scalar_b:
                db += jnp.sum(keys * de, axis=1)
        if scalar_b:
            db_tile[wg] = db
        if scalar_g:
            for i, x in enumerate(d_sums):
                dg_tile[wg, i] = x
        plgpu.commit_smem()
        for source, target in (
            (qs, dq_out),
            (ks, dk_out),
            *(() if scalar_b else ((bs, db_out),)),
        ):
            plgpu.copy_smem_to_gmem(source.at[wg], target.at[place])
        if scalar_b:
            plgpu.copy_smem_to_gmem(db_tile.at[wg], db_out.at[row, head, wg, rows])
        if scalar_g:
            plgpu.copy_smem_to_gmem(dg_tile.at[wg], dg_out.at[row, head, chunk, wg])
        else:
            # The sum over the rows below and the row itself, and over the rows above.
            dg = matmul(
                shape,
                *((sum_tiles.at[0].transpose((1, 0)), q_parts.at[wg, i]) for i in range(2)),
                *((sum_tiles.at[0], part) for part in parts),
            ) - sum(plgpu.load(part).astype(f32) for part in parts)
            plgpu.commit_smem()
            gs[wg] = poisoned(dg)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(gs.at[wg], dg_out.at[place])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    keys_tile = tile((_WARPGROUPS, *shape), bf16, 2 * _PIECE)
    states_tile = tile((_WARPGROUPS, _VALUES, wg_channels), bf16, swizzle)
    parts_tile = tile((_WARPGROUPS, 2, *shape), bf16, _BLOCK_SWIZZLE)
    values_tile = tile((_WARPGROUPS, CHUNK, wg_values), bf16, swizzle)
    # One with a swizzle of its own: both operands of a product have the same one.
    pairs_swizzle = 2 * _PIECE if scalar_g else _BLOCK_SWIZZLE
    square_tiles = tile((2, *square), bf16, pairs_swizzle)
    g_tiles = () if scalar_g else ((tile((_WARPGROUPS, *shape), f32),), (parts_tile,))
    per_warpgroup: dict[str, Any] = {"num_barriers": _WARPGROUPS}
    of_scalars = {}
    tables = (1 if scalar_b else 0) + (1 if scalar_g else 3)
    if scalar_g:
        of_scalars["dg_tile"] = plgpu.SMEM((_WARPGROUPS, 2, CHUNK), f32)
    if scalar_b:
        of_scalars["b_tile"] = plgpu.SMEM((CHUNK,), f32)
        of_scalars["db_tile"] = plgpu.SMEM((_WARPGROUPS, CHUNK), f32)
    if scalar_w:
        of_scalars["dw_tile"] = plgpu.SMEM((_WARPGROUPS, CHUNK), f32)

    def summands(count):
        return jax.ShapeDtypeStruct((batch, heads, count, length), f32)

    return mosaic.kernel(
        chunk_backward_kernel,
        out_type=(
            *(jax.ShapeDtypeStruct(q.shape, dtype) for dtype in (bf16, bf16)),
            jax.ShapeDtypeStruct(
                (*g.shape[:3], _WARPGROUPS, 2, CHUNK) if scalar_g else g.shape, f32
            ),
            summands(_WARPGROUPS) if scalar_b else jax.ShapeDtypeStruct(q.shape, bf16),
            jax.ShapeDtypeStruct(v.shape, bf16),
            summands(_WARPGROUPS * value_blocks)
            if scalar_w
            else jax.ShapeDtypeStruct(v.shape, bf16),
        ),
        grid=(chunks, batch, heads),
        grid_names=("c", "b", "h"),
        num_threads=_WARPGROUPS,
        thread_name="wg",
        scratch_types={
            **dict.fromkeys(("qs", "ks") if scalar_b else ("qs", "ks", "bs"), keys_tile),
            "h_union": mosaic.overlaid((states_tile,), (square_tiles if scalar_g else parts_tile,)),
            "d_h_union": mosaic.overlaid((states_tile,), *g_tiles),
            "d_o_d_z_union": mosaic.overlaid(
                (tile((2, CHUNK, block), bf16, swizzle),), (square_tiles, keys_tile)
            ),
            "r_union": mosaic.overlaid((tile((block, CHUNK), bf16, swizzle),), (keys_tile,)),
            "v_union": mosaic.overlaid((values_tile,), (keys_tile,)),
            "w_union": mosaic.overlaid(*(() if scalar_w else ((values_tile,),)), (keys_tile,)),
            "dt_low": tile(square, bf16, pairs_swizzle),
            **({} if scalar_g else {"sum_tiles": square_tiles}),
            "decay_tile": plgpu.SMEM((key_dim,), f32),
            **({} if scalar_g else {"steps_tile": plgpu.SMEM((_STEPS, key_dim), f32)}),
            "diagonal": plgpu.SMEM((CHUNK,), f32),
            "keys_loaded": plgpu.Barrier(num_arrivals=2 if scalar_b else 3, **per_warpgroup),
            "states_loaded": plgpu.Barrier(num_arrivals=2, **per_warpgroup),
            **({} if scalar_g else {"g_loaded": plgpu.Barrier(num_arrivals=1, **per_warpgroup)}),
            "values_loaded": plgpu.Barrier(num_arrivals=1 if scalar_w else 2, **per_warpgroup),
            "tables_loaded": plgpu.Barrier(num_arrivals=tables),
            "d_o_d_z_loaded": plgpu.Barrier(num_arrivals=3),
            "free": plgpu.Barrier(num_arrivals=_WARPGROUPS),
            "pairs_ready": plgpu.Barrier(num_arrivals=_WARPGROUPS),
            **of_scalars,
        },
        compiler_params=mosaic.COMPILER_PARAMS,
    )(
        *(q, k, v, g, b, w, d_o, r_t, d_z, states, d_states, decay),
        *((g,) if scalar_g else (steps, sum_matrices()[:2])),
        *(() if masks is None else (masks.segment, *masks[:3], poison)),
    )
