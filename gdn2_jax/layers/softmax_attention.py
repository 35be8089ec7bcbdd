"""Causal softmax attention, of a window or of everything so far, in memory linear in T.

`jax.nn.dot_product_attention` does each block. tokamax has attention in blocks, too. It would be
one more dependency, and attention is a baseline here.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.ops.isolation import not_finite, replace
from gdn2_jax.parallel import previous_tokens
from gdn2_jax.parallel.logical import ambient_mesh

PERIOD = 2**30
"""Positions that differ by it have the same rotary angles; float64 inputs have no such period."""

_QUERIES_AT_ONCE = 512
# cuDNN's kernel takes as many queries as keys. Where the cache is longer by more, most are for nothing.
_CACHE_TO_CALL = 8


class KVCache(NamedTuple):
    """The W keys before the first query, in a ring; W is the window size.

    `positions` counts from the first query, so it is negative. A slot that holds nothing has a
    position below -W, outside the window of every query.
    """

    k: Float[Array, "B W N H"]
    v: Float[Array, "B W N H"]
    segment_ids: Int[Array, "B W"]
    positions: Int[Array, "#B W"]


def apply_rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotates channel i against channel i + H/2 by the angle position * theta^(-2i / H).

    The angle is exact to 3e-8 of a turn at any position, because it is computed in integers, modulo
    one turn. Each frequency is rounded to a multiple of 2^-30 turns a token, which is at most 3e-9
    radians off. Angles and rotation are float32; for float64 inputs they are float64, without that
    rounding. The result has `x`'s dtype.
    """
    half = x.shape[-1] // 2
    frequencies = float(theta) ** (-np.arange(half) / half)
    if x.dtype == jnp.float64:
        angles = positions[..., None].astype(x.dtype) * frequencies[None, None]
    else:
        # Turns in units of 2^-32. What exceeds 32 bits is whole turns.
        turns = np.round(frequencies / (2 * math.pi) % 1 * PERIOD).astype(np.uint32) * np.uint32(4)
        turns = positions[..., None].astype(jnp.uint32) * turns[None, None]
        turns = jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32)
        angles = turns * np.float32(2 * math.pi / 2**32)
    cosine, sine = (u[:, :, None] for u in (jnp.cos(angles), jnp.sin(angles)))
    first, second = (u.astype(angles.dtype) for u in (x[..., :half], x[..., half:]))
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def local_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    window_size: int,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
) -> Float[Array, "B T N H"]:
    """Each query attends to the `window_size` last keys of its document, its own included.

    On NVIDIA GPUs, 16-bit inputs without segments run cuDNN's kernel. Everything else runs on
    blocks of `window_size` queries against their block and the one before.
    """
    blocks = functools.partial(_block_attention, window_size=window_size)
    return _cudnn_attention(q, k, v, segment_ids, cache, window_size=window_size, default=blocks)


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


def full_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
) -> Float[Array, "B T N H"]:
    """Each query attends to all keys of its document so far: those of the call and of the cache.

    On NVIDIA GPUs, 16-bit inputs without segments run cuDNN's kernel, unless there are few beside
    the cache. Everything else runs on a few hundred queries at a time.
    """
    window_size = q.shape[1] if cache is None else cache.k.shape[1]
    default = functools.partial(_attention_of_all, window_size=window_size)
    return _cudnn_attention(q, k, v, segment_ids, cache, window_size=window_size, default=default)


def _cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"] | None,
    cache: KVCache | None,
    *,
    window_size: int,
    default: Callable[..., Array],
) -> Float[Array, "B T N H"]:
    """Runs cuDNN's kernel where it serves, else default(q, k, v, segment_ids, cache).

    `default` is recomputed in the backward, so that no probabilities are kept.
    """
    default = jax.checkpoint(default)

    def without_segments(q, k, v, cache):
        return default(q, k, v, None, cache)

    def fused(q, k, v, cache):
        # Every host traces this, also those without a GPU: a missing cuDNN is a RuntimeError, a
        # shape that it does not serve a NotImplementedError.
        try:
            length = q.shape[1] + (0 if cache is None else cache.k.shape[1])
            attention = functools.partial(
                jax.nn.dot_product_attention,
                is_causal=True,
                local_window_size=(window_size - 1, 0) if length > window_size else None,
                implementation="cudnn",
            )
            return attention(q, k, v) if cache is None else after_cache(attention, q, k, v, cache)
        except (NotImplementedError, RuntimeError):
            return without_segments(q, k, v, cache)

    if segment_ids is not None or q.dtype.itemsize != 2:
        return default(q, k, v, segment_ids, cache)
    # On a mesh the compiler splits the call of a decoding layer, and it cannot split the kernel.
    few = cache is not None and _CACHE_TO_CALL * q.shape[1] < cache.k.shape[1]
    if few or (cache is not None and ambient_mesh() is not None):
        return without_segments(q, k, v, cache)
    return jax.lax.platform_dependent(q, k, v, cache, cuda=fused, default=without_segments)


