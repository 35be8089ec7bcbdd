"""What the mixers of softmax attention have in common."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int

from gdn2_jax.fields import require
from gdn2_jax.layers.initializers import fan_in_uniform
from gdn2_jax.layers.inputs import check_attributes, check_inputs
from gdn2_jax.layers.parts import dense, short_convolution
from gdn2_jax.layers.softmax_attention import PERIOD, KVCache, apply_rotary, attend
from gdn2_jax.ops.isolation import replace
from gdn2_jax.parallel import as_typed, axis_size, per_device


class SoftmaxAttentionLayer(nn.Module):
    """The parts and attributes of softmax attention; see `SlidingWindowAttention`."""

    num_heads: int
    rope_theta: float = 10000.0
    conv_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = fan_in_uniform()
    out_kernel_init: Initializer = fan_in_uniform()
    decode: bool = False

    @property
    def _cache_size(self) -> int:
        """Tokens that the cache holds: the keys that a query sees with `decode=True`."""
        raise NotImplementedError

    def _attend(self, q, k, v, segment_ids, cache=None) -> Float[Array, "B T N H"]:
        """Attention of a call's queries to its keys and to those of the cache."""
        raise NotImplementedError

    def _attend_span(self, q, k, v, segment_ids) -> Float[Array, "B T N H"]:
        """Attention of this device's span of the sequence, inside shard_map."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Mixes tokens within each document; see `GatedDeltaNet2.__call__`."""
        check_inputs(x, segment_ids, self.variables.get("cache"))
        self._check_attributes(x.shape[-1])
        batch, length, width = x.shape

        q, k, v = (
            self._convolved(name, dense(self, f"{name}_proj", width)(x), segment_ids).reshape(
                batch, length, self.num_heads, -1
            )
            for name in "qkv"
        )
        if self.decode:
            o = self._attend_and_cache(q, k, v, segment_ids)
        else:
            positions = jnp.arange(length)[None]
            q, k = (
                checkpoint_name(apply_rotary(array, positions, self.rope_theta), "operand")
                for array in (q, k)
            )
            o = self._attend_on_mesh(q, k, v, segment_ids)
        init = self.out_kernel_init
        o_proj = dense(self, "o_proj", width, ("heads", "embed"), kernel_init=init)
        return o_proj(o.reshape(batch, length, width))

    def _convolved(self, name: str, x: Array, segment_ids: Array | None) -> Float[Array, "B T D"]:
        if self.conv_size is None:
            return x
        convolution = short_convolution(self, f"{name}_conv1d", implementation="xla")
        return convolution(x, segment_ids)

    def _attend_on_mesh(self, q, k, v, segment_ids) -> Float[Array, "B T N H"]:
        split = axis_size("sequence") > 1
        rows = ("batch", "sequence" if split else None)
        heads = (*rows, "heads", None)
        attend = self._attend_span if split else self._attend
        return per_device(attend, (heads, heads, heads, rows), heads)(q, k, v, segment_ids)

    def _attend_and_cache(self, q, k, v, segment_ids) -> Float[Array, "B T N H"]:
        batch, length = k.shape[:2]
        size = self._cache_size
        ring = (batch, size, *k.shape[2:])
        keys = self.variable("cache", "key", jnp.zeros, ring, k.dtype)
        values = self.variable("cache", "value", jnp.zeros, ring, v.dtype)
        documents = self.variable("cache", "segment_ids", jnp.zeros, (batch, size), jnp.int32)
        # The angles of float64 have no period, to which an int32 could fall back.
        whole = jnp.int64 if k.dtype == jnp.float64 else jnp.int32
        index = self.variable("cache", "index", jnp.zeros, (batch,), whole)
        slot = self.variable("cache", "slot", jnp.zeros, (batch,), jnp.int32)

        rows, heads = ("batch",), ("batch", None, "heads")
        axes = ((heads, heads, rows), rows, rows, heads, heads, heads, rows)
        advance = as_typed(self._advance, axes, (heads, axes[0]))
        rings = (keys.value, values.value, documents.value)
        o, rings = advance(rings, index.value, slot.value, q, k, v, segment_ids)
        if not self.is_initializing():
            keys.value, values.value, documents.value = rings
            index.value = _advanced(index.value, length)
            slot.value = (slot.value + length) % size
        return o

    def _advance(self, rings, start, first, q, k, v, segment_ids) -> tuple[Array, tuple]:
        """Outputs and rings after tokens that begin at each row's index `start`, in slot `first`."""
        batch, length = k.shape[:2]
        size = self._cache_size
        positions = start[:, None] + jnp.arange(length, dtype=start.dtype)[None]
        q, k = (apply_rotary(array, positions, self.rope_theta) for array in (q, k))
        cache = KVCache._make((*rings, _positions_in_ring(start, first, size)))
        ids = segment_ids
        if segment_ids is None:
            last = jnp.take_along_axis(cache.segment_ids, (first[:, None] - 1) % size, axis=1)
            ids = jnp.broadcast_to(last, (batch, length))
            if length > 1:  # One token reads the ring that it was written to.
                cache = _of_document(cache, last)

        # Only the last `size` of the new tokens can be seen again.
        slots = (first[:, None] + jnp.arange(length)[None, -size:]) % size
        new = (k, v, ids.astype(jnp.int32))
        keys, values, documents = rings = tuple(
            _written(ring, slots, x[:, -size:]) for ring, x in zip(rings, new, strict=True)
        )
        if length > 1:
            return self._attend(q, k, v, segment_ids, cache), rings
        # One token is written to the ring first; relative to the next token its position is -1.
        after = _positions_in_ring(_advanced(start, 1), (first + 1) % size, size)
        same_segment = ids[:, :, None] == documents[:, None]
        # Without documents there is nothing to isolate, and the ring is read once only.
        distances, isolate = -1 - after[:, None], segment_ids is not None
        return attend(q, keys, values, distances, same_segment, size, isolate), rings

    def _check_attributes(self, width: int) -> None:
        check_attributes(self, "conv_size")
        heads = self.num_heads
        divides = heads >= 1 and width % (2 * heads) == 0
        expected = f"to divide the width {width} into heads of even width"
        require("num_heads", divides, expected, heads)


