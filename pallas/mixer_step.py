"""One token of a GDN-2 layer between its projections, on a Hopper GPU: from products to products.

    q, k = unit(SiLU(conv(.)))    v = SiLU(conv(.))    e = sigmoid(b) k    z = sigmoid(w) v
    g = -exp(A_log) softplus(f0 F + dt_bias)    s = exp(g) S    S' = s + k (z - s^T e)^T
    o = S'^T q / sqrt(K)    y = RMSNorm(o) SiLU(g0 G + bias)

A block is one head of one row, a warpgroup owns some channels: it convolves these, then it owns these
columns of the state, see `decode_step`. State and windows of the convolutions are written in place.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, UInt32

from gdn2_jax.pallas import mosaic
from gdn2_jax.pallas.decode_step import rounded_columns

COLUMNS = 32
"""Of a warpgroup."""
PAST = 3
"""Inputs that a convolution keeps."""


class MixerParams(NamedTuple):
    """Parameters of a layer between its projections.

    Attributes:
      q_taps: of the query's convolution; `k_taps` and `v_taps` likewise.
      decay_kernel: F, the second one of the decay's two projections.
      gate_kernel: G, the second one of the output gate's.
      gate_bias: its bias.
      rate: exp(A_log), fp32, and `dt_bias` of each channel.
      norm_scale: of the output norm.
    """

    q_taps: Float[Array, "4 D"]
    k_taps: Float[Array, "4 D"]
    v_taps: Float[Array, "4 D"]
    decay_kernel: BFloat16[Array, "C D"]
    gate_kernel: BFloat16[Array, "C D"]
    gate_bias: Float[Array, "D"]
    rate: Float[Array, "D"]
    dt_bias: Float[Array, "D"]
    norm_scale: Float[Array, "C"]


@functools.partial(jax.jit, static_argnames=("columns", "epsilon"))
@mosaic.on_cuda
def mixer_step(
    state: Float[Array, "B H C C"],
    windows: tuple[BFloat16[Array, "B 3 D"], ...],
    projected: BFloat16[Array, "B F"],
    params: MixerParams,
    seeds: UInt32[Array, "B H"] | None = None,
    *,
    columns: tuple[int, ...],
    epsilon: float,
):
    """Advances a layer's state and windows by one token.

    Args:
      state: fp32 or bf16; C is 64 or 128, D = H C.
      windows: the last three inputs of the convolutions of q, k and v, zeros in place of those of
        other documents. They and the state are updated in place where the caller donates them.
      projected: what the layer's projections of its input are, side by side.
      params: of the layer.
      seeds: a bf16 state is rounded stochastically with these, else to nearest.
      columns: first columns in `projected` of q, k, v, b, w, and of the inputs f0 and g0 [C] of F and G.
      epsilon: of the norm.

    Returns:
      The new state, the new windows and the layer's output before its last projection, bf16 [B, D].
    """
    batch, heads, channels, _ = state.shape
    layout, shape = mosaic.WARP_COLUMNS, (channels, COLUMNS)
    rows_layout, columns_layout = layout.reduce(1), layout.reduce(0)
    warpgroups = channels // COLUMNS
    q_at, k_at, v_at, b_at, w_at, f_at, g_at = columns

    def mixer_step_kernel(projected, *refs, shared, outputs, exchanged, read):
        params, refs = (
            MixerParams(*refs[: len(MixerParams._fields)]),
            refs[len(MixerParams._fields) :],
        )
        seeds, refs = ((), refs) if is_nearest else (refs[:1], refs[1:])
        y, state, *windows = refs[-1], *refs[:-1]
        head, row = lax.axis_index("head"), lax.axis_index("row")
        wg = lax.axis_index("wg")
        values = pl.ds(wg * COLUMNS, COLUMNS)
        own = pl.ds(head * channels + wg * COLUMNS, COLUMNS)
        own_state = state.at[row, head, :, values]
        s = plgpu.load(own_state, layout=layout, optimized=False).astype(jnp.float32)

        def load(ref):
            return plgpu.load(ref, layout=columns_layout, optimized=False).astype(jnp.float32)

        def load_rows(ref):
            return plgpu.load(ref, layout=rows_layout, optimized=False).astype(jnp.float32)

        def wide(x):
            """One value a row, in all columns."""
            return plgpu.layout_cast(mosaic.over_columns(x, shape), layout)

        def of_projected(first):
            return load(projected.at[row, pl.ds(first + head * channels + wg * COLUMNS, COLUMNS)])

        def second(kernel, first):
            """The head's own columns of the second of two products."""
            tile = plgpu.load(kernel.at[:, own], layout=layout, optimized=False).astype(jnp.float32)
            x = load_rows(projected.at[row, pl.ds(first, channels)])
            return jnp.sum(tile * wide(x), axis=0)

        f = second(params.decay_kernel, f_at)
        z = second(params.gate_kernel, g_at)
        f += load(params.dt_bias.at[own])
        decay = jnp.exp(-load(params.rate.at[own]) * _softplus(f))
        seen = [
            [*(load(window.at[row, t, own]) for t in range(PAST)), of_projected(first)]
            for window, first in zip(windows, (q_at, k_at, v_at))
        ]
        query, key, value = (
            _silu(
                functools.reduce(jnp.add, [x * load(taps.at[t, own]) for t, x in enumerate(inputs)])
            )
            for taps, inputs in zip(params[:3], seen)
        )
        erase = key * _sigmoid(of_projected(b_at))
        write = value * _sigmoid(of_projected(w_at))
        for place, x in enumerate((decay, query, key, erase)):
            shared[place, values] = x
        z += load(params.gate_bias.at[own])
        gate = _silu(z)
        # Everybody has read the windows, too.
        plgpu.barrier_arrive(exchanged)
        plgpu.barrier_wait(exchanged)
        for window, inputs in zip(windows, seen):
            for t in range(PAST):
                mosaic.store_global(window.at[row, t, own], inputs[t + 1].astype(window.dtype))
        decay, query, key, erase = (wide(load_rows(shared.at[place])) for place in range(4))
        # One value a column, the same in all.
        per_query, per_key = (lax.rsqrt(jnp.sum(x * x, axis=0) + 1e-6) for x in (query, key))

        s = s * decay
        residual = (write - per_key * jnp.sum(s * erase, axis=0)) * per_key
        s = s + key * plgpu.layout_cast(mosaic.over_rows(residual, shape), layout)
        # Every thread overwrites what it read itself.
        kept = rounded_columns(
            s, layout, state.dtype, wg * COLUMNS, channels, *[ref[row, head] for ref in seeds]
        )
        mosaic.store_global(own_state, kept)
        output = jnp.sum(s * query, axis=0) * (per_query * channels**-0.5)
        outputs[values] = output
        plgpu.barrier_arrive(read)
        plgpu.barrier_wait(read)
        squares = wide(load_rows(outputs))
        inverse = lax.rsqrt(jnp.sum(squares * squares, axis=0) / channels + epsilon)
        output *= inverse * load(params.norm_scale.at[values]) * gate
        mosaic.store_global(y.at[row, own], output.astype(y.dtype))

    is_nearest = seeds is None
    run = mosaic.kernel(
        mixer_step_kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads * channels), projected.dtype),
        grid=(heads, batch),
        grid_names=("head", "row"),
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types={
            "shared": plgpu.SMEM((4, channels), jnp.float32),
            "outputs": plgpu.SMEM((channels,), jnp.float32),
            "exchanged": plgpu.Barrier(num_arrivals=warpgroups),
            "read": plgpu.Barrier(num_arrivals=warpgroups),
        },
        compiler_params=dataclasses.replace(
            mosaic.COMPILER_PARAMS, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    refs = [jax.new_ref(x) for x in (state, *windows)]
    y = run(projected, *params, *(() if is_nearest else (seeds,)), *refs)
    state, *new_windows = (jax.freeze(ref) for ref in refs)
    return state, tuple(new_windows), y


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def _silu(x):
    return x / (1 + jnp.exp(-x))


def _softplus(x):
    """log(1 + exp(x)), of negative x to some bits, too."""
    small = jnp.exp(-jnp.abs(x))
    series = small * (1 - small * (0.5 - small * (1 / 3)))
    return jnp.maximum(x, 0) + jnp.where(small < 0.01, series, jnp.log(1 + small))
