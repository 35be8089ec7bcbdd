"""The Mamba-3 operator: exponential-trapezoidal steps, rotating states, one or several inputs."""

import functools
import operator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.ops.arguments import (
    Implementation,
    as_arrays,
    check_dtypes,
    check_heads,
    check_layout,
    check_no_kernel,
    check_segment_ids,
    check_shape,
    match_varying_axes,
    opaque,
    segment_starts,
)
from gdn2_jax.ops.isolation import isolated
from gdn2_jax.ops.mamba.rotation import angle_gradient, phases, rotate, rotate_state, wrap
from gdn2_jax.ops.mamba.scalar_decay import (
    SAVED,
    join,
    layout_for,
    mix_chunks,
    over_spans,
    same_segment,
    split,
    split_segments,
)
from gdn2_jax.ops.precision import HIGHEST, arithmetic_for, finite_log_decay


class Mamba3Inputs(NamedTuple):
    """What the operator reads at each token; [B, T, ...] for a sequence, [B, ...] for a step.

    q, k, v and z may be bf16, fp16, fp32 or fp64; the rest is float32, float64 beside float64. Matrix
    products read them as those of `gdn2_jax.ops.mamba2`.

    Attributes:
      q: queries of R ranks and G groups, Mamba's C, before bias and rotation.
      k: keys, Mamba's B, likewise.
      v: values, Mamba's x.
      z: logits of the output gate.
      g: log-decay dt A, <= 0, of any size; -inf resets the state, and has gradient 0.
      dt: time step, >= 0.
      trapezoid: lambda in [0, 1], the share of a step that is weighted at its end.
      rotation: angular velocity of each of the A >= 1 rotated channel pairs, shared by the heads.
    """

    q: Float[Array, "B T R G K"]
    k: Float[Array, "B T R G K"]
    v: Float[Array, "B T H V"]
    z: Float[Array, "B T H V"]
    g: Float[Array, "B T H"]
    dt: Float[Array, "B T H"]
    trapezoid: Float[Array, "B T H"]
    rotation: Float[Array, "B T A"]


class Mamba3Weights(NamedTuple):
    """What the operator reads at every token, in full precision.

    Attributes:
      q_bias: added to the queries of each head.
      k_bias: added to the keys of each head.
      skip: Mamba's D, weight of the values in the output.
      v_rank: factor on v for each rank; None with one rank, as the next two.
      z_rank: factor on z for each rank.
      o_rank: weight of each rank in the output.
    """

    q_bias: Float[Array, "H R K"]
    k_bias: Float[Array, "H R K"]
    skip: Float[Array, "H"]
    v_rank: Float[Array, "H R V"] | None = None
    z_rank: Float[Array, "H R V"] | None = None
    o_rank: Float[Array, "H R V"] | None = None


class Mamba3State(NamedTuple):
    """What the next token needs to know of all before it, in full precision.

    Attributes:
      phase: cumulative angle of each rotated pair, in [-pi, pi].
      memory: the state S.
      k: the last token's keys, with bias and rotation.
      v: the last token's values.
    """

    phase: Float[Array, "B H A"]
    memory: Float[Array, "B H K V"]
    k: Float[Array, "B H R K"]
    v: Float[Array, "B H V"]


