"""The chunkwise form with its hand-derived, gate-aware backward, for any backend.

Time is cut into chunks. Inside a chunk everything is matrix products (paper eqs. 18-25): the
erase matrix T, its inverse A = (I + T)^-1, the reads A_qk, and

    Y = A Ebar    U = A Z    R = U - Y S    O = Q_gamma S + A_qk R    S' = gamma_C S + K_tail^T R

Only the last column is sequential. The sequence is processed in a few spans of chunks, one after
the other, so that intermediates live for one span; the backward (paper eqs. 49-82) recomputes them
from the inputs and the state at the start of each chunk, which is all that is saved.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.ops.arguments import opaque, segment_starts
from gdn2_jax.ops.gated_delta_rule_2.decayed_products import (
    Decayed,
    decayed,
    from_chunk_start,
    pair_products,
    pair_products_transpose,
    to_chunk_end,
)
from gdn2_jax.ops.gated_delta_rule_2.documents import Chunks, align, state_of, with_state
from gdn2_jax.ops.gated_delta_rule_2.triangular_inverse import unit_lower_inverse
from gdn2_jax.ops.isolation import from_there_on, in_document, not_finite, replace
from gdn2_jax.ops.precision import Arithmetic, arithmetic_for, finite_log_decay

_MAX_CHUNK_SIZE = 64
_MIN_CHUNK_SIZE = 16
_SPANS = 4
_UNROLL = 4


class _Masks(NamedTuple):
    """Where segments allow: pairs in a chunk, reads of the incoming state, writes to the next."""

    same: Bool[Array, "N B 1 C C"]
    reads: Bool[Array, "N B 1 C 1"]
    writes: Bool[Array, "N B 1 C 1"]
    carries: Bool[Array, "N B 1 1"]


class _Chunks(NamedTuple):
    """What a span of chunks computes before any state is known ([N B H] in front)."""

    operands: Decayed
    inverse: Float[Array, "*n C C"]
    read: Float[Array, "*n C C"]
    q_gamma: Float[Array, "*n C K"]
    k_tail: Float[Array, "*n C K"]
    decay: Float[Array, "*n K 1"]
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
    chunk_size = _chunk_size(length)
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
    results: Any = _chunkwise(layout, *padded, initial_state, segments, None)
    outputs, final_state = results
    return outputs[:, :length], final_state


def chunkwise_by_document(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    w: Float[Array, "B T H V"],
    initial_states: Float[Array, "B N H K V"],
    starts: Bool[Array, "B T"],
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B N H K V"]]:
    """`chunkwise`, with the states before and after each of the N documents of a row.

    The documents are laid apart, so that no two share a chunk: states are loaded and kept between
    chunks. That takes up to N chunks more.
    """
    (batch, length), count = q.shape[:2], initial_states.shape[1]
    chunk_size = _chunk_size(length)
    chunks = (length + count * (chunk_size - 1)) // chunk_size
    in_span = -(-chunks // _SPANS)
    spans = -(-chunks // in_span)
    place, documents = align(starts, count, chunk_size, spans * in_span)
    documents = jax.tree.map(lambda x: x.reshape(spans, in_span, batch), documents)
    rows = jnp.arange(batch)[:, None]

    def apart(x):
        shape = (batch, spans * in_span * chunk_size, *x.shape[2:])
        return jnp.zeros_like(x, shape=shape).at[rows, place].set(x, mode="drop")

    layout = _Layout(chunk_size, in_span * chunk_size, float(scale))
    inputs = map(apart, (q, k, v, g, b, w))
    results: Any = _chunkwise(layout, *inputs, initial_states, None, documents)
    outputs, final_states = results
    return outputs.at[rows, place].get(mode="fill", fill_value=jnp.nan), final_states


def _chunk_size(length: int) -> int:
    return max(_MIN_CHUNK_SIZE, min(_MAX_CHUNK_SIZE, 1 << (length - 1).bit_length()))


class _Layout(NamedTuple):
    chunk_size: int
    span: int
    scale: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(layout, *arguments):
    return _forward(layout, *arguments)[0]


def _forward(
    layout: _Layout,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    w: Float[Array, "B T H V"],
    initial_state: Float[Array, "B *N H K V"],
    segments: Int[Array, "B T"] | None,
    documents: Chunks | None,
):
    """Outputs, final states and what the backward needs.

    At most one of the last two arguments is given.

    With `documents` [S, N, B], of the chunks of all spans, there is a state for each document.
    """
    inputs = (q, k, v, g, b, w)
    arithmetic = arithmetic_for((q, k, v, b, w), g.dtype)
    product, operand = arithmetic.product, arithmetic.operand
    bad = None
    if segments is not None:
        judged = (q, k, v, finite_log_decay(g), b, w)
        bad = functools.reduce(jnp.logical_or, (not_finite(x, 3) for x in judged))
        bad = bad.at[:, 0].set(bad[:, 0] | not_finite(initial_state, 2))
        initial_state = replace(bad[:, 0], 0, initial_state)

    def span_forward(carry, xs):
        states, all_outputs = carry
        start, documents = xs
        loaded, masks = _load(layout, inputs, segments, bad, start)
        prepared = _prepare(*loaded, masks, arithmetic)

        def next_chunk(states, chunk):
            y, u, k_tail, decay, document = chunk
            state = _enter(states, initial_state, document, "first")
            residual = u - product("ck,kv->cv", y.astype(g.dtype), state)
            stored = state.astype(operand), residual.astype(operand)
            state = decay * state + product("ck,cv->kv", k_tail.astype(g.dtype), residual)
            return _leave(states, state, document), stored

        chunks = (prepared.y, prepared.u, prepared.k_tail, prepared.decay, documents)
        states, (before, residual) = jax.lax.scan(next_chunk, states, chunks, unroll=_UNROLL)
        outputs = product("ck,kv->cv", prepared.q_gamma, before) + product(
            "cs,sv->cv", prepared.read, residual
        )
        return (states, _store(all_outputs, layout.scale * outputs, start)), before

    starts = jnp.arange(0, q.shape[1], layout.span)
    carry = (_before_all(initial_state, documents), jnp.zeros_like(v))
    (states, outputs), before = jax.lax.scan(span_forward, carry, (starts, documents))
    final_state = states.current if states.kept is None else states.kept
    if bad is not None and segments is not None:
        after = from_there_on(bad, segment_starts(segments))
        outputs, final_state = (
            replace(after, jnp.nan, outputs),
            replace(after[:, -1], jnp.nan, final_state),
        )
    return (outputs, final_state), (*inputs, segments, documents, bad, before)


def _backward(layout, residuals, cotangents):
    q, k, v, g, b, w, segments, documents, bad, states = residuals
    inputs = (q, k, v, g, b, w)
    d_outputs, d_final_state = opaque(cotangents)
    arithmetic = arithmetic_for((q, k, v, b, w), g.dtype)
    product, operand = arithmetic.product, arithmetic.operand
    if bad is not None:
        reported = not_finite(d_outputs, 3)
        reported = reported.at[:, -1].set(reported[:, -1] | not_finite(d_final_state, 2))
        hidden = from_there_on(bad, segment_starts(segments)) | reported
        d_outputs = replace(hidden, 0, d_outputs)
        d_final_state = replace(hidden[:, -1], 0, d_final_state)

    def span_backward(carry, xs):
        d_states, all_d_inputs = carry
        start, states, documents = xs
        (q_, k_, v_, g_, b_, w_), masks = _load(layout, inputs, segments, bad, start)
        d_out = (layout.scale * _load_chunks(layout, d_outputs, start).astype(g.dtype)).astype(
            operand
        )
        prepared = _prepare(q_, k_, v_, g_, b_, w_, masks, arithmetic)
        residual = (prepared.u - product("ck,kv->cv", prepared.y, states)).astype(operand)

        def previous_chunk(d_states, chunk):
            y, q_gamma, k_tail, decay, d_residual, d_out, document = chunk
            d_state = _enter(d_states, d_final_state, document, "last")
            d_end_state = d_state.astype(operand)
            d_residual += product("ck,kv->cv", k_tail.astype(g.dtype), d_state)
            d_state = decay * d_state + product("ck,cv->kv", q_gamma, d_out)
            d_state -= product("ck,cv->kv", y.astype(g.dtype), d_residual)
            return _leave(d_states, d_state, document), (d_end_state, d_residual)

        d_residual = product("rs,rv->sv", prepared.read, d_out)
        d_states, (d_end_states, d_residual) = jax.lax.scan(
            previous_chunk,
            d_states,
            (
                prepared.y,
                prepared.q_gamma,
                prepared.k_tail,
                prepared.decay,
                d_residual,
                d_out,
                documents,
            ),
            reverse=True,
            unroll=_UNROLL,
        )

        d_read = product("cv,sv->cs", d_out, residual)
        d_q_gamma = product("cv,kv->ck", d_out, states, operand)
        d_k_tail = product("cv,kv->ck", residual, d_end_states, operand)
        # Where keys repeat, the inverse takes differences of rows that are close to each other, and
        # k^T dS vanishes by cancellation: neither dR nor dS may be rounded to `operand` before.
        d_y = -product("cv,kv->ck", d_residual, states.astype(g.dtype))
        d_z = product("rc,rv->cv", prepared.inverse, d_residual)
        d_e_gamma = product("rc,rk->ck", prepared.inverse, d_y).astype(operand)
        # -A^T dA A^T with dA = dU Z^T + dY Ebar^T, without forming dA.
        d_erase = -product("cv,sv->cs", d_z, prepared.u) - product(
            "ck,sk->cs", d_e_gamma, prepared.y
        )
        d_decay = jnp.sum(d_end_states.astype(g.dtype) * states.astype(g.dtype), axis=-1)
        if masks is not None:
            d_erase = jnp.where(masks.same, d_erase, 0)
            d_read = jnp.where(masks.same, d_read, 0)
            d_q_gamma, d_e_gamma = d_q_gamma * masks.reads, d_e_gamma * masks.reads
            d_k_tail, d_decay = d_k_tail * masks.writes, d_decay * masks.carries

        de, dq, dk, dg = pair_products_transpose(
            prepared.operands, d_erase, d_read, d_e_gamma, d_q_gamma, d_k_tail, d_decay, arithmetic
        )
        # The barrier keeps dg apart from the store, which changes the layout and would compute it
        # in strides.
        dg = jax.lax.optimization_barrier(dg)
        # Pairs r = s do not decay: their share stays out of the gradient of g.
        diagonal = jnp.sum(d_out.astype(g.dtype) * residual.astype(g.dtype), axis=-1, keepdims=True)
        dq, dk = dq + diagonal * k_, dk + diagonal * q_
        d_inputs = (dq, dk + b_ * de, w_ * d_z, dg, k_ * de, v_ * d_z)
        stored = tuple(_store(x, dx, start) for x, dx in zip(all_d_inputs, d_inputs))
        return (d_states, stored), None

    starts = jnp.arange(0, q.shape[1], layout.span)
    carry = (_before_all(d_final_state, documents), tuple(jnp.zeros_like(x) for x in inputs))
    (d_states, d_inputs), _ = jax.lax.scan(
        span_backward, carry, (starts, states, documents), reverse=True
    )
    d_initial_state = d_states.current if d_states.kept is None else d_states.kept
    if bad is not None:
        bad = in_document(bad | reported, segment_starts(segments))
        d_inputs = (replace(bad, jnp.nan, x) for x in d_inputs)
        d_initial_state = replace(bad[:, 0], jnp.nan, d_initial_state)
    return (*d_inputs, d_initial_state, None, None)


_chunkwise.defvjp(_forward, _backward)


class _States(NamedTuple):
    """What passes from chunk to chunk: the state, and what it was at the border of each document.

    Backwards in time, the gradients of both.
    """

    current: Float[Array, "B H K V"]
    kept: Float[Array, "B N H K V"] | None


def _before_all(given: Float[Array, "B *N H K V"], documents: Chunks | None) -> _States:
    """The states before the first chunk; a document without tokens keeps the state given for it."""
    if documents is None:
        return _States(given, None)
    return _States(jnp.zeros_like(given[:, 0]), given)


def _enter(
    states: _States,
    given: Float[Array, "B *N H K V"],
    document: Chunks | None,
    border: Literal["first", "last"],
) -> Float[Array, "B H K V"]:
    """The state with which a chunk begins: the one given where it is the document's first."""
    if document is None:
        return states.current
    at_border = getattr(document, border)[:, None, None, None]
    return jnp.where(at_border, state_of(given, document.document), states.current)


