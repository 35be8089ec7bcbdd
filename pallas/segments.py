"""Packed documents on a fixed grid of chunks: what each token may see, as masks.

The kernels count values that are not finite while they load them, and `first_flaws` finds what these
spoil. The other forms have no such count: gdn2_jax/ops/isolation.py reads their inputs once more.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.pallas.mosaic import CHUNK


class Masks(NamedTuple):
    """Segments of each row.

    Attributes:
      segment: number of the token's segment; pairs of a chunk interact within one.
      reads: 1 where the token belongs to the segment that the incoming state belongs to.
      writes: 1 where the token belongs to the chunk's last segment, whose state goes out.
      carries: 1 where the incoming state's segment is the chunk's last one.
    """

    segment: Int[Array, "B T"]
    reads: Float[Array, "B T"]
    writes: Float[Array, "B T"]
    carries: Float[Array, "B N"]


def segment_masks(starts: Bool[Array, "B T"]) -> Masks:
    """Masks from where segments start; T is a multiple of the chunk."""
    batch, length = starts.shape
    segment = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    chunks = segment.reshape(batch, -1, CHUNK)
    last = chunks[..., -1:]
    # The state comes from the token before the chunk; before the first token it is segment 0's.
    incoming = jnp.pad(last[:, :-1], ((0, 0), (1, 0), (0, 0)))
    reads, writes = (
        (chunks == x).astype(jnp.float32).reshape(batch, length) for x in (incoming, last)
    )
    return Masks(segment, reads, writes, (incoming == last)[..., 0].astype(jnp.float32))


def first_flaws(flaws: Float[Array, "B H T"], masks: Masks) -> Int[Array, "B H T"]:
    """For each token the first one of its segment with a flaw; T where there is none."""
    batch, heads, length = flaws.shape
    place = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None], masks.segment[:, None]
    positions = jnp.where(flaws > 0, jnp.arange(length, dtype=jnp.int32), length)
    none = jnp.full((batch, heads, length + 1), length, jnp.int32)
    return none.at[place].min(positions)[place]
