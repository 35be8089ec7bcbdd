"""The chunkwise form of linear attention with one decay a head, for Mamba-2 and Mamba-3.

For every head, with a state P of shape [K, V] that tokens add to by weights of their own,

    P_t = exp(g_t) P_{t-1} + weight_t k_t v_t^T
    o_t = exp(g_t) P_{t-1}^T q_t + own_t (q_t^T k_t) v_t

In a chunk of C tokens what they read of the chunk is a weighted [C, C] product and the rest is read
from the state at the chunk's start; states pass from chunk to chunk. Heads of a group share q and
k, whose product is then formed once. A token may hold R rows of q, k and v (the ranks of Mamba-3
MIMO), which decay alike.

Time is cut into spans of a few chunks. The backward recomputes a span from its inputs and a few
saved arrays (SAVED, mainly the states between chunks). Other intermediates live for one span. No array
of size T x T or T x K x V is kept.

Every exponent is a sum of log-decays g <= 0, never a difference of cumulative sums: it is not
positive and keeps its precision beside neighbours of any size, and so does the gradient of g. The
sums over all pairs of a chunk are one product with a constant matrix of zeros and ones.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.ops.mamba.rotation import angle_gradient
from gdn2_jax.ops.precision import HIGHEST, Arithmetic

_ROWS = 64
_MIN_CHUNK_SIZE = 16
_SPANS = 4
_MAX_CHUNKS = 16
SAVED = "saved for the backward"
"""The name of the intermediates that `jax.checkpoint` saves in a span."""


class Layout(NamedTuple):
    """How a sequence is cut: into spans of equally many chunks, with padding at the end."""

    length: int
    chunk_size: int
    spans: int
    padded: int


class Segments(NamedTuple):
    """Segment of each token, and of the token before each chunk, counted from 0 in a row."""

    here: Int[Array, "*n B C"]
    before: Int[Array, "*n B"]


def layout_for(length: int, ranks: int = 1) -> Layout:
    """Chunks of 64 rows where a token holds `ranks` rows, fewer for short sequences.

    More rows a token make more, shorter spans, for the same memory; long sequences make more spans.
    """
    chunk_size = min(_ROWS // min(ranks, _ROWS), 1 << (length - 1).bit_length())
    chunk_size = max(_MIN_CHUNK_SIZE, chunk_size)
    chunks = -(-length // chunk_size)
    span = min(-(-chunks // (_SPANS * ranks)), _MAX_CHUNKS) * chunk_size
    spans = -(-length // span)
    return Layout(length, chunk_size, spans, spans * span)


def split(x: Float[Array, "B T *d"], layout: Layout) -> Float[Array, "S N B C *d"]:
    """Cuts time into spans and chunks; the padding is zero, which writes and decays nothing."""
    padding = [(0, 0), (0, layout.padded - layout.length)] + [(0, 0)] * (x.ndim - 2)
    return _cut(jnp.pad(x, padding), layout)


def join(x: Float[Array, "S N B C *d"], layout: Layout) -> Float[Array, "B T *d"]:
    """The inverse of `split`."""
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(x.shape[0], layout.padded, *x.shape[4:])[:, : layout.length]


def split_segments(starts: Bool[Array, "B T"] | None, layout: Layout) -> Segments | None:
    """The segments of all chunks, from where they start; the first token continues segment 0."""
    if starts is None:
        return None
    segments = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    segments = jnp.pad(segments, ((0, 0), (0, layout.padded - layout.length)), mode="edge")
    before = jnp.pad(segments, ((0, 0), (1, 0)))[:, : layout.padded : layout.chunk_size]
    before = jnp.moveaxis(before.reshape(before.shape[0], layout.spans, -1), 0, 2)
    return Segments(_cut(segments, layout), before)


def same_segment(segments: Segments) -> Bool[Array, "*n B C C"]:
    """Which tokens of a chunk share a segment."""
    return segments.here[..., :, None] == segments.here[..., None, :]


def over_spans[Carry, Tokens, Results](
    span: Callable[[Carry, Tokens], tuple[Carry, Results]], carry: Carry, tokens: Tokens
) -> tuple[Carry, Results]:
    """Runs `span` over the leading axis of `tokens`; the backward has its inputs and `SAVED`."""
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)
    return jax.lax.scan(jax.checkpoint(span, prevent_cse=False, policy=policy), carry, tokens)


def mix_chunks(
    q: tuple[Float[Array, "N B G CR K"], Float[Array, "N B G CR K"]],
    k: tuple[Float[Array, "N B G CR K"], Float[Array, "N B G CR K"]],
    v: Float[Array, "N B G E CR V"],
    g: Float[Array, "N B G E C"],
    weight: Float[Array, "N B G E C"],
    diagonal_weight: Float[Array, "N B G E C"],
    state: Float[Array, "B G E K V"],
    segments: Segments | None,
    arithmetic: Arithmetic,
    chunk_angles: Float[Array, "N B G E A"] | None = None,
    skip: Float[Array, "G E"] | None = None,
) -> tuple[Float[Array, "N B G E CR V"], Float[Array, "B G E K V"]]:
    """Outputs of the N chunks of a span and the state after them.

    A token has R rows, one a rank: CR = C * R.

    Args:
      q: queries of each group, once for the keys and once for the states, so that the caller may
        sum the two gradients; q, k and v in the dtype of the products' operands.
      k: keys of each group, once for the queries and once for the states.
      v: values of each of the group's E heads.
      g: log-decay, finite; in full precision as `weight`, `diagonal_weight` and `state`.
      weight: of the token's write into the state.
      diagonal_weight: weight of a token's write in its own output.
      state: before the first chunk.
      segments: of the span's tokens; None if the state never restarts.
      arithmetic: of the products.
      chunk_angles: angles by which each chunk rotates the channel pairs of all later tokens. The
        phases of q and k contain them already, as constants.
      skip: weight of v in the outputs; 0 if None.

    Returns:
      Outputs in the operands' dtype, the state in full precision.
    """
    product = functools.partial(_product, arithmetic)
    operand, full = arithmetic.operand, g.dtype
    chunk_size, rows = g.shape[-1], v.shape[-2]
    ranks = rows // chunk_size
    from_start, to_end, between, total = _decays(g)
    if segments is not None:
        here, before = segments.here[:, :, None, None], segments.before[:, :, None, None]
        last = here[..., -1]
        between = jnp.where(same_segment(segments)[:, :, None, None], between, -jnp.inf)
        from_start = jnp.where(here == before[..., None], from_start, -jnp.inf)
        to_end = jnp.where(here == last[..., None], to_end, -jnp.inf)
        total = jnp.where(before == last, total, -jnp.inf)
    between = jnp.where(np.tri(chunk_size, k=-1, dtype=bool), between, -jnp.inf)
    q, k = ((x[:, :, :, None], y[:, :, :, None]) for x, y in (q, k))
    weights = jnp.exp(between) * weight[..., None, :]
    weights = jnp.where(np.eye(chunk_size, dtype=bool), diagonal_weight[..., None], weights)
    pairs = product("rk,sk->rs", q[0], k[0]).astype(full)
    pairs = pairs.reshape(*pairs.shape[:4], chunk_size, ranks, chunk_size, ranks)
    reads = weights[..., :, None, :, None] * pairs
    reads = reads.reshape(*reads.shape[:4], rows, rows)
    if skip is not None:
        on_diagonal = np.eye(rows, dtype=bool)
        reads += jnp.where(on_diagonal, skip[None, None, ..., None, None], 0)
    reads = reads.astype(operand)

    def to_rows(x):
        return jnp.repeat(x, ranks, axis=-1)[..., None]

    tail = (v.astype(full) * to_rows(jnp.exp(to_end) * weight)).astype(operand)
    written = product("rk,rv->kv", k[1], tail)

    state, states = _pass_states(state, written, jnp.exp(total), chunk_angles)
    carried = _carried(arithmetic, q[1], states, to_rows(from_start))
    within = product("rs,sv->rv", reads, v).astype(full)
    return (within + carried).astype(operand), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _carried(
    arithmetic: Arithmetic,
    q: Float[Array, "N B G #E rows K"],
    states: Float[Array, "N B G E K V"],
    decay: Float[Array, "N B G E rows 1"],
) -> Float[Array, "N B G E rows V"]:
    """What the rows read of the states before their chunks, after a log-decay; full precision.

    The gradient of the decay follows from q and its gradient, unless the heads share q: then it
    follows from the result.
    """
    carried: Any = _product(arithmetic, "rk,kv->rv", q, states)
    return jnp.exp(decay) * carried.astype(decay.dtype)


def _carried_fwd(arithmetic, q, states, decay):
    return _carried(arithmetic, q, states, decay), (q, states, decay)


def _carried_bwd(arithmetic, residuals, gradient):
    q, states, decay = residuals
    decayed = (jnp.exp(decay) * gradient).astype(arithmetic.operand)
    of_q, of_states = _product_bwd(arithmetic, "rk,kv->rv", (q, states), decayed)
    terms = of_q.astype(decay.dtype) * q
    if q.shape[3] < decay.shape[3]:
        carried: Any = _product(arithmetic, "rk,kv->rv", q, states)
        terms = decayed * carried.astype(decay.dtype)
    return of_q, of_states, jnp.sum(terms, axis=-1, keepdims=True)


_carried.defvjp(_carried_fwd, _carried_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    arithmetic: Arithmetic,
    axes: str,
    a: Float[Array, "N B G #E i j"],
    b: Float[Array, "N B G #E k l"],
) -> Float[Array, "N B G #E m n"]:
    """A matrix product in the operands' dtype; its gradients are formed without transposition."""
    return arithmetic.product(axes, a, b, arithmetic.operand)


