"""The mixers as flax.nnx modules: parameters and cache are attributes, the mathematics is linen's.

`nnx.bridge.ToNNX` wraps any linen module, but asks for a sample input, gives parameters by
subscript (`layer.q_proj["kernel"]`) and forgets the cache unless each call names it; so these are
modules of their own, named like the linen ones in `gdn2_jax.layers`.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from gdn2_jax import layers
from gdn2_jax.interop import functional


class Mixer(nnx.Module):
    """A token mixer in the place of `nnx.MultiHeadAttention`; its subclasses name the linen module.

        layer = GatedDeltaNet2(num_heads=16, in_features=2048, head_dim=128, rngs=rngs)
        y = layer(x)                               # [B, T, D] -> [B, T, D]
        layer.q_proj.kernel, layer.A_log           # nnx.Param
        layer.init_cache(x.shape)                  # then:
        y = layer(x, decode=True)                  # any T >= 1; layer.state is an nnx.Cache
        y, cache = layer.advance(x, cache)         # the same with a cache that the caller keeps

    Parameters, initialisation, dtypes, `segment_ids` and decoding are those of the linen module.

    Attributes:
      linen: the module that computes.
      in_features: width D of inputs and outputs.
      decode: go on from the cache, and update it, where a call does not say.
    """

    _linen_class: ClassVar[type[nn.Module]]

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        decode: bool = False,
        rngs: nnx.Rngs,
        **attributes: Any,
    ):
        """Makes the parameters.

        Args:
          num_heads: of the linen module.
          in_features: width D of inputs and outputs.
          decode: see above.
          rngs: gives the key of the parameters.
          **attributes: further attributes of the linen module, as `head_dim` and `dtype`.

        Raises:
          TypeError: the linen module has no such attribute.
          ValueError: an attribute has a value that it cannot have.
        """
        self.linen = self._linen_class(num_heads=num_heads, **attributes)
        self.in_features = in_features
        self.decode = decode
        x = jax.ShapeDtypeStruct((1, 1, in_features), jnp.float32)
        # Boxed with linen's names of axes where linen's rules for them are in force.
        _attach(self, nnx.Param, nn.unbox(self.linen.lazy_init(rngs.params(), x)["params"]))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        decode: bool | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes tokens within each document.

        Args:
          x: inputs.
          segment_ids: document of each token, non-decreasing along T.
          decode: go on from the cache and update it; the attribute `decode` if None.

        Returns:
          Outputs of `x`'s shape, in the compute dtype.

        Raises:
          ValueError: an input is malformed, or there is no cache yet.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected a last axis of {self.in_features}, got {x.shape}")
        variables = {"params": _collect(self, nnx.Param)}
        if not (self.decode if decode is None else decode):
            y: Any = self.linen.apply(variables, x, segment_ids)
            return y
        variables["cache"] = _collect(self, nnx.Cache)
        if not variables["cache"]:
            raise ValueError("decode: expected a cache, got none: call init_cache first")
        y, cache = functional.advance(self.linen, **variables, x=x, segment_ids=segment_ids)
        _update(self, cache)
        return y

    def init_cache(self, input_shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> None:
        """Makes the cache, or empties it.

        Args:
          input_shape: [B, T, D] of inputs; T does not matter, as the cache does not grow.
          dtype: of inputs.
        """
        _attach(self, nnx.Cache, self.empty_cache(input_shape[0], dtype))

    def empty_cache(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
        """Returns a cache of zeros for `advance` of B rows of this dtype: arrays [B, ...]."""
        return functional.empty_cache(self.linen, batch_size, self.in_features, dtype)

    def advance(
        self,
        x: Float[Array, "B T D"],
        cache: dict[str, Any],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Goes on from a cache that the caller keeps; the module does not change.

        Args:
          x: the next inputs, any T >= 1.
          cache: from `empty_cache` or the last call.
          segment_ids: as in a call.

        Returns:
          Outputs of `x`'s shape, and the cache after them.

        Raises:
          ValueError: an input is malformed.
        """
        return functional.advance(self.linen, _collect(self, nnx.Param), cache, x, segment_ids)

    def set_view(self, decode: bool | None = None, batch_size: int | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          decode: if given, the new value of the attribute.
          batch_size: rows of the cache, made if decoding and there is none.
        """
        if decode is not None:
            self.decode = decode
        if self.decode and batch_size is not None and not _collect(self, nnx.Cache):
            self.init_cache((batch_size, 1, self.in_features))


class GatedDeltaNet2(Mixer):
    """Gated DeltaNet-2; see `Mixer` and `gdn2_jax.layers.GatedDeltaNet2`."""

    _linen_class = layers.GatedDeltaNet2


class KimiDeltaAttention(Mixer):
    """Kimi Delta Attention; see `Mixer` and `gdn2_jax.layers.KimiDeltaAttention`."""

    _linen_class = layers.KimiDeltaAttention


class GatedDeltaNet(Mixer):
    """Gated DeltaNet and DeltaNet; see `Mixer` and `gdn2_jax.layers.GatedDeltaNet`."""

    _linen_class = layers.GatedDeltaNet


class Mamba2(Mixer):
    """Mamba-2; see `Mixer` and `gdn2_jax.layers.Mamba2`."""

    _linen_class = layers.Mamba2


class Mamba3(Mixer):
    """Mamba-3; see `Mixer` and `gdn2_jax.layers.Mamba3`."""

    _linen_class = layers.Mamba3


class Attention(Mixer):
    """Full attention; see `Mixer` and `gdn2_jax.layers.Attention`."""

    _linen_class = layers.Attention


class SlidingWindowAttention(Mixer):
    """Sliding-window attention; see `Mixer` and `gdn2_jax.layers.SlidingWindowAttention`."""

    _linen_class = layers.SlidingWindowAttention


def _attach(node: nnx.Module, kind: type[nnx.Variable], tree: dict[str, Any]) -> None:
    """Makes a variable of every leaf, an attribute of every key."""
    for name, value in tree.items():
        if isinstance(value, dict):
            if not hasattr(node, name):
                setattr(node, name, nnx.Dict())
            _attach(getattr(node, name), kind, value)
        else:
            setattr(node, name, kind(value))


def _collect(node: nnx.Module, kind: type[nnx.Variable]) -> dict[str, Any]:
    """The linen variables of a kind."""
    tree = {}
    for name, value in vars(node).items():
        if isinstance(value, kind):
            tree[name] = value[...]
        elif isinstance(value, nnx.Dict) and (inner := _collect(value, kind)):
            tree[name] = inner
    return tree


def _update(node: nnx.Module, tree: dict[str, Any]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            _update(getattr(node, name), value)
        else:
            getattr(node, name)[...] = value
