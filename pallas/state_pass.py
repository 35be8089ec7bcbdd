"""The two passes over chunks: states and outputs forward, gradients of states backward.

A block owns 64 value rows of one head's transposed state S^T [V, K], in fp32 accumulators for the
whole sequence; a second warpgroup fetches the chunks' operands ahead of it.

    forward:   R = U - Y S    O = Qg S + Aqk R    S' = gamma_C S + Kt^T R
    backward:  dR = Aqk^T dO + Kt dS'    dS = gamma_C dS' + Qg^T dO - Y^T dR    dZ = X dR
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from gdn2_jax.pallas import mosaic
from gdn2_jax.pallas.mosaic import CHUNK, COLUMNS, WGMMA, split, tile

_VALUE_ROWS = 64
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 240


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How far copies run ahead.

    Attributes:
      stages: chunks whose operands are in shared memory: the one in use and those on their way.
    """

    stages: int

    def __post_init__(self):
        """Raises a ValueError where nothing could run ahead."""
        if self.stages < 2:
            raise ValueError(f"stages: expected at least 2, got {self.stages}")


FORWARD, BACKWARD = Tuning(stages=3), Tuning(stages=2)
"""As many as shared memory holds."""


def state_pass_forward(
    y_t, u_t, k_tail, q_gamma, a_qk_t, decay, state, *, save: bool, tuning: Tuning = FORWARD
):
    """Runs the states through a sequence.

    Args:
      y_t: [BH, N, K, 64] bf16, as the others from `intra_chunk_forward`.
      u_t: [BH, N, V, 64].
      k_tail: [BH, T, K].
      q_gamma: [BH, T, K].
      a_qk_t: [BH, N, 64, 64].
      decay: [BH, N, K] fp32.
      state: [B, H, V, K] fp32, before the first chunk.
      save: also return what the backward needs.
      tuning: how far copies run ahead.

    Returns:
      Outputs [B, T, H, V] bf16, the final state [B, H, V, K] fp32, and, or None, the states
      before each chunk [BH, N, V, K] and R^T [BH, N, V, 64], both bf16.
    """
    batch, heads, value_dim, key_dim = state.shape
    length = k_tail.shape[1]
    chunks = length // CHUNK
    bf16 = jnp.bfloat16

    def prefetch(refs, tiles, barrier, index, row, head, values, chunk):
        y_t, u_t, k_tail, q_gamma, a_qk_t, decay = refs
        rows = pl.ds(chunk * CHUNK, CHUNK)
        sources = (
            y_t.at[index, chunk],
            u_t.at[index, chunk, values],
            k_tail.at[index, rows],
            q_gamma.at[index, rows],
            a_qk_t.at[index, chunk],
            decay.at[index, chunk],
        )
        for source, target in zip(sources, tiles):
            plgpu.copy_gmem_to_smem(source, target, barrier)

    def advance(state, tiles, staging):
        y_t, u_t, k_tail, q_gamma, a_qk_t, decay = tiles
        o_tile, *saved_tiles = staging
        state16 = state.astype(bf16)

        def products(residual, output, next_state):
            residual.add(state16, y_t)
            output.add(state16, q_gamma.transpose((1, 0)))
            gamma = plgpu.load(decay, layout=COLUMNS)
            next_state.set(state * mosaic.over_rows(gamma, (_VALUE_ROWS, key_dim)))
            u = plgpu.load(u_t, layout=WGMMA).astype(jnp.float32)
            r = (u - residual.get(1)).astype(bf16)
            next_state.add(r, k_tail)
            output.add(r, a_qk_t)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for target, value in zip(saved_tiles, (state16, r)):
                target[...] = value
            o_tile.transpose((1, 0))[...] = output.get().astype(bf16)
            advanced = next_state.get()
            plgpu.commit_smem()
            return advanced

        square = (_VALUE_ROWS, CHUNK)
        return mosaic.with_accumulators(products, square, square, (_VALUE_ROWS, key_dim))

    def store(outputs, staging, index, row, head, values, chunk):
        o, *saved = outputs
        plgpu.copy_smem_to_gmem(staging[0], o.at[row, pl.ds(chunk * CHUNK, CHUNK), head, values])
        for source, target in zip(staging[1:], saved):
            plgpu.copy_smem_to_gmem(source, target.at[index, chunk, values])

    heads_shape = (batch * heads, chunks, value_dim)
    saved_types = (
        jax.ShapeDtypeStruct((*heads_shape, key_dim), bf16),
        jax.ShapeDtypeStruct((*heads_shape, CHUNK), bf16),
    )
    saved_tiles = (tile((_VALUE_ROWS, key_dim), bf16), tile((_VALUE_ROWS, CHUNK), bf16))
    final_state, outputs, *saved = _run(
        (y_t, u_t, k_tail, q_gamma, a_qk_t, decay),
        state,
        chunks,
        (prefetch, advance, store),
        tiles=(
            tile((tuning.stages, key_dim, CHUNK), bf16),
            tile((tuning.stages, _VALUE_ROWS, CHUNK), bf16),
            tile((tuning.stages, CHUNK, key_dim), bf16),
            tile((tuning.stages, CHUNK, key_dim), bf16),
            tile((tuning.stages, CHUNK, CHUNK), bf16),
            plgpu.SMEM((tuning.stages, key_dim), jnp.float32),
        ),
        staging=(tile((CHUNK, _VALUE_ROWS), bf16), *(saved_tiles if save else ())),
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, value_dim), bf16),
            *(saved_types if save else ()),
        ),
        reverse=False,
        tuning=tuning,
    )
    return outputs, final_state, *(saved if save else (None, None))


