"""The two passes over chunks: states and outputs forward, gradients of states backward.

A block owns 64 value rows of one head's transposed state S^T [V, K], in fp32 accumulators for the
whole sequence; a second warpgroup fetches the chunks' operands ahead of it.

    forward:   R = U - Y S    O = Qg S + Aqk R    S' = gamma_C S + Kt^T R
    backward:  dR = Aqk^T dO + Kt dS'    dS = gamma_C dS' + Qg^T dO - Y^T dR    dZ = X dR
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32

from gdn2_jax.pallas import mosaic
from gdn2_jax.pallas.mosaic import CHUNK, split, tile

_VALUE_ROWS = 64
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 240

_FORWARD_STAGES, _BACKWARD_STAGES = 3, 2
"""Chunks whose operands are in shared memory, the one in use and those on their way: all that fit."""


class _Place(NamedTuple):
    """Where a block works: `index` counts heads of all rows, `values` are its value channels."""

    index: jax.Array
    row: jax.Array
    head: jax.Array
    values: pl.Slice
    chunk: jax.Array


@mosaic.on_cuda
def state_pass_forward(
    y_t: BFloat16[Array, "BH N K 64"],
    u_t: BFloat16[Array, "BH N V 64"],
    k_tail: BFloat16[Array, "BH T K"],
    q_gamma: BFloat16[Array, "BH T K"],
    a_qk_t: BFloat16[Array, "BH N 64 64"],
    decay: Float32[Array, "BH N K"],
    state: Float32[Array, "B H V K"],
    *,
    save: bool,
) -> tuple[
    BFloat16[Array, "B T H V"],
    Float32[Array, "B H V K"],
    BFloat16[Array, "BH N V K"] | None,
    BFloat16[Array, "BH N V 64"] | None,
]:
    """Runs the states through a sequence, from `state` before the first chunk.

    The other operands are those of `intra_chunk_forward`. `save` also returns what the backward needs.

    Returns:
      Outputs, the final state and, or None, the states before each chunk and R^T.
    """
    batch, heads, value_dim, key_dim = state.shape
    length = k_tail.shape[1]
    chunks = length // CHUNK
    bf16 = jnp.bfloat16
    chunked = (batch * heads, chunks)
    _check_shapes(y_t, k_tail, q_gamma, a_qk_t, decay, state)
    mosaic.check_shapes(u_t=(u_t, (*chunked, value_dim, CHUNK)))

    def sources(refs, at):
        y_t, u_t, k_tail, q_gamma, a_qk_t, decay = refs
        rows = pl.ds(at.chunk * CHUNK, CHUNK)
        return {
            "y_t": y_t.at[at.index, at.chunk],
            "u_t": u_t.at[at.index, at.chunk, at.values],
            "k_tail": k_tail.at[at.index, rows],
            "q_gamma": q_gamma.at[at.index, rows],
            "a_qk_t": a_qk_t.at[at.index, at.chunk],
            "decay": decay.at[at.index, at.chunk],
        }

    def advance(
        state, *, y_t, u_t, k_tail, q_gamma, a_qk_t, decay, o_tile, state_tile=None, r_t_tile=None
    ):
        state16 = state.astype(bf16)

        def products(residual, output, next_state):
            residual.add(state16, y_t)
            output.add(state16, q_gamma.transpose((1, 0)))
            gamma = plgpu.load(decay)
            next_state.set(state * mosaic.over_rows(gamma, (_VALUE_ROWS, key_dim)))
            u = plgpu.load(u_t).astype(jnp.float32)
            r = (u - residual.get(1)).astype(bf16)
            next_state.add(r, k_tail)
            output.add(r, a_qk_t)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if state_tile is not None and r_t_tile is not None:
                state_tile[...] = state16
                r_t_tile[...] = r
            o_tile.transpose((1, 0))[...] = output.get().astype(bf16)
            advanced = next_state.get()
            plgpu.commit_smem()
            return advanced

        square = (_VALUE_ROWS, CHUNK)
        return mosaic.with_accumulators(products, square, square, (_VALUE_ROWS, key_dim))

    def targets(outputs, at):
        o, *saved = outputs
        rows = pl.ds(at.chunk * CHUNK, CHUNK)
        names = ("state_tile", "r_t_tile")
        return {"o_tile": o.at[at.row, rows, at.head, at.values]} | {
            name: ref.at[at.index, at.chunk, at.values] for name, ref in zip(names, saved)
        }

    saved_types = (
        jax.ShapeDtypeStruct((*chunked, value_dim, key_dim), bf16),
        jax.ShapeDtypeStruct((*chunked, value_dim, CHUNK), bf16),
    )
    saved_tiles = {
        "state_tile": tile((_VALUE_ROWS, key_dim), bf16),
        "r_t_tile": tile((_VALUE_ROWS, CHUNK), bf16),
    }
    final_state, outputs, *saved = _run(
        (y_t, u_t, k_tail, q_gamma, a_qk_t, decay),
        state,
        chunks,
        (sources, advance, targets),
        tiles={
            "y_t": tile((_FORWARD_STAGES, key_dim, CHUNK), bf16),
            "u_t": tile((_FORWARD_STAGES, _VALUE_ROWS, CHUNK), bf16),
            "k_tail": tile((_FORWARD_STAGES, CHUNK, key_dim), bf16),
            "q_gamma": tile((_FORWARD_STAGES, CHUNK, key_dim), bf16),
            "a_qk_t": tile((_FORWARD_STAGES, CHUNK, CHUNK), bf16),
            "decay": plgpu.SMEM((_FORWARD_STAGES, key_dim), jnp.float32),
        },
        staging={"o_tile": tile((CHUNK, _VALUE_ROWS), bf16), **(saved_tiles if save else {})},
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, value_dim), bf16),
            *(saved_types if save else ()),
        ),
        reverse=False,
        stages=_FORWARD_STAGES,
    )
    states, r_t = saved if save else (None, None)
    return outputs, final_state, states, r_t


@mosaic.on_cuda
def state_pass_backward(
    y_t: BFloat16[Array, "BH N K 64"],
    d_o: BFloat16[Array, "B T H V"],
    k_tail: BFloat16[Array, "BH T K"],
    q_gamma: BFloat16[Array, "BH T K"],
    a_qk_t: BFloat16[Array, "BH N 64 64"],
    decay: Float32[Array, "BH N K"],
    x: BFloat16[Array, "BH N 2 64 64"],
    d_state: Float32[Array, "B H V K"],
) -> tuple[BFloat16[Array, "BH T V"], BFloat16[Array, "BH N V K"], Float32[Array, "B H V K"]]:
    """Runs the gradients of the states back through a sequence.

    `d_o` and `d_state` are the cotangents of the outputs and of the final state; the other operands
    are those of `intra_chunk_forward`, with X in two parts.

    Returns:
      dZ, the gradient of each chunk's outgoing state, and the gradient of the initial state.
    """
    batch, heads, value_dim, key_dim = d_state.shape
    length = k_tail.shape[1]
    chunks = length // CHUNK
    bf16 = jnp.bfloat16
    chunked = (batch * heads, chunks)
    _check_shapes(y_t, k_tail, q_gamma, a_qk_t, decay, d_state)
    mosaic.check_shapes(
        d_o=(d_o, (batch, length, heads, value_dim)), x=(x, (*chunked, 2, CHUNK, CHUNK))
    )

    def sources(refs, at):
        y_t, d_o, k_tail, q_gamma, a_qk_t, decay, x = refs
        rows = pl.ds(at.chunk * CHUNK, CHUNK)
        return {
            "y_t": y_t.at[at.index, at.chunk],
            "d_o": d_o.at[at.row, rows, at.head, at.values],
            "k_tail": k_tail.at[at.index, rows],
            "q_gamma": q_gamma.at[at.index, rows],
            "a_qk_t": a_qk_t.at[at.index, at.chunk],
            "decay": decay.at[at.index, at.chunk],
            "x": x.at[at.index, at.chunk],
        }

    def advance(d_state, *, y_t, d_o, k_tail, q_gamma, a_qk_t, decay, x, d_z_tile, d_state_tile):
        d_state16 = d_state.astype(bf16)
        d_o_t = d_o.transpose((1, 0))

        def products(d_residual, previous, d_z):
            d_residual.add(d_state16, k_tail.transpose((1, 0)))
            d_residual.add(d_o_t, a_qk_t.transpose((1, 0)))
            gamma = plgpu.load(decay)
            previous.set(d_state * mosaic.over_rows(gamma, (_VALUE_ROWS, key_dim)))
            previous.add(d_o_t, q_gamma)
            high, low = split(d_residual.get(1))
            previous.add(-high, y_t.transpose((1, 0)))
            # With repeated keys X takes differences of rows: rounded, they would be lost.
            for part, x_part in ((high, x.at[0]), (low, x.at[0]), (high, x.at[1])):
                d_z.add(part, x_part.transpose((1, 0)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            d_state_tile[...] = d_state16
            advanced = previous.get(3)
            d_z_tile.transpose((1, 0))[...] = d_z.get().astype(bf16)
            plgpu.commit_smem()
            return advanced

        square = (_VALUE_ROWS, CHUNK)
        return mosaic.with_accumulators(products, square, (_VALUE_ROWS, key_dim), square)

    def targets(outputs, at):
        d_z, d_states = outputs
        return {
            "d_z_tile": d_z.at[at.index, pl.ds(at.chunk * CHUNK, CHUNK), at.values],
            "d_state_tile": d_states.at[at.index, at.chunk, at.values],
        }

    d_initial_state, d_z, d_states = _run(
        (y_t, d_o, k_tail, q_gamma, a_qk_t, decay, x),
        d_state,
        chunks,
        (sources, advance, targets),
        tiles={
            "y_t": tile((_BACKWARD_STAGES, key_dim, CHUNK), bf16),
            "d_o": tile((_BACKWARD_STAGES, CHUNK, _VALUE_ROWS), bf16),
            "k_tail": tile((_BACKWARD_STAGES, CHUNK, key_dim), bf16),
            "q_gamma": tile((_BACKWARD_STAGES, CHUNK, key_dim), bf16),
            "a_qk_t": tile((_BACKWARD_STAGES, CHUNK, CHUNK), bf16),
            "decay": plgpu.SMEM((_BACKWARD_STAGES, key_dim), jnp.float32),
            "x": tile((_BACKWARD_STAGES, 2, CHUNK, CHUNK), bf16),
        },
        staging={
            "d_z_tile": tile((CHUNK, _VALUE_ROWS), bf16),
            "d_state_tile": tile((_VALUE_ROWS, key_dim), bf16),
        },
        out_type=(
            jax.ShapeDtypeStruct((batch * heads, length, value_dim), bf16),
            jax.ShapeDtypeStruct((*chunked, value_dim, key_dim), bf16),
        ),
        reverse=True,
        stages=_BACKWARD_STAGES,
    )
    return d_z, d_states, d_initial_state


def _check_shapes(y_t, k_tail, q_gamma, a_qk_t, decay, state) -> None:
    """Checks the operands of both passes."""
    batch, heads, _, key_dim = state.shape
    chunked = (batch * heads, k_tail.shape[1] // CHUNK)
    mosaic.check_shapes(
        y_t=(y_t, (*chunked, key_dim, CHUNK)),
        k_tail=(k_tail, (chunked[0], chunked[1] * CHUNK, key_dim)),
        q_gamma=(q_gamma, k_tail.shape),
        a_qk_t=(a_qk_t, (*chunked, CHUNK, CHUNK)),
        decay=(decay, (*chunked, key_dim)),
    )


def _run(
    operands: tuple[Array, ...],
    state: Float32[Array, "B H V K"],
    chunks: int,
    roles: tuple[Callable, Callable, Callable],
    *,
    tiles: dict[str, pl.MemoryRef],
    staging: dict[str, pl.MemoryRef],
    out_type: tuple[jax.ShapeDtypeStruct, ...],
    reverse: bool,
    stages: int,
) -> tuple[Array, ...]:
    """A block per 64 value rows and head: one warpgroup prefetches chunks, one advances the state.

    Three functions say what: `sources(operands, place)` gives a chunk's part of the operands by the
    names of `tiles`, shared memory for `stages` chunks. `advance(state, **tiles, **staging)` gives the
    state after the chunk and leaves the chunk's results in `staging`. `targets(outputs, place)` gives
    the places of these by the names of `staging`. `reverse` begins with the last chunk.

    Returns:
      The state after the last chunk, and the outputs.
    """
    sources, advance, targets = roles
    batch, heads, value_dim, _ = state.shape

    def kernel(*refs, full, empty, **scratch):
        inputs, (first_state, final_state, *outputs) = refs[: len(operands)], refs[len(operands) :]
        staged = {name: scratch[name] for name in staging}
        row, head = lax.axis_index("b"), lax.axis_index("h")
        values = pl.ds(lax.axis_index("v") * _VALUE_ROWS, _VALUE_ROWS)
        warpgroup = lax.axis_index("wg")
        place = functools.partial(_Place, row * heads + head, row, head, values)
        # With 64-bit types on, Python numbers would count in int64.
        first, end = jnp.int32(0), jnp.int32(chunks)

        def tiles_of(stage):
            return {name: scratch[name].at[stage] for name in tiles}

        def stage_and_chunk(j):
            return lax.rem(j, jnp.int32(stages)), chunks - 1 - j if reverse else j

        @pl.when(warpgroup == 1)
        def _():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

            def body(j, _):
                stage, chunk = stage_and_chunk(j)

                @pl.when(j >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                stage_tiles = tiles_of(stage)
                for name, source in sources(inputs, place(chunk)).items():
                    plgpu.copy_gmem_to_smem(source, stage_tiles[name], full.at[stage])

            lax.fori_loop(first, end, body, None)

            def drain(j, _):
                plgpu.barrier_wait(empty.at[lax.rem(j, jnp.int32(stages))])

            lax.fori_loop(jnp.int32(max(chunks - stages, 0)), end, drain, None)

        @pl.when(warpgroup == 0)
        def _():
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")

            def body(j, state):
                stage, chunk = stage_and_chunk(j)
                plgpu.barrier_wait(full.at[stage])
                state = advance(state, **tiles_of(stage), **staged)
                plgpu.barrier_arrive(empty.at[stage])
                for name, target in targets(outputs, place(chunk)).items():
                    plgpu.copy_smem_to_gmem(staged[name], target)
                return state

            state = plgpu.load(first_state.at[row, head, values], optimized=False)

            def through_accumulator(accumulator):
                accumulator.set(state)
                return accumulator.get()

            # Inside shard_map a loaded array has the type "varying over the mesh", but the loop's
            # carry has not. An accumulator drops that mark.
            shape = state.shape[0], state.shape[1]
            state = mosaic.with_accumulators(through_accumulator, shape)
            final_state.at[row, head, values][...] = lax.fori_loop(first, end, body, state)
            plgpu.wait_smem_to_gmem(0)

    return mosaic.kernel(
        kernel,
        kernel_name=f"state_pass_{'backward' if reverse else 'forward'}_kernel",
        out_type=(jax.ShapeDtypeStruct(state.shape, jnp.float32), *out_type),
        grid=(heads, batch, value_dim // _VALUE_ROWS),
        grid_names=("h", "b", "v"),
        num_threads=2,
        thread_name="wg",
        scratch_types={
            **tiles,
            **staging,
            "full": plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
            "empty": plgpu.Barrier(num_barriers=stages),
        },
        compiler_params=mosaic.COMPILER_PARAMS,
    )(*operands, state)
