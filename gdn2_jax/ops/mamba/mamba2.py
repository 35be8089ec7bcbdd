"""The Mamba-2 operator (state-space duality, arXiv 2405.21060)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.ops.arguments import (
    Implementation,
    as_arrays,
    check_dtypes,
    check_heads,
    check_no_kernel,
    check_segment_ids,
    check_shape,
    match_varying_axes,
    opaque,
    segment_starts,
)
from gdn2_jax.ops.isolation import isolated
from gdn2_jax.ops.mamba.scalar_decay import (
    join,
    layout_for,
    mix_chunks,
    over_spans,
    split,
    split_segments,
)
from gdn2_jax.ops.precision import HIGHEST, arithmetic_for, finite_log_decay


def mamba2(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H"],
    dt: Float[Array, "B T H"],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The selective state-space recurrence of Mamba-2 over a sequence.

    For every head, with the state S of shape [K, V]:

        S_t = exp(g_t) S_{t-1} + dt_t k_t v_t^T        o_t = S_t^T q_t

    Mamba's names are C for q, B for k, x for v and dt A for g; its skip D x is the caller's. Head h
    reads group h // (H / G). Both results are differentiable in every floating-point input; each
    cotangent has its input's dtype. Reverse mode only, except through "recurrent".

    Args:
      q: queries of each group; bf16, fp16, fp32 or fp64, as `k` and `v` (mixtures allowed). Matrix
        products read them in bf16 if all are bf16 or fp16; in fp32 at the backend's default
        precision (TF32 on a GPU) if all are fp16.
      k: keys of each group.
      v: values.
      g: log-decay, <= 0, of any size; -inf resets the state, and has gradient 0. fp32 (fp64 when
        any other input is fp64).
      dt: time step, the weight of the token's write, >= 0; dtype as `g`.
      initial_state: state before the first token, dtype as `g`; zeros if None.
      segment_ids: document of each token; the state restarts from zero at every change.
        `initial_state` feeds the first segment of a row.
      implementation: "xla" (chunkwise), "recurrent" (the definition, token by token), or None for
        "xla".

    Returns:
      Outputs of `v`'s shape and dtype, and the state after the last token in `g`'s dtype.

    Raises:
      ValueError: an argument has a wrong shape or dtype, or `implementation` is unknown.
      NotImplementedError: `implementation` is "pallas": there is no kernel.
    """
    check_no_kernel(implementation)
    q, k, v, g, dt, initial_state, segment_ids = as_arrays(
        (q, k, v, g, dt, initial_state, segment_ids)
    )
    _check_inputs(q, k, v, g, dt, "B T")
    batch, length, _, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    state_shape = (batch, heads, key_dim, value_dim)
    dtype = _check_dtypes(q, k, v, g, dt, "initial_state", initial_state, state_shape)
    check_segment_ids(segment_ids, (batch, length))
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, dtype)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    form = _recurrent if implementation == "recurrent" else _chunkwise
    arrays = opaque((q, k, v, g, dt, initial_state, starts))
    outputs, final_state = form(*match_varying_axes(arrays))
    return opaque((outputs.astype(v.dtype), final_state))


def mamba2_step(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B H V"],
    g: Float[Array, "B H"],
    dt: Float[Array, "B H"],
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """One token of `mamba2`, for decoding with constant memory.

    Args:
      state: state before the token, dtype as `g`.
      q: query; dtypes of all inputs as in `mamba2`.
      k: key.
      v: value.
      g: log-decay, <= 0; -inf resets the state.
      dt: time step.

    Returns:
      The state after the token and the output, of `v`'s shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape or dtype.
    """
    state, q, k, v, g, dt = as_arrays((state, q, k, v, g, dt))
    _check_inputs(q, k, v, g, dt, "B")
    state_shape = (*v.shape[:2], q.shape[-1], v.shape[-1])
    dtype = _check_dtypes(q, k, v, g, dt, "state", state, state_shape)
    state, *inputs = opaque((state, *(x.astype(dtype) for x in (q, k, v, g, dt))))
    state, o = _step(state, *inputs)
    return opaque((state, o.astype(v.dtype)))


def _step(state, q, k, v, g, dt):
    """`mamba2_step` in one dtype."""
    q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1) for x in (q, k))
    written = k[..., :, None] * (dt[..., None] * v)[..., None, :]
    state = jnp.exp(g)[..., None, None] * state + written
    return state, jnp.einsum("bhkv,bhk->bhv", state, q, precision=HIGHEST)


def _recurrent(q, k, v, g, dt, initial_state, starts: Bool[Array, "B T"] | None):
    """The definition; any form of differentiation works through it."""

    def body(state, token):
        *inputs, start = token
        if start is not None:
            state = jnp.where(start[:, None, None, None], 0, state)
        return _step(state, *inputs)

    inputs = (*(x.astype(g.dtype) for x in (q, k, v, g, dt)), starts)
    time_major = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    final_state, outputs = jax.lax.scan(body, initial_state, time_major)
    return jnp.moveaxis(outputs, 0, 1), final_state


def _chunkwise(q, k, v, g, dt, initial_state, starts: Bool[Array, "B T"] | None):
    """The matrix form (arXiv 2405.21060, section 6)."""
    batch, length, groups, _ = q.shape
    heads = v.shape[2]
    arithmetic = arithmetic_for((q, k, v), g.dtype)
    layout = layout_for(length)

    def span(state, tokens):
        (q, k, v, g, dt), segments = tokens
        q, k = jnp.moveaxis(q, 2, 3), jnp.moveaxis(k, 2, 3)
        v, g, dt = (
            x.reshape(*x.shape[:2], groups, heads // groups, *x.shape[3:])
            for x in (jnp.moveaxis(x, 2, 3) for x in (v, g, dt))
        )
        q, k, v = (x.astype(arithmetic.operand) for x in (q, k, v))
        outputs, state = mix_chunks((q, q), (k, k), v, g, dt, dt, state, segments, arithmetic)
        outputs = outputs.reshape(*outputs.shape[:2], heads, *outputs.shape[4:])
        return state, jnp.moveaxis(outputs, 2, 3).astype(out_dtype)

    def run(tokens, initial_state):
        tokens = tuple(split(x, layout) for x in tokens)
        state = initial_state.reshape(batch, groups, -1, *initial_state.shape[2:])
        state, outputs = over_spans(span, state, (tokens, split_segments(starts, layout)))
        return join(outputs, layout), state.reshape(initial_state.shape)

    out_dtype = v.dtype
    return isolated(run, (q, k, v, finite_log_decay(g), dt), initial_state, starts)


def _check_inputs(q, k, v, g, dt, leading: str) -> None:
    check_heads(q, v, f"{leading} G K", f"{leading} H V")
    check_shape("k", k, q.shape)
    check_shape("g", g, v.shape[:-1])
    check_shape("dt", dt, v.shape[:-1])


def _check_dtypes(q, k, v, g, dt, name: str, state, state_shape: tuple[int, ...]) -> jnp.dtype:
    full = {"g": g, "dt": dt}
    if state is not None:
        check_shape(name, state, state_shape)
        full[name] = state
    return check_dtypes({"q": q, "k": k, "v": v}, full)
