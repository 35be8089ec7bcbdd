"""Where the documents of packed rows lie: by token, and in chunks that no two of them share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Chunks(NamedTuple):
    """A row's chunks, each of one document.

    Attributes:
      document: which one, counted from 0; their number where a chunk holds none.
      first: whether it is the document's first chunk.
      last: whether it is its last.
    """

    document: Int[Array, "*n B"]
    first: Bool[Array, "*n B"]
    last: Bool[Array, "*n B"]


def document_of(starts: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Each token's document, counted from 0 in its row."""
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def align(
    starts: Bool[Array, "B T"], count: int, chunk_size: int, chunks: int
) -> tuple[Int[Array, "B T"], Chunks]:
    """Lets every document begin with a chunk.

    Args:
      starts: where a document starts, false for the first token.
      count: number of documents to place.
      chunk_size: tokens of a chunk.
      chunks: number of chunks, enough for all documents with the padding after each.

    Returns:
      The place of each token among all tokens of all chunks, beyond the last for those of further
      documents; and the chunks [chunks, B].
    """
    document = document_of(starts)
    token = jax.lax.broadcasted_iota(jnp.int32, starts.shape, 1)
    within = token - jax.lax.cummax(jnp.where(starts, token, 0), axis=1)
    lengths = jnp.sum(document[..., None] == jnp.arange(count)[None, None], axis=1)
    sizes = -(-lengths // chunk_size)
    ends = jnp.cumsum(sizes, axis=1)
    begin = jnp.take_along_axis(ends - sizes, jnp.minimum(document, count - 1), axis=1)
    place = jnp.where(document < count, begin * chunk_size + within, chunks * chunk_size)
    chunk, ends, sizes = jnp.arange(chunks)[:, None, None], ends[None], sizes[None]
    return place, Chunks(
        document=jnp.sum(chunk >= ends, axis=-1),
        first=jnp.any((chunk == ends - sizes) & (sizes > 0), axis=-1),
        last=jnp.any((chunk == ends - 1) & (sizes > 0), axis=-1),
    )


def state_of(states: Array, document: Int[Array, "B"]) -> Array:
    """The state of one document of each row, [B, N, ...] -> [B, ...]; NaN beyond the last."""
    return states.at[jnp.arange(states.shape[0]), document].get(mode="fill", fill_value=jnp.nan)


def with_state(states: Array, document: Int[Array, "B"], state: Array) -> Array:
    """The states [B, N, ...] with one of each row replaced; numbers beyond the last replace none."""
    return states.at[jnp.arange(states.shape[0]), document].set(state, mode="drop")