def mamba3(
    inputs: Mamba3Inputs,
    weights: Mamba3Weights,
    *,
    initial_state: Mamba3State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H V"], Mamba3State]:
    """The recurrence of Mamba-3 over a sequence, with its skip, gate and sum over ranks.

    For every head, with the state S of shape [K, V] and all sums over the R ranks r,

        phase_t = phase_{t-1} + dt_t rotation_t          q_t, k_t = Rot(phase_t) (q_t, k_t + biases)
        S_t = exp(g_t) (S_{t-1} + (1 - lambda_t) dt_t sum_r k_{t-1}^r (v_{t-1}^r)^T)
              + lambda_t dt_t sum_r k_t^r (v_t^r)^T                            v_t^r = v_rank^r v_t
        o_t = sum_r o_rank^r (S_t^T q_t^r + skip v_t^r) SiLU(z_rank^r z_t)

    With one rank (SISO) the rank weights are None and count as 1. Head h reads group
    h // (H / G). Pairs (i, i + K / 2), i < A, rotate. Everything is differentiable in every
    floating-point input; each cotangent has its input's dtype. Reverse mode and first derivatives
    only, except through "recurrent".

    Args:
      inputs: see `Mamba3Inputs`.
      weights: see `Mamba3Weights`.
      initial_state: state before the first token; zeros if None.
      segment_ids: document of each token; the state restarts at every change. `initial_state` feeds
        the first segment of a row.
      implementation: "xla" (chunkwise), "recurrent" (the definition, token by token), or None for
        "xla".

    Returns:
      Outputs of `v`'s shape and dtype, and the state after the last token.

    Raises:
      ValueError: an argument has a wrong shape or dtype, or `implementation` is unknown.
      NotImplementedError: `implementation` is "pallas": there is no kernel. Or a second derivative
        is taken through "xla".
    """
    check_no_kernel(implementation)
    inputs, weights, initial_state, segment_ids = as_arrays(
        (inputs, weights, initial_state, segment_ids)
    )
    dtype = _check_inputs(inputs, weights, initial_state, "B T")
    check_segment_ids(segment_ids, inputs.v.shape[:2])
    if initial_state is None:
        initial_state = mamba3_initial_state(inputs, "B T")
    starts = None if segment_ids is None else segment_starts(segment_ids)
    arguments = (inputs, _with_rank_weights(weights, inputs.v), initial_state, starts)
    inputs, weights, initial_state, starts = match_varying_axes(opaque(arguments))
    if implementation == "recurrent":
        outputs, state = _recurrent(inputs, weights, initial_state, starts, dtype)
    else:

        def run(inputs, initial_state):
            return _chunkwise(inputs, weights, initial_state, starts, dtype)

        finite = inputs._replace(g=finite_log_decay(inputs.g))
        outputs, state = isolated(run, finite, initial_state, starts)
    return opaque((outputs.astype(inputs.v.dtype), state))


def mamba3_step(
    state: Mamba3State, inputs: Mamba3Inputs, weights: Mamba3Weights
) -> tuple[Mamba3State, Float[Array, "B H V"]]:
    """One token of `mamba3`, for decoding with constant memory.

    Args:
      state: state before the token.
      inputs: of the token, without T.
      weights: as in `mamba3`.

    Returns:
      The state after the token and the output, of `v`'s shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape or dtype.
    """
    state, inputs, weights = as_arrays((state, inputs, weights))
    dtype = _check_inputs(inputs, weights, state, "B")
    value_dtype = inputs.v.dtype
    inputs = Mamba3Inputs(*(x.astype(dtype) for x in inputs))
    weights = _with_rank_weights(weights, inputs.v)
    state, o = _step(*opaque((state, inputs, weights)))
    return opaque((state, o.astype(value_dtype)))


def mamba3_initial_state(inputs: Mamba3Inputs, leading: Literal["B T", "B"] = "B T") -> Mamba3State:
    """Zeros of the state that these inputs lead to."""
    shapes = _state_shapes(inputs, leading)
    return Mamba3State(*(jnp.zeros(shape, inputs.g.dtype) for shape in shapes))


def restart(state: Mamba3State, where: Bool[Array, "B"]) -> Mamba3State:
    """The state with rows of zeros where a new document starts."""
    return Mamba3State(*(jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), 0, x) for x in state))


def _step(state: Mamba3State, inputs: Mamba3Inputs, weights: Any):
    """`mamba3_step` in one dtype, with all weights."""
    q, k, v, z, g, dt, trapezoid, rotation = inputs
    phase = wrap(state.phase + dt[..., None] * rotation[:, None])
    q = rotate(_to_heads(q, weights.q_bias), phase[:, :, None])
    k = rotate(_to_heads(k, weights.k_bias), phase[:, :, None])

    def outer(k, v):
        return jnp.einsum("bhrk,bhv,hrv->bhkv", k, v, weights.v_rank, precision=HIGHEST)

    before = ((1 - trapezoid) * dt)[..., None, None] * outer(state.k, state.v)
    now = (trapezoid * dt)[..., None, None] * outer(k, v)
    memory = jnp.exp(g)[..., None, None] * (state.memory + before) + now
    o = jnp.einsum("bhkv,bhrk->bhrv", memory, q, precision=HIGHEST)
    o += weights.skip[None, :, None, None] * (v[:, :, None] * weights.v_rank[None])
    return Mamba3State(phase, memory, k, v), _gated_sum(o, z[:, :, None], weights)


