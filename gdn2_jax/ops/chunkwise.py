"""The chunkwise form with its hand-derived, gate-aware backward, for any backend.

Time is cut into chunks. Inside a chunk everything is matrix products (paper eqs. 18-25): the
erase matrix T, its inverse A = (I + T)^-1, the reads A_qk, and

    Y = A Ebar    U = A Z    R = U - Y S    O = Q_gamma S + A_qk R    S' = gamma_C S + K_tail^T R

Only the last column is sequential. The sequence is processed in a few spans of chunks, one after
the other, so that intermediates live for one span; the backward (paper eqs. 49-82) recomputes them
from the inputs and the state at the start of each chunk, which is all that is saved.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.ops.decayed_products import (
    DecaySums,
    decay_sums,
    decay_sums_transpose,
    pair_products,
    pair_products_transpose,
)
from gdn2_jax.ops.triangular_inverse import unit_lower_inverse

_MAX_CHUNK_SIZE = 64
_MIN_CHUNK_SIZE = 16
_SPANS = 8


class _Masks(NamedTuple):
    """Where segments allow: pairs in a chunk, reads of the incoming state, writes to the next."""

    same: Bool[Array, "N B 1 C C"]
    reads: Bool[Array, "N B 1 C 1"]
    writes: Bool[Array, "N B 1 C 1"]
    carries: Bool[Array, "N B 1 1"]


class _Chunks(NamedTuple):
    """What a span of chunks computes before any state is known ([N B H] in front)."""

    e: Float[Array, "*n C K"]
    sums: DecaySums
    inverse: Float[Array, "*n C C"]
    read: Float[Array, "*n C C"]
    e_gamma: Float[Array, "*n C K"]
    q_gamma: Float[Array, "*n C K"]
    k_tail: Float[Array, "*n C K"]
    decay: Float[Array, "*n K"]
    y: Float[Array, "*n C K"]
    u: Float[Array, "*n C V"]


def chunkwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    w: Float[Array, "B T H V"],
    initial_state: Float[Array, "B H K V"],
    starts: Bool[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Outputs (in v's dtype) and final state (in g's dtype); arguments as in `recurrent`.

    The inputs keep their own dtypes; all arithmetic is in g's dtype. Where every input but g is
    bf16 or fp16, products with the state use the backend's default precision (TF32 on a GPU).
    """
    length = q.shape[1]
    chunk_size = max(_MIN_CHUNK_SIZE, min(_MAX_CHUNK_SIZE, 1 << (length - 1).bit_length()))
    chunks = -(-length // chunk_size)
    span = -(-chunks // _SPANS) * chunk_size
    padding = -length % span
    segments = None
    if starts is not None:
        segments = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
        segments = jnp.pad(segments, ((0, 0), (0, padding)), mode="edge")
    # Padded rows are exact no-ops: they write nothing and do not decay the state.
    padded = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v, g, b, w)]
    layout = _Layout(chunk_size, span, float(scale))
    outputs, final_state = _chunkwise(layout, *padded, initial_state, segments)
    return outputs[:, :length], final_state


class _Layout(NamedTuple):
    chunk_size: int
    span: int
    scale: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(layout, q, k, v, g, b, w, initial_state, segments):
    (outputs, final_state), _ = _forward(layout, q, k, v, g, b, w, initial_state, segments)
    return outputs, final_state


def _forward(layout, q, k, v, g, b, w, initial_state, segments):
    precision = _precision(q, k, v, b, w)
    inputs = (q, k, v, g, b, w)

    def span_forward(state, start):
        loaded, masks = _load(layout, inputs, segments, start)
        c = _prepare(*loaded, masks, precision)

        def next_chunk(state, chunk):
            y, u, k_tail, decay = chunk
            residual = u - _dot("ck,kv->cv", y, state, precision)
            update = _dot("ck,cv->kv", k_tail, residual, precision)
            return decay[..., None] * state + update, (state, residual)

        state, (states, residual) = jax.lax.scan(next_chunk, state, (c.y, c.u, c.k_tail, c.decay))
        outputs = _dot("ck,kv->cv", c.q_gamma, states, precision)
        outputs += _dot("cs,sv->cv", c.read, residual, precision)
        return state, (outputs.astype(v.dtype), states)

    starts = jnp.arange(0, q.shape[1], layout.span)
    final_state, (outputs, states) = jax.lax.scan(span_forward, initial_state, starts)
    return (_store(outputs), final_state), (*inputs, segments, states)