@jax.vmap
def _written(ring: Array, slots: Int[Array, "T"], x: Array) -> Array:
    """A row's ring with `x` [T, ...] in its slots."""
    return ring.at[slots].set(x, unique_indices=True, mode="promise_in_bounds")


def _positions_in_ring(
    index: Int[Array, "B"], slot: Int[Array, "B"], size: int
) -> Int[Array, "B {size}"]:
    """Positions, counted from token `index`, of the tokens in rings that end before `slot`."""
    age = (slot[:, None] - 1 - jnp.arange(size)[None]) % size
    return jnp.where(age < index[:, None], -1 - age, -size - 1)


def _of_document(cache: KVCache, document: Int[Array, "B 1"]) -> KVCache:
    """The cache without what was before the last document, of which nothing is seen again."""
    nowhere = -cache.k.shape[1] - 1
    others = jnp.where(cache.segment_ids != document, cache.positions, nowhere)
    own = cache.positions > jnp.max(others, axis=1, keepdims=True)
    # A key of weight zero must be finite: 0 * NaN is NaN.
    k, v = (replace(~own, 0, x) for x in (cache.k, cache.v))
    return cache._replace(k=k, v=v, positions=jnp.where(own, cache.positions, nowhere))


def _advanced(index: Int[Array, "B"], length: int) -> Int[Array, "B"]:
    """The sum, less what brings an int32 that overflows back to [2^30, 2^31)."""
    total = index + length
    if index.dtype == jnp.int64:
        return total
    return jnp.where(total < 0, total & (PERIOD - 1) | PERIOD, total)
