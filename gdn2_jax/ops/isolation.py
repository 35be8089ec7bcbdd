"""Keeps NaN and infinity inside the document they come from.

Matrix products over the rows of a chunk give what a row must not read a weight of zero, and
0 * NaN is NaN. So what is not finite of a token enters an operator as zeros, and what depends on
the token is set to NaN behind it: the outputs of its document from there on, the state where it is
the last document, and all gradients of the document's tokens. Cotangents that are not finite are
treated likewise.

The Hopper kernels do not use this module. They count such values while they load them
(gdn2_jax/pallas/segments.py); a mask made here would read all inputs once more.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool


def not_finite(x: Array, dims: int) -> Bool[Array, "*n"]:
    """Where any entry is NaN or infinite, by the first `dims` axes."""
    return ~jnp.all(jnp.isfinite(x), axis=tuple(range(dims, x.ndim)))


def replace(where: Bool[Array, "*n"], value: ArrayLike, x: Array) -> Array:
    """`x` with `value` where the mask of its first axes is true."""
    return jnp.where(jnp.expand_dims(where, tuple(range(where.ndim, x.ndim))), value, x)


def from_there_on(
    tokens: Bool[Array, "B T *n"], starts: Bool[Array, "B T"]
) -> Bool[Array, "B T *n"]:
    """True at these tokens and after them, up to the end of their document."""
    last, first = (jax.lax.cummax(jnp.where(x, _positions(x), 0), axis=1) for x in (tokens, starts))
    first = jnp.expand_dims(first, tuple(range(2, last.ndim)))
    return (last >= first) & (last > 0)


def in_document(tokens: Bool[Array, "B T *n"], starts: Bool[Array, "B T"]) -> Bool[Array, "B T *n"]:
    """True in all of the documents of these tokens."""
    ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)))
    before = from_there_on(jnp.flip(tokens, 1), jnp.flip(ends, 1))
    return from_there_on(tokens, starts) | jnp.flip(before, 1)


def isolated[Tokens, State](
    run: Callable[[Tokens, State], tuple[Array, State]],
    tokens: Tokens,
    state: State,
    starts: Bool[Array, "B T"] | None,
) -> tuple[Array, State]:
    """`run(tokens, state)`, with NaN and infinity kept inside their documents.

    Args:
      run: a recurrence; returns outputs [B, T, ...] and the state after the last token.
      tokens: arrays [B, T, ...].
      state: arrays [B, ...] before the first token; they belong to its document.
      starts: where a document starts; without documents there is nothing to do.
    """
    if starts is None:
        return run(tokens, state)
    bad = _any_not_finite(tokens, 2)
    bad = bad.at[:, 0].set(bad[:, 0] | _any_not_finite(state, 1))
    tokens, state, mark = _admit(tokens, state, bad, starts)
    outputs, state = run(tokens, state)
    return _release(outputs, state, mark, bad, starts)


def _any_not_finite(arrays, dims: int) -> Array:
    return jnp.asarray(sum(not_finite(x, dims) for x in jax.tree.leaves(arrays)) > 0)


def _positions(x: Array) -> Array:
    """1, 2, ... along T."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + 1


@jax.custom_vjp
def _admit(tokens, state, bad, starts):
    """Zeros in place of what is not finite, and a mark by which `_release` reports bad cotangents.

    A bad token keeps the arrays that are finite: where documents share a block of rows, another
    log-decay would move the rounding of the next document's sums.
    """
    del starts
    clean = jax.tree.map(lambda x: replace(not_finite(x, 2), 0, x), tokens)
    return clean, jax.tree.map(lambda x: replace(not_finite(x, 1), 0, x), state), 0.0 * bad


def _admit_fwd(tokens, state, bad, starts):
    return _admit(tokens, state, bad, starts), (bad, starts)


def _admit_bwd(residuals, cotangents):
    bad, starts = residuals
    d_tokens, d_state, mark = cotangents
    bad = in_document(bad | (mark > 0), starts)
    d_tokens = jax.tree.map(lambda x: replace(bad, jnp.nan, x), d_tokens)
    d_state = jax.tree.map(lambda x: replace(bad[:, 0], jnp.nan, x), d_state)
    return d_tokens, d_state, None, None


_admit.defvjp(_admit_fwd, _admit_bwd)


@jax.custom_vjp
def _release(outputs, state, mark, bad, starts):
    """Sets the results that depend on bad tokens to NaN."""
    del mark
    bad = from_there_on(bad, starts)
    poisoned = jax.tree.map(lambda x: replace(bad[:, -1], jnp.nan, x), state)
    return replace(bad, jnp.nan, outputs), poisoned


def _release_fwd(outputs, state, mark, bad, starts):
    return _release(outputs, state, mark, bad, starts), from_there_on(bad, starts)


def _release_bwd(bad, cotangents):
    d_outputs, d_state = cotangents
    reported = not_finite(d_outputs, 2)
    reported = reported.at[:, -1].set(reported[:, -1] | _any_not_finite(d_state, 1))
    hidden = bad | reported
    d_state = jax.tree.map(lambda x: replace(hidden[:, -1], 0, x), d_state)
    return replace(hidden, 0, d_outputs), d_state, 1.0 * reported, None, None


_release.defvjp(_release_fwd, _release_bwd)