def _backward(layout, residuals, cotangents):
    q, k, v, g, b, w, segments, states = residuals
    d_outputs, d_final_state = cotangents
    precision = _precision(q, k, v, b, w)
    inputs = (q, k, v, g, b, w)

    def span_backward(d_state, xs):
        start, states = xs
        (q_, k_, v_, g_, b_, w_), masks = _load(layout, inputs, segments, start)
        d_out = _load_one(layout, d_outputs, start).astype(g.dtype)
        c = _prepare(q_, k_, v_, g_, b_, w_, masks, precision)
        residual = c.u - _dot("ck,kv->cv", c.y, states, precision)

        d_residual = _dot("rs,rv->sv", c.read, d_out, precision)
        d_states = _dot("ck,cv->kv", c.q_gamma, d_out, precision)

        def previous_chunk(d_state, chunk):
            y, k_tail, decay, d_residual, d_start = chunk
            d_residual += _dot("ck,kv->cv", k_tail, d_state, precision)
            d_start += decay[..., None] * d_state - _dot("ck,cv->kv", y, d_residual, precision)
            return d_start, (d_state, d_residual)

        d_state, (d_next, d_residual) = jax.lax.scan(
            previous_chunk, d_state, (c.y, c.k_tail, c.decay, d_residual, d_states), reverse=True
        )

        d_read = _dot("cv,sv->cs", d_out, residual, precision)
        d_q_gamma = _dot("cv,kv->ck", d_out, states, precision)
        d_k_tail = _dot("cv,kv->ck", residual, d_next, precision)
        d_y = -_dot("cv,kv->ck", d_residual, states, precision)
        d_z = _dot("rc,rv->cv", c.inverse, d_residual, precision)
        d_e_gamma = _dot("rc,rk->ck", c.inverse, d_y, precision)
        # -A^T dA A^T with dA = dU Z^T + dY Ebar^T, without forming dA.
        d_erase = -_dot("cv,sv->cs", d_z, c.u, precision)
        d_erase -= _dot("ck,sk->cs", d_e_gamma, c.y, precision)
        d_decay = jnp.sum(d_next * states, axis=-1)
        if masks is not None:
            d_erase = jnp.where(masks.same, d_erase, 0)
            d_read = jnp.where(masks.same, d_read, 0)
            d_q_gamma, d_e_gamma = d_q_gamma * masks.reads, d_e_gamma * masks.reads
            d_k_tail, d_decay = d_k_tail * masks.writes, d_decay * masks.carries

        de, dq, dk, d_to_row, d_from_row = pair_products_transpose(
            d_erase, d_read, c.e, q_, k_, c.sums
        )
        gamma, tail = jnp.exp(c.sums.prefix), jnp.exp(c.sums.suffix)
        de_state, dq_state, dk_state = gamma * d_e_gamma, gamma * d_q_gamma, tail * d_k_tail
        sums = DecaySums(
            d_to_row,
            d_from_row,
            prefix=c.e * de_state + q_ * dq_state,
            suffix=k_ * dk_state,
            total=jnp.exp(c.sums.total) * d_decay,
        )
        dg = decay_sums_transpose(layout.chunk_size, sums)
        diagonal = jnp.sum(d_out * residual, axis=-1, keepdims=True)
        de, dq, dk = de + de_state, dq + dq_state + diagonal * k_, dk + dk_state + diagonal * q_
        d_inputs = (
            layout.scale * dq,
            dk + b_ * de,
            w_ * d_z,
            dg,
            k_ * de,
            v_ * d_z,
        )
        d_inputs = tuple(dx.astype(x.dtype) for dx, x in zip(d_inputs, inputs))
        return d_state, d_inputs

    starts = jnp.arange(0, q.shape[1], layout.span)
    d_initial_state, d_inputs = jax.lax.scan(
        span_backward, d_final_state, (starts, states), reverse=True
    )
    return (*(_store(dx) for dx in d_inputs), d_initial_state, None)