def _leave(states: _States, state: Float[Array, "B H K V"], document: Chunks | None) -> _States:
    """The states after a chunk that ends with `state`."""
    if document is None or states.kept is None:
        return _States(state, None)
    return _States(state, with_state(states.kept, document.document, state))


def _load_chunks(layout: _Layout, x: Array, start: Array) -> Array:
    """A span of [B, T, H, D] as [N, B, H, C, D]."""
    batch, _, heads, dim = x.shape
    span = jax.lax.dynamic_slice_in_dim(x, start, layout.span, 1, allow_negative_indices=False)
    chunks = span.reshape(batch, -1, layout.chunk_size, heads, dim)
    return jnp.transpose(chunks, (1, 0, 3, 2, 4))


def _store(x: Array, span: Array, start: Array) -> Array:
    """Writes a span [N, B, H, C, D] into [B, T, H, D], in its dtype."""
    batch, _, heads, dim = x.shape
    rows = jnp.transpose(span, (1, 0, 3, 2, 4)).reshape(batch, -1, heads, dim).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 1, allow_negative_indices=False)


def _load(
    layout: _Layout,
    inputs: tuple[Array, ...],
    segments: Int[Array, "B T"] | None,
    bad: Bool[Array, "B T H"] | None,
    start: Array,
):
    """A span's inputs, with zeros for tokens that are not finite, and its masks."""
    loaded = [_load_chunks(layout, x, start) for x in inputs]
    if bad is not None:
        bad = _load_chunks(layout, bad[..., None], start)
        loaded = [jnp.where(bad, 0, x) for x in loaded]
    # The barrier keeps the re-laid copies in the inputs' own dtype, read many times below.
    loaded = jax.lax.optimization_barrier(loaded)
    q, k, v, g, b, w = (x.astype(inputs[3].dtype) for x in loaded)
    return (q, k, v, finite_log_decay(g), b, w), _segment_masks(layout, segments, start)


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