def _product_fwd(arithmetic, axes, a, b):
    return _product(arithmetic, axes, a, b), (a, b)


def _product_bwd(arithmetic, axes, operands, gradient):
    a, b = operands
    of_a, of_b, out = axes.replace("->", ",").split(",")

    def of(x, axes, other, other_axes):
        shared = x.shape[3] < gradient.shape[3]
        return jnp.einsum(
            f"nbge{out},nbge{other_axes}->nbg{'' if shared else 'e'}{axes}",
            *(gradient, other),
            precision=arithmetic.precision,
            preferred_element_type=arithmetic.operand,
        ).reshape(x.shape)

    return of(a, of_a, b, of_b), of(b, of_b, a, of_a)


_product.defvjp(_product_fwd, _product_bwd)


@jax.custom_vjp
def _pass_states(
    state: Float[Array, "*n K V"],
    written: Float[Array, "N *n K V"],
    decay: Float[Array, "N *n"],
    chunk_angles: Float[Array, "N *n A"] | None,
) -> tuple[Float[Array, "*n K V"], Float[Array, "N *n K V"]]:
    """The state after N chunks and those before each, these in the dtype of `written`.

    A chunk decays the state and adds what it wrote. The forward does not read `chunk_angles`: the phases
    already contain it. Only its gradient is computed here, because here it is a sum over one state;
    at its uses it would be a sum over all later rows.
    """
    del chunk_angles
    return _accumulate(state, written, decay)