def _gated_sum(o, z, weights: Any):
    """Gate and sum over ranks: o [..., H, R, V] and z [..., H, 1, V] to [..., H, V]."""
    o_rank, z_rank = (jnp.broadcast_to(x, o.shape) for x in (weights.o_rank, weights.z_rank))
    return jnp.sum(o_rank * o * jax.nn.silu(z * z_rank), axis=-2)


def _to_heads(x: Float[Array, "*n R G K"], bias: Float[Array, "H R K"]):
    """Groups to heads with their biases, [..., H, R, K]."""
    x = jnp.moveaxis(x, -3, -2)
    x = jnp.repeat(x, bias.shape[0] // x.shape[-3], axis=-3)
    return x + jnp.broadcast_to(bias, x.shape)


def _with_rank_weights(weights: Mamba3Weights, v: Array) -> Mamba3Weights:
    if weights.v_rank is not None:
        return weights
    ones = jnp.ones((v.shape[-2], 1, v.shape[-1]), weights.q_bias.dtype)
    return weights._replace(v_rank=ones, z_rank=ones, o_rank=ones)


def _recurrent(inputs, weights, initial_state, starts: Bool[Array, "B T"] | None, dtype):
    """The definition; any form of differentiation works through it."""

    def body(state, token):
        inputs, start = token
        if start is not None:
            state = restart(state, start)
        return _step(state, inputs, weights)

    inputs = Mamba3Inputs(*(x.astype(dtype) for x in inputs))
    time_major = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, starts))
    initial_state = initial_state._replace(phase=wrap(initial_state.phase))
    state, outputs = jax.lax.scan(body, initial_state, time_major)
    return jnp.moveaxis(outputs, 0, 1), state