_chunkwise.defvjp(_forward, _backward)


def _precision(*inputs: Array) -> jax.lax.Precision:
    low = all(x.dtype in (jnp.bfloat16, jnp.float16) for x in inputs)
    return jax.lax.Precision.DEFAULT if low else jax.lax.Precision.HIGHEST


def _dot(axes: str, a: Array, b: Array, precision: jax.lax.Precision) -> Array:
    left, rest = axes.split(",")
    right, out = rest.split("->")
    return jnp.einsum(f"...{left},...{right}->...{out}", a, b, precision=precision)


def _load_one(layout: _Layout, x: Array, start: Array) -> Array:
    """A span of [B, T, H, D] as [N, B, H, C, D]."""
    batch, _, heads, dim = x.shape
    span = jax.lax.dynamic_slice_in_dim(x, start, layout.span, axis=1)
    chunks = span.reshape(batch, -1, layout.chunk_size, heads, dim)
    return jnp.transpose(chunks, (1, 0, 3, 2, 4))


def _store(spans: Array) -> Array:
    """Spans [S, N, B, H, C, D] as [B, T, H, D]."""
    _, _, batch, heads, _, dim = spans.shape
    return jnp.transpose(spans, (2, 0, 1, 4, 3, 5)).reshape(batch, -1, heads, dim)


def _load(layout: _Layout, inputs: tuple[Array, ...], segments: Array | None, start: Array):
    q, k, v, g, b, w = (_load_one(layout, x, start).astype(inputs[3].dtype) for x in inputs)
    return (layout.scale * q, k, v, g, b, w), _segment_masks(layout, segments, start)


def _segment_masks(
    layout: _Layout, segments: Int[Array, "B T"] | None, start: Array
) -> _Masks | None:
    if segments is None:
        return None
    # The state comes from the token before the span; before the first token it is segment 0's.
    before = jnp.pad(segments, ((0, 0), (1, 0)))
    before = jax.lax.dynamic_slice_in_dim(before, start, layout.span, axis=1)
    before = jnp.moveaxis(before.reshape(before.shape[0], -1, layout.chunk_size), 1, 0)
    here = jax.lax.dynamic_slice_in_dim(segments, start, layout.span, axis=1)
    here = jnp.moveaxis(here.reshape(here.shape[0], -1, layout.chunk_size), 1, 0)
    first, last = before[..., :1], here[..., -1:]
    return _Masks(
        same=(here[..., :, None] == here[..., None, :])[:, :, None],
        reads=(here == first)[:, :, None, :, None],
        writes=(here == last)[:, :, None, :, None],
        carries=(first == last)[:, :, None],
    )


def _prepare(q, k, v, g, b, w, masks: _Masks | None, precision) -> _Chunks:
    e, z = b * k, w * v
    sums = decay_sums(g)
    erase, read = pair_products(e, q, k, sums)
    chunk_size = k.shape[-2]
    read += jnp.sum(q * k, axis=-1, keepdims=True) * jnp.eye(chunk_size, dtype=k.dtype)
    gamma, tail, decay = jnp.exp(sums.prefix), jnp.exp(sums.suffix), jnp.exp(sums.total)
    e_gamma, q_gamma, k_tail = gamma * e, gamma * q, tail * k
    if masks is not None:
        erase, read = jnp.where(masks.same, erase, 0), jnp.where(masks.same, read, 0)
        e_gamma, q_gamma = e_gamma * masks.reads, q_gamma * masks.reads
        k_tail, decay = k_tail * masks.writes, decay * masks.carries
    inverse = unit_lower_inverse(erase)
    y = _dot("rs,sk->rk", inverse, e_gamma, precision)
    u = _dot("rs,sv->rv", inverse, z, precision)
    return _Chunks(e, sums, inverse, read, e_gamma, q_gamma, k_tail, decay, y, u)
