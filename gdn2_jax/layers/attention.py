"""The full-attention mixer of the Transformer."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.local_attention import Past, attend, cudnn_or
from gdn2_jax.layers.sliding_window_attention import SlidingWindowAttention

_QUERIES_AT_ONCE = 512


class Attention(SlidingWindowAttention):
    """Causal multi-head softmax attention to all tokens of the document so far, with rotary.

    Parameters, calls, the decoding cache and attributes are those of `SlidingWindowAttention`, but
    `window_size` is the number of tokens that the cache holds. That is the number of keys which a
    query sees with `decode=True`; without it there is no such bound.
    """

    def _attend_span(self, q, k, v, segment_ids):
        raise NotImplementedError(
            "full attention does not split sequences over devices; expected a mesh with sequence 1"
        )

    def _attend(self, q, k, v, segment_ids, past=None) -> Float[Array, "B T N H"]:
        window_size = q.shape[1] if past is None else self.window_size
        blocks = functools.partial(_attention, window_size=window_size)
        return cudnn_or(blocks, window_size, q, k, v, segment_ids, past)


def _attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"] | None = None,
    past: Past | None = None,
    *,
    window_size: int,
) -> Float[Array, "B T N H"]:
    """Attention of a few hundred queries at a time to all keys, in memory linear in T."""
    length = q.shape[1]
    positions, key_segments = jnp.arange(length), segment_ids
    key_positions = positions[None]
    if past is not None:
        k, v = jnp.concatenate([past.k, k], axis=1), jnp.concatenate([past.v, v], axis=1)
        own = jnp.broadcast_to(key_positions, (q.shape[0], length))
        key_positions = jnp.concatenate([past.positions, own], axis=1)
        if segment_ids is not None:
            key_segments = jnp.concatenate([past.segment_ids, segment_ids], axis=1)

    @jax.checkpoint
    def rows(q, positions, segment_ids):
        same_segment = None
        if segment_ids is not None and key_segments is not None:
            same_segment = segment_ids[:, :, None] == key_segments[:, None]
        distances = positions[None, :, None] - key_positions[:, None]
        return attend(q, k, v, distances, same_segment, window_size)

    if length <= _QUERIES_AT_ONCE:
        return rows(q, positions, segment_ids)
    count = -(-length // _QUERIES_AT_ONCE)

    def split(x, axis):
        """Blocks of queries along a new first axis; the padding repeats the last query."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * _QUERIES_AT_ONCE - length)
        x = jnp.pad(x, padding, mode="edge")
        shape = (*x.shape[:axis], count, _QUERIES_AT_ONCE, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    segments = None if segment_ids is None else split(segment_ids, 1)
    outputs = jax.lax.map(lambda args: rows(*args), (split(q, 1), split(positions, 0), segments))
    return jnp.moveaxis(outputs, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]