def _chunkwise(inputs, weights, initial_state, starts: Bool[Array, "B T"] | None, dtype):
    """The matrix form, on the look-ahead state P_t = S_t + (1 - lambda_{t+1}) dt_{t+1} k_t v_t^T.

    P_t = exp(g_t) P_{t-1} + (lambda_t dt_t + (1 - lambda_{t+1}) dt_{t+1}) k_t v_t^T decays and adds
    like Mamba-2's state, and o_t reads P_{t-1} and, with weight lambda_t dt_t, its own token.
    The token's own weight is apart, so the look-ahead weight of the next token never enters it.

    Within a span, phases start at 0. At its end the state is rotated back by the span's total
    angle. The angles of earlier chunks enter as constants; `mix_chunks` supplies their gradient
    from the states between chunks. So the gradient of a phase is a sum over one chunk. A sum over
    all later chunks would have terms that cancel.
    """
    k, v, dt, trapezoid = inputs.k, inputs.v, inputs.dt, inputs.trapezoid
    ranks, value_dim = k.shape[2], v.shape[-1]
    arithmetic = arithmetic_for(inputs[:4], dtype)
    layout = layout_for(v.shape[1], ranks)

    ahead = (1 - trapezoid) * dt
    # At the end of a segment the look-ahead is of another one, whose tokens do not read it.
    weight = trapezoid * dt + jnp.pad(ahead[:, 1:], ((0, 0), (0, 1), (0, 0)))
    before = jnp.einsum(
        *("bh,bhrk,bhv,hrv->bhkv", ahead[:, 0], initial_state.k, initial_state.v, weights.v_rank),
        precision=HIGHEST,
    )
    memory = rotate_state(initial_state.memory + before, -initial_state.phase)[:, :, None]

    def span(memory, xs):
        inputs, weight, segments = xs
        # [N, B, H, C, ...] from here on, and after them R where there are ranks.
        v, z, g, dt, trapezoid, weight = (
            jnp.moveaxis(x, 3, 2).astype(dtype) for x in (*inputs[2:7], weight)
        )
        same = None if segments is None else same_segment(segments)[:, :, None]
        phase = phases(dt, inputs.rotation[:, :, None], same)
        angles = phase[..., -1, :]
        ends = wrap(jnp.cumsum(jax.lax.stop_gradient(angles), axis=0))
        start = jnp.pad(ends[:-1], ((1, 0), *[(0, 0)] * 3))
        rows: Any = (
            _rotated_rows(arithmetic.operand, x, bias, start[..., None, :] + phase)
            for x, bias in ((inputs.q, weights.q_bias), (inputs.k, weights.k_bias))
        )
        q, k = rows
        v_rows = _rows(v[..., None, :] * weights.v_rank[None, None, :, None], arithmetic.operand)
        v_rows = v_rows[:, :, :, None]
        outputs, memory = mix_chunks(
            *(q, k, v_rows, g[:, :, :, None], weight[:, :, :, None]),
            *((trapezoid * dt)[:, :, :, None], memory, segments, arithmetic),
            chunk_angles=angles[:, :, :, None],
            skip=weights.skip[:, None],
        )
        outputs = checkpoint_name(outputs, SAVED).reshape(*v.shape[:4], ranks, value_dim)
        z, outputs = (jnp.moveaxis(x, 2, 3) for x in (z, outputs))
        outputs = _gated_sum(outputs, z[..., None, :], weights)
        memory = rotate_state(memory, -ends[-1][:, :, None])
        return memory, (outputs.astype(out_dtype), angles)

    out_dtype = v.dtype
    tokens = Mamba3Inputs(*(split(x, layout) for x in inputs))
    segments = split_segments(starts, layout)
    memory, (outputs, angles) = over_spans(span, memory, (tokens, split(weight, layout), segments))
    angles = angles.reshape(-1, *angles.shape[2:])
    angles = jnp.concatenate([initial_state.phase[None], angles])
    if segments is not None:
        # What turned in earlier segments is forgotten.
        ends = segments.here[..., -1].reshape(-1, v.shape[0])
        ends = jnp.pad(ends, ((1, 0), (0, 0)))
        angles = jnp.where((ends == ends[-1:])[..., None, None], angles, 0)
    phase = wrap(jnp.sum(angles, axis=0))
    last_k = _to_heads(k[:, -1].astype(dtype), weights.k_bias)
    state = Mamba3State(
        phase,
        rotate_state(memory[:, :, 0], phase),
        rotate(last_k, phase[:, :, None]),
        v[:, -1].astype(dtype),
    )
    return join(outputs, layout), state


def _rows(x: Float[Array, "N B H C R d"], dtype) -> Float[Array, "N B H C*R d"]:
    return x.reshape(*x.shape[:3], -1, x.shape[-1]).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotated_rows(
    dtype: jnp.dtype,
    x: Float[Array, "N B C R G K"],
    bias: Float[Array, "H R K"],
    phase: Float[Array, "N B H C A"],
) -> tuple[Float[Array, "N B H C*R K"], Float[Array, "N B H C*R K"]]:
    """Queries or keys of the heads, with bias and rotation, in `dtype`; twice, for two readers.

    The backward turns the gradients of both back in one pass, into an array of `dtype` from which
    the three gradients are summed.
    """
    rows = _rows(rotate(_unrotated(x, bias, phase.dtype), phase[..., None, :]), dtype)
    return rows, rows


def _unrotated(x, bias, dtype) -> Float[Array, "N B H C R K"]:
    return jnp.moveaxis(_to_heads(x.astype(dtype), bias), 3, 2)


def _rotated_rows_fwd(dtype, x, bias, phase):
    return _rotated_rows(dtype, x, bias, phase), (x, bias, phase)


