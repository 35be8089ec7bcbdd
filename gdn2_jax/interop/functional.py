"""A mixer's cache in and out of a call, for models that keep caches outside their modules."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int


def empty_cache(
    layer: nn.Module, batch_size: int, width: int, dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Returns a cache of zeros: a tree of arrays [B, ...].

    Args:
      layer: a mixer of `gdn2_jax.layers`.
      batch_size: rows B of inputs.
      width: last axis D of inputs.
      dtype: of inputs.
    """
    x = jax.ShapeDtypeStruct((batch_size, 1, width), dtype)
    decoder = layer.clone(parent=None, decode=True)
    abstract = jax.eval_shape(decoder.init, jax.random.key(0), x)["cache"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)


def advance(
    layer: nn.Module,
    params: Mapping[str, Any],
    cache: Mapping[str, Any],
    x: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """Mixes the next tokens, going on from a cache.

    Args:
      layer: a mixer of `gdn2_jax.layers`, whatever its `decode`.
      params: of the layer.
      cache: from `empty_cache` or the last call.
      x: inputs, any T >= 1.
      segment_ids: document of each token; a change, also from the last call's, starts a new one.

    Returns:
      Outputs of `x`'s shape, and the cache after them.

    Raises:
      ValueError: an input is malformed.
    """
    variables = {"params": params, "cache": cache}
    decoder = layer.clone(parent=None, decode=True)
    results: Any = decoder.apply(variables, x, segment_ids, mutable=["cache"])
    y, updated = results
    return y, updated["cache"]