def _prepare(q, k, v, g, b, w, masks: _Masks | None, arithmetic: Arithmetic) -> _Chunks:
    product, operand = arithmetic.product, arithmetic.operand
    operands = decayed(b * k, q, k, g, operand)
    erase, read = pair_products(operands, arithmetic)
    diagonal = np.eye(k.shape[-2], dtype=bool)
    read += jnp.where(diagonal, jnp.sum(q * k, axis=-1, keepdims=True), 0)
    e_gamma = from_chunk_start(operands.e_prefix, operands)
    q_gamma = from_chunk_start(operands.q_prefix, operands)
    k_tail = to_chunk_end(operands.k_suffix, operands)
    decay = operands.total
    if masks is not None:
        erase, read = jnp.where(masks.same, erase, 0), jnp.where(masks.same, read, 0)
        e_gamma, q_gamma = e_gamma * masks.reads, q_gamma * masks.reads
        k_tail, decay = k_tail * masks.writes, decay * masks.carries
    inverse = unit_lower_inverse(erase)
    return _Chunks(
        operands,
        inverse,
        read.astype(operand),
        q_gamma.astype(operand),
        k_tail.astype(operand),
        decay[..., None],
        y=product("rs,sk->rk", inverse, e_gamma).astype(operand),
        u=product("rs,sv->rv", inverse, w * v),
    )