def _rotated_rows_bwd(dtype, residuals, gradients):
    x, bias, phase = residuals
    (_, ranks, key_dim), groups, full = bias.shape, x.shape[-2], phase.dtype
    gradients = _differentiated_once(gradients)
    gradients = (x.reshape(*phase.shape[:4], ranks, key_dim) for x in gradients)
    gradient = operator.add(*(rotate(x, -phase[..., None, :]) for x in gradients)).astype(dtype)
    gradient = jax.lax.optimization_barrier(gradient)
    wide = gradient.astype(full)
    of_phase = angle_gradient(_unrotated(x, bias, full), wide, phase.shape[-1])
    of_x = jnp.sum(wide.reshape(*phase.shape[:2], groups, -1, *wide.shape[3:]), axis=3)
    return (
        jnp.transpose(of_x, (0, 1, 3, 4, 2, 5)).astype(x.dtype),
        jnp.sum(jax.lax.optimization_barrier(jnp.sum(wide, axis=(0, 1))), axis=1),
        jnp.sum(of_phase, axis=4),
    )


_rotated_rows.defvjp(_rotated_rows_fwd, _rotated_rows_bwd)


@jax.custom_jvp
def _differentiated_once[Gradients](x: Gradients) -> Gradients:
    """Refuses to be differentiated.

    The phases contain the angles of earlier chunks as constants; `mix_chunks` adds their gradient.
    Second derivatives do not see that, and would be wrong over several chunks.
    """
    return x


@_differentiated_once.defjvp
def _differentiated_once_jvp(primals, tangents):
    message = 'implementation: expected "recurrent" for second derivatives of mamba3, got "xla"'
    raise NotImplementedError(message)


def _state_shapes(inputs: Mamba3Inputs, leading: str) -> tuple[tuple[int, ...], ...]:
    batch, (heads, value_dim) = inputs.v.shape[0], inputs.v.shape[-2:]
    ranks, key_dim = inputs.q.shape[-3], inputs.q.shape[-1]
    return (
        (batch, heads, inputs.rotation.shape[-1]),
        (batch, heads, key_dim, value_dim),
        (batch, heads, ranks, key_dim),
        (batch, heads, value_dim),
    )


def _check_inputs(inputs, weights, state: Mamba3State | None, leading: str) -> jnp.dtype:
    q, v, rotation = inputs.q, inputs.v, inputs.rotation
    check_heads(q, v, f"{leading} R G K", f"{leading} H V")
    check_shape("k", inputs.k, q.shape)
    check_shape("z", inputs.z, v.shape)
    (ranks, _, key_dim), (heads, value_dim) = q.shape[-3:], v.shape[-2:]
    for name in ("g", "dt", "trapezoid"):
        check_shape(name, getattr(inputs, name), v.shape[:-1])
    check_layout("rotation", rotation, f"{leading} A")
    check_shape("rotation", rotation, (*v.shape[:-2], rotation.shape[-1]))
    if key_dim % 2 or rotation.shape[-1] > key_dim // 2:
        raise ValueError(
            f"rotation: expected at most K / 2 = {key_dim / 2} angles and an even K, "
            f"got {rotation.shape[-1]}"
        )
    check_shape("q_bias", weights.q_bias, (heads, ranks, key_dim))
    check_shape("k_bias", weights.k_bias, (heads, ranks, key_dim))
    check_shape("skip", weights.skip, (heads,))
    full = {name: getattr(inputs, name) for name in ("g", "dt", "trapezoid", "rotation")}
    full |= {name: getattr(weights, name) for name in ("q_bias", "k_bias", "skip")}
    for name in ("v_rank", "z_rank", "o_rank"):
        factor = getattr(weights, name)
        if factor is None and weights.v_rank is None and ranks == 1:
            continue
        if factor is None:
            raise ValueError(f"{name}: expected an array with {ranks} ranks, got None")
        check_shape(name, factor, (heads, ranks, value_dim))
        full[name] = factor
    if state is not None:
        for name, array, shape in zip(state._fields, state, _state_shapes(inputs, leading)):
            check_shape(f"state.{name}", array, shape)
            full[f"state.{name}"] = array
    return check_dtypes({name: getattr(inputs, name) for name in "qkvz"}, full)
