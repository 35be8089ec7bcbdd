"""Causal softmax attention over a window, in memory linear in T."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.ops.isolation import not_finite, replace
from gdn2_jax.parallel import previous_tokens


class Past(NamedTuple):
    """The W keys before the first query, in any order; W is the window size.

    `positions` counts from the first query, so it is negative. A slot that holds nothing has
    position -W or less, outside the window of every query.
    """

    k: Float[Array, "B W N H"]
    v: Float[Array, "B W N H"]
    segment_ids: Int[Array, "B W"]
    positions: Int[Array, "#B W"]


def local_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    window_size: int,
    segment_ids: Int[Array, "B T"] | None = None,
    past: Past | None = None,
) -> Float[Array, "B T N H"]:
    """Each query attends to the `window_size` last keys of its document, its own included.

    On NVIDIA GPUs, 16-bit inputs without segments or past run cuDNN's kernel. Everything else
    runs on blocks of `window_size` queries against their block and the one before.
    """
    blocks = functools.partial(_block_attention, window_size=window_size)
    return cudnn_or(blocks, window_size, q, k, v, segment_ids, past)


def local_attention_of_span(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    window_size: int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """`local_attention` of this device's span of the sequence, inside shard_map.

    Each device attends to its span and up to `window_size` earlier keys. The first devices have
    fewer earlier keys; padding at the end gives all devices the same length. So no mask is needed.
    """
    length = q.shape[1]
    span = jax.lax.axis_index("sequence")
    past = min(window_size, length * (jax.lax.axis_size("sequence") - 1))
    present = jnp.minimum(past, span * length)

    def arrange(x, before):
        padding = jnp.zeros_like(before)
        x = jnp.concatenate([before, x, padding], axis=1)
        return jax.lax.dynamic_slice_in_dim(x, past - present, past + length, axis=1)

    no_queries = jnp.zeros_like(q, shape=(q.shape[0], past, *q.shape[2:]))
    k, v = (arrange(x, previous_tokens(x, past)) for x in (k, v))
    if segment_ids is not None:
        segment_ids = arrange(segment_ids, previous_tokens(segment_ids, past))
    outputs = local_attention(arrange(q, no_queries), k, v, window_size, segment_ids)
    return jax.lax.dynamic_slice_in_dim(outputs, present, length, axis=1)


def cudnn_or(
    blocks: Callable[..., Array],
    window_size: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"] | None,
    past: Past | None,
) -> Float[Array, "B T N H"]:
    """Runs cuDNN's kernel where it serves, else blocks(q, k, v, segment_ids, past).

    `blocks` is recomputed in the backward, so that no probabilities are kept.
    """
    blocks = jax.checkpoint(blocks)
    if segment_ids is not None or past is not None or q.dtype.itemsize != 2:
        return blocks(q, k, v, segment_ids, past)

    def fused(q, k, v):
        # Every host traces this, also those without a GPU: a missing cuDNN is a RuntimeError, a
        # shape that it does not serve a NotImplementedError.
        try:
            return jax.nn.dot_product_attention(
                *(q, k, v),
                is_causal=True,
                local_window_size=(window_size - 1, 0) if q.shape[1] > window_size else None,
                implementation="cudnn",
            )
        except (NotImplementedError, RuntimeError):
            return blocks(q, k, v)

    return jax.lax.platform_dependent(q, k, v, cuda=fused, default=blocks)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    distances: Int[Array, "#B T S"],
    same_segment: Array | None,
    window_size: int,
    isolate: bool = True,
) -> Float[Array, "B T N H"]:
    """Attention to the keys whose distance (query minus key position) is in [0, window_size).

    `same_segment` [B, T, S], if given, says which of them belong to the query's document. Then NaN
    and infinity reach what attends to them and nothing else, in the gradients too, unless
    `isolate` is false.
    """
    mask = (distances >= 0) & (distances < window_size)
    if same_segment is not None:
        mask &= same_segment
    run = _isolated_attention if isolate and same_segment is not None else _masked_attention
    return run(q, k, v, mask)


@jax.custom_vjp
def _isolated_attention(q: Array, k: Array, v: Array, mask: Bool[Array, "B T S"]) -> Array:
    """`_masked_attention`, where masked keys have a weight of zero in the products: 0 * NaN is NaN."""
    return _isolated_attention_fwd(q, k, v, mask)[0]


def _isolated_attention_fwd(q, k, v, mask):
    bad_queries, bad_keys = not_finite(q, 2), not_finite(k, 2) | not_finite(v, 2)
    bad = bad_queries | jnp.any(mask & bad_keys[:, None], axis=2)
    clean = replace(bad_queries, 0, q), replace(bad_keys, 0, k), replace(bad_keys, 0, v)
    outputs, pullback = jax.vjp(functools.partial(_masked_attention, mask=mask), *clean)
    return replace(bad, jnp.nan, outputs), (pullback, bad, bad_keys, mask)


def _isolated_attention_bwd(residuals, d_outputs):
    pullback, bad, bad_keys, mask = residuals
    bad |= not_finite(d_outputs, 2)
    bad_keys |= jnp.any(mask & bad[:, :, None], axis=1)
    dq, dk, dv = pullback(replace(bad, 0, d_outputs))
    return *(replace(b, jnp.nan, x) for b, x in ((bad, dq), (bad_keys, dk), (bad_keys, dv))), None


_isolated_attention.defvjp(_isolated_attention_fwd, _isolated_attention_bwd)


def _masked_attention(q: Array, k: Array, v: Array, mask: Bool[Array, "#B T S"]) -> Array:
    dtype = q.dtype
    if dtype == jnp.float16:  # dot_product_attention asks for a float16 product no CPU has.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    mask = mask[:, None]
    if dtype == jnp.float64:  # dot_product_attention's softmax is float32 at any dtype.
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, where=mask), v)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla").astype(dtype)


def _block_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None = None,
    past: Past | None = None,
    *,
    window_size: int,
) -> Array:
    batch, length = q.shape[:2]
    size = min(length, window_size)
    count = -(-length // size)
    if past is None and count > 1:
        empty = jnp.zeros((batch, window_size, *k.shape[2:]), k.dtype)
        nowhere = jnp.full((1, window_size), -window_size)
        past = Past(empty, empty, jnp.zeros((batch, window_size), jnp.int32), nowhere)

    def blocks(x: Array) -> Array:
        """[B, T, ...] -> [B, count, size, ...]; the padding comes after every real query."""
        x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], count, size, *x.shape[2:])

    def spans(own: Array, before: Array | None) -> Array:
        """Each block after the W tokens before it: [B, count, W + size, ...]."""
        if before is None:
            return own
        previous = before[:, None]
        if count > 1:
            previous = jnp.concatenate([previous, own[:, :-1]], axis=1)
        return jnp.concatenate([previous, own], axis=2)

    q, k, v = blocks(q), blocks(k), blocks(v)
    k, v = spans(k, past and past.k), spans(v, past and past.v)
    own = jnp.arange(count * size).reshape(1, count, size)
    if past is not None:
        own = jnp.broadcast_to(own, (past.positions.shape[0], count, size))
    distances = own[..., None] - spans(own, past and past.positions)[:, :, None]
    same_segment = None
    if segment_ids is not None:
        own = blocks(segment_ids)
        same_segment = own[..., None] == spans(own, past and past.segment_ids)[:, :, None]
    attend_block = jax.vmap(
        functools.partial(attend, window_size=window_size), in_axes=1, out_axes=1
    )
    outputs = attend_block(q, k, v, distances, same_segment)
    return outputs.reshape(batch, count * size, *outputs.shape[3:])[:, :length]