def _pass_states_fwd(state, written, decay, chunk_angles):
    results = _pass_states(state, written, decay, chunk_angles)
    state, states = checkpoint_name(results, SAVED)
    # JAX 0.11 loses arguments that are residuals themselves in second derivatives.
    decay, chunk_angles = jax.lax.optimization_barrier((decay, chunk_angles))
    return (state, states), (states, state, decay, chunk_angles)


def _pass_states_bwd(residuals, gradients):
    states, state, decay, chunk_angles = residuals
    of_state, of_states = gradients
    gradient, of_written = _accumulate(of_state, of_states, decay, reverse=True)
    wide, after = (x.astype(decay.dtype) for x in (states, of_written))
    of_decay = jnp.sum(wide * after, (-2, -1))
    if chunk_angles is None:
        return gradient, of_written, of_decay, None
    wide = jnp.concatenate([wide[1:], state[None]])
    of_angles = -jnp.sum(angle_gradient(wide, after, chunk_angles.shape[-1], axis=-2), -1)
    return gradient, of_written, of_decay, of_angles


_pass_states.defvjp(_pass_states_fwd, _pass_states_bwd)


def _accumulate(
    state: Float[Array, "*n K V"],
    added: Float[Array, "N *n K V"],
    decay: Float[Array, "N *n"],
    reverse: bool = False,
) -> tuple[Float[Array, "*n K V"], Float[Array, "N *n K V"]]:
    """The last state of `state = decay[i] * state + added[i]` and those before each step.

    All steps are one matrix product, which reads and writes the states once. The last state keeps
    full precision, the others have the dtype of `added`.
    """
    full, operand = decay.dtype, added.dtype
    time = np.arange(len(added))[:: -1 if reverse else 1]
    first = int(np.argmin(time))
    # What step m added has decayed in all steps j, m < j < n, when step n reads it.
    earlier = time[:, None] < time
    between = earlier & earlier.T[:, None, :]
    decays = jnp.moveaxis(decay, 0, -1)[..., None, :]
    to_end = jnp.prod(jnp.where(earlier, decays, 1), axis=-1)
    weights = jnp.prod(jnp.where(between, decays[..., None, :], 1), axis=-1)
    weights = jnp.where(earlier.T, weights, 0).astype(operand)

    start = decay[first][..., None, None] * state + added[first].astype(full)
    rounded = start.astype(operand)
    # The barriers make XLA replace a row in place. Fused into its readers, the update would cost a
    # copy.
    added = jax.lax.optimization_barrier(added.at[first].set(rounded))
    product = functools.partial(jnp.einsum, precision=HIGHEST)
    states = product("...nm,m...kv->n...kv", weights, added, preferred_element_type=operand)
    last = product("...m,m...kv->...kv", to_end, added, preferred_element_type=full)
    last += to_end[..., first, None, None] * (start - rounded.astype(full))
    return last, jax.lax.optimization_barrier(states.at[first].set(state.astype(operand)))


def _cut(x: Array, layout: Layout) -> Array:
    """[B, T, ...] -> [spans, chunks, B, C, ...]."""
    x = x.reshape(x.shape[0], layout.spans, -1, layout.chunk_size, *x.shape[2:])
    return jnp.moveaxis(x, 0, 2)


def _decays(g: Float[Array, "*n C"]) -> tuple[Array, Array, Array, Array]:
    """Log-decays: start to row, row to end, column to row (row > column), start to end of a chunk."""
    size = g.shape[-1]
    sums = functools.partial(jnp.matmul, precision=HIGHEST)
    until = np.tri(size, dtype=bool).T
    after = np.tri(size, k=-1, dtype=bool)
    # Token i lies between r and s if s < i <= r.
    between = (until[:, :, None] & after[:, None, :]).reshape(size, size * size)
    return (
        sums(g, until.astype(g.dtype)),
        sums(g, after.astype(g.dtype)),
        sums(g, between.astype(g.dtype)).reshape(*g.shape, size),
        jnp.sum(g, axis=-1),
    )