def state_pass_backward(
    y_t, d_o, k_tail, q_gamma, a_qk_t, decay, x, d_state, *, tuning: Tuning = BACKWARD
):
    """Runs the gradients of the states back through a sequence.

    Args:
      y_t: [BH, N, K, 64] bf16, as in `state_pass_forward`.
      d_o: [B, T, H, V] bf16, cotangent of the outputs.
      k_tail: [BH, T, K].
      q_gamma: [BH, T, K].
      a_qk_t: [BH, N, 64, 64].
      decay: [BH, N, K] fp32.
      x: [BH, N, 2, 64, 64] bf16, in two parts.
      d_state: [B, H, V, K] fp32, cotangent of the final state.
      tuning: how far copies run ahead.

    Returns:
      dZ [BH, T, V] bf16, the gradient of each chunk's outgoing state [BH, N, V, K] bf16, and that
      of the initial state [B, H, V, K] fp32.
    """
    batch, heads, value_dim, key_dim = d_state.shape
    length = k_tail.shape[1]
    chunks = length // CHUNK
    bf16 = jnp.bfloat16

    def prefetch(refs, tiles, barrier, index, row, head, values, chunk):
        y_t, d_o, k_tail, q_gamma, a_qk_t, decay, x = refs
        rows = pl.ds(chunk * CHUNK, CHUNK)
        sources = (
            y_t.at[index, chunk],
            d_o.at[row, rows, head, values],
            k_tail.at[index, rows],
            q_gamma.at[index, rows],
            a_qk_t.at[index, chunk],
            decay.at[index, chunk],
            x.at[index, chunk],
        )
        for source, target in zip(sources, tiles):
            plgpu.copy_gmem_to_smem(source, target, barrier)

    def advance(d_state, tiles, staging):
        y_t, d_o, k_tail, q_gamma, a_qk_t, decay, x = tiles
        d_z_tile, d_state_tile = staging
        d_state16 = d_state.astype(bf16)
        d_o_t = d_o.transpose((1, 0))

        def products(d_residual, previous, d_z):
            d_residual.add(d_state16, k_tail.transpose((1, 0)))
            d_residual.add(d_o_t, a_qk_t.transpose((1, 0)))
            gamma = plgpu.load(decay, layout=COLUMNS)
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

    def store(outputs, staging, index, row, head, values, chunk):
        d_z, d_states = outputs
        d_z_tile, d_state_tile = staging
        plgpu.copy_smem_to_gmem(d_z_tile, d_z.at[index, pl.ds(chunk * CHUNK, CHUNK), values])
        plgpu.copy_smem_to_gmem(d_state_tile, d_states.at[index, chunk, values])

    d_initial_state, d_z, d_states = _run(
        (y_t, d_o, k_tail, q_gamma, a_qk_t, decay, x),
        d_state,
        chunks,
        (prefetch, advance, store),
        tiles=(
            tile((tuning.stages, key_dim, CHUNK), bf16),
            tile((tuning.stages, CHUNK, _VALUE_ROWS), bf16),
            tile((tuning.stages, CHUNK, key_dim), bf16),
            tile((tuning.stages, CHUNK, key_dim), bf16),
            tile((tuning.stages, CHUNK, CHUNK), bf16),
            plgpu.SMEM((tuning.stages, key_dim), jnp.float32),
            tile((tuning.stages, 2, CHUNK, CHUNK), bf16),
        ),
        staging=(tile((CHUNK, _VALUE_ROWS), bf16), tile((_VALUE_ROWS, key_dim), bf16)),
        out_type=(
            jax.ShapeDtypeStruct((batch * heads, length, value_dim), bf16),
            jax.ShapeDtypeStruct((batch * heads, chunks, value_dim, key_dim), bf16),
        ),
        reverse=True,
        tuning=tuning,
    )
    return d_z, d_states, d_initial_state