def after_cache(
    attention: Callable[..., Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    cache: KVCache,
) -> Float[Array, "B T N H"]:
    """Causal attention to the keys of the cache and of the call, where `attention` knows no cache.

    Each row of W + T tokens begins with what its cache holds. The queries there are of no use. What is
    missing is padding at the end, which no query of the call sees.

    Args:
      attention: function of q, k, v [B, W + T, N, H].
      q: queries.
      k: keys.
      v: values.
      cache: the W keys before; those within a window are its newest.
    """
    size, length = cache.k.shape[1], q.shape[1]
    rows = (q.shape[0], size + length)
    held = jnp.sum(cache.positions >= -size, axis=1, keepdims=True)
    oldest = jnp.argmax(cache.positions, axis=1, keepdims=True) + 1 - held
    token = jnp.arange(size + length)[None]
    in_cache = jnp.broadcast_to((oldest + token) % size, rows)
    in_call = jnp.broadcast_to(jnp.clip(token - held, 0, length - 1), rows)

    first = jnp.broadcast_to(token < held, rows)[..., None, None]
    k, v = (
        jnp.where(first, _tokens(before, in_cache), _tokens(x, in_call))
        for before, x in ((cache.k, k), (cache.v, v))
    )
    outputs = attention(_tokens(q, in_call), k, v)
    return _tokens(outputs, jnp.broadcast_to(held + jnp.arange(length)[None], q.shape[:2]))


@jax.vmap
def _tokens(x: Array, places: Int[Array, "L"]) -> Array:
    """A row's tokens [L, ...] at these places of `x` [T, ...]."""
    return x.at[places].get(mode="promise_in_bounds")


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
    cache: KVCache | None = None,
    *,
    window_size: int,
) -> Array:
    batch, length = q.shape[:2]
    size = min(length, window_size)
    count = -(-length // size)
    if cache is None and count > 1:
        empty = jnp.zeros((batch, window_size, *k.shape[2:]), k.dtype)
        nowhere = jnp.full((1, window_size), -window_size)
        cache = KVCache(empty, empty, jnp.zeros((batch, window_size), jnp.int32), nowhere)

    def blocks(x: Array) -> Array:
        """[B, T, ...] -> [B, count, size, ...]; the padding comes after every real query."""
        x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], count, size, *x.shape[2:])

    def spans(x: Array, before: Array | None) -> Array:
        """Each block after the W tokens before it: [B, count, W + size, ...]."""
        if before is None:
            return x
        previous = before[:, None]
        if count > 1:
            previous = jnp.concatenate([previous, x[:, :-1]], axis=1)
        return jnp.concatenate([previous, x], axis=2)

    q, k, v = blocks(q), blocks(k), blocks(v)
    k, v = spans(k, cache and cache.k), spans(v, cache and cache.v)
    positions = jnp.arange(count * size).reshape(1, count, size)
    if cache is not None:
        positions = jnp.broadcast_to(positions, (cache.positions.shape[0], count, size))
    distances = positions[..., None] - spans(positions, cache and cache.positions)[:, :, None]
    same_segment = None
    if segment_ids is not None:
        ids = blocks(segment_ids)
        same_segment = ids[..., None] == spans(ids, cache and cache.segment_ids)[:, :, None]
    attend_block = jax.vmap(
        functools.partial(attend, window_size=window_size), in_axes=1, out_axes=1
    )
    outputs = attend_block(q, k, v, distances, same_segment)
    return outputs.reshape(batch, count * size, *outputs.shape[3:])[:, :length]


def _attention_of_all(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    *,
    window_size: int,
) -> Float[Array, "B T N H"]:
    """Attention of a few hundred queries at a time to all keys, in memory linear in T."""
    length = q.shape[1]
    positions, key_segments = jnp.arange(length), segment_ids
    key_positions = positions[None]
    if cache is not None:
        k, v = jnp.concatenate([cache.k, k], axis=1), jnp.concatenate([cache.v, v], axis=1)
        key_positions = jnp.broadcast_to(key_positions, (q.shape[0], length))
        key_positions = jnp.concatenate([cache.positions, key_positions], axis=1)
        if segment_ids is not None:
            key_segments = jnp.concatenate([cache.segment_ids, segment_ids], axis=1)

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