def _run(
    operands,
    state,
    chunks: int,
    roles: tuple[Callable, Callable, Callable],
    *,
    tiles,
    staging,
    out_type,
    reverse: bool,
    tuning: Tuning,
):
    """A block per 64 value rows and head: one warpgroup prefetches chunks, one advances the state.

    Returns the state after the last chunk, and the outputs of `out_type`.
    """
    prefetch, advance, store = roles
    batch, heads, value_dim, _ = state.shape

    def kernel(*refs):
        inputs, refs = refs[: len(operands)], refs[len(operands) :]
        first_state, final_state, *refs = refs
        outputs, refs = refs[: len(out_type)], refs[len(out_type) :]
        all_tiles, refs = refs[: len(tiles)], refs[len(tiles) :]
        staged, (full, empty) = refs[: len(staging)], refs[len(staging) :]
        row, head = lax.axis_index("b"), lax.axis_index("h")
        values = pl.ds(lax.axis_index("v") * _VALUE_ROWS, _VALUE_ROWS)
        warpgroup = lax.axis_index("wg")
        place = (row * heads + head, row, head, values)
        stages = tuning.stages
        # With 64-bit types on, Python numbers would count in int64.
        first, end = jnp.int32(0), jnp.int32(chunks)

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

                prefetch(inputs, [x.at[stage] for x in all_tiles], full.at[stage], *place, chunk)

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
                state = advance(state, [x.at[stage] for x in all_tiles], staged)
                plgpu.barrier_arrive(empty.at[stage])
                store(outputs, staged, *place, chunk)
                return state

            state = plgpu.load(first_state.at[row, head, values], layout=WGMMA, optimized=False)

            def through_accumulator(accumulator):
                accumulator.set(state)
                return accumulator.get()

            # Inside shard_map what is loaded is typed as varying over the mesh, what the loop
            # carries as not: an accumulator forgets the mark.
            shape = state.shape[0], state.shape[1]
            state = mosaic.with_accumulators(through_accumulator, shape)
            final_state.at[row, head, values][...] = lax.fori_loop(first, end, body, state)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        kernel_name=f"state_pass_{'backward' if reverse else 'forward'}_kernel",
        out_type=(jax.ShapeDtypeStruct(state.shape, jnp.float32), *out_type),
        grid=(heads, batch, value_dim // _VALUE_ROWS),
        grid_names=("h", "b", "v"),
        num_threads=2,
        thread_name="wg",
        scratch_types=[
            *tiles,
            *staging,
            plgpu.Barrier(num_arrivals=len(tiles), num_barriers=tuning.stages),
            plgpu.Barrier(num_barriers=tuning.stages),
        ],
        compiler_params=mosaic.COMPILER_PARAMS,
    )(*operands, state)
