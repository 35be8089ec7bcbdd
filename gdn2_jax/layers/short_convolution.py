"""A causal depthwise convolution over a few tokens, which keeps documents apart and decodes."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int

from gdn2_jax.ops import Implementation
from gdn2_jax.ops.isolation import replace
from gdn2_jax.ops.short_convolution import short_convolution_kernels_or
from gdn2_jax.parallel import (
    as_typed,
    axis_size,
    beside,
    partitioned,
    per_device,
    with_previous_tokens,
)


def _uniform_fan_in_taps(key, shape, dtype=jnp.float32) -> jax.Array:
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution followed by SiLU, and by division by each head's length.

        y[t, c] = SiLU(sum_i kernel[i, c] x[t - (kernel_size - 1) + i, c] + bias[c])

    Inputs before the first token and of another document count as zero. The arithmetic
    is float32 (float64 for float64 inputs); the output has the input's dtype.

    Attributes:
      kernel_size: number of tokens seen, the current one included.
      use_bias: add a bias, initialised like the kernel.
      unit_dim: scale every so many channels of y, a head, to unit length; not if None.
      param_dtype: dtype of the kernel [kernel_size, channels] and the bias [channels].
      kernel_init: by default uniform within +-1 / sqrt(kernel_size).
      axes_like: initialiser; if its axes have names, the parameters' axes are named alike.
      decode: keep the last kernel_size - 1 inputs, and their documents, in the "cache"
        collection; see `GatedDeltaNet2` for the meaning of `segment_ids` between calls.
      implementation: kernels for a Hopper GPU serve with None and "pallas", where they can. With
        another name the program holds no kernel.
    """

    kernel_size: int = 4
    use_bias: bool = False
    unit_dim: int | None = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Array] = _uniform_fan_in_taps
    axes_like: Initializer | None = None
    decode: bool = False
    implementation: Implementation | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Convolves `x` along T within each document."""
        batch, length, channels = x.shape
        past = self.kernel_size - 1
        kernel_init = partitioned(self.kernel_init, None, "heads", like=self.axes_like)
        kernel = self.param("kernel", kernel_init, (self.kernel_size, channels), self.param_dtype)
        bias = None
        if self.use_bias:
            # The fan-in of a channel is its taps.
            taps = (self.kernel_size, channels)
            bias_init = partitioned(
                lambda key, dtype: self.kernel_init(key, taps, dtype)[0],
                "heads",
                like=self.axes_like,
            )
            bias = self.param("bias", bias_init, self.param_dtype)
        inputs, padding, before = x, past, None
        if self.decode:
            window = self.variable("cache", "inputs", jnp.zeros, (batch, past, channels), x.dtype)
            documents = self.variable("cache", "segment_ids", jnp.zeros, (batch, past), jnp.int32)
            kept, ids = (beside(part.value, x) for part in (window, documents))
            if segment_ids is None:
                # The last document goes on: no token sees the ones before it any more.
                last = jnp.broadcast_to(ids[:, -1:], ids.shape)
                kept, ids = replace(ids != last, 0, kept), last
                before = kept
            else:
                padding = 0
                ids = jnp.concatenate([ids, beside(segment_ids, x)], axis=1, dtype=jnp.int32)
                segment_ids = ids
            together = jnp.concatenate([kept, x], axis=1)
            if before is None:
                inputs = together
            if not self.is_initializing():
                window.value = together[:, length:]
                documents.value = ids[:, ids.shape[1] - past :]
        elif axis_size("sequence") > 1:
            rows = ("batch", "sequence")
            inputs = ((*rows, "heads"), (None, "heads"), ("heads",), rows)
            span = functools.partial(_convolve_span, unit_dim=self.unit_dim)
            convolve = per_device(span, inputs, (*rows, "heads"))
            return convolve(x, kernel, bias, segment_ids)
        rows = ("batch", None)

        def default(x, kernel, bias, segment_ids, before):
            if before is None:
                return _convolve(x, kernel, bias, segment_ids, padding, self.unit_dim)
            x = jnp.concatenate([before, x], axis=1)
            return _convolve(x, kernel, bias, segment_ids, 0, self.unit_dim)

        kernels_or = functools.partial(short_convolution_kernels_or, default, self.unit_dim)
        run = kernels_or if padding and self.implementation in (None, "pallas") else default
        channelwise = (*rows, "heads")
        names = (channelwise, (None, "heads"), ("heads",), rows, channelwise), channelwise
        heads = channels // (self.unit_dim or 1)
        row_shards, head_shards = axis_size("data") * axis_size("fsdp"), axis_size("tensor")
        divides = not (batch % row_shards or heads % head_shards)
        if run is kernels_or and divides and not self.decode:
            # The kernels' loops do not know what varies over the mesh.
            convolve = per_device(run, *names, heads=heads, check_vma=False)
        else:
            convolve = as_typed(run, *names, heads=heads)
        return convolve(inputs, kernel, bias, segment_ids, before)


def _convolve_span(x, kernel, bias, segment_ids, unit_dim) -> Float[Array, "B T D"]:
    """`_convolve` of a device's span, after the inputs of the spans before."""
    past = kernel.shape[0] - 1
    x = with_previous_tokens(x, past)
    if segment_ids is not None:
        segment_ids = with_previous_tokens(segment_ids, past)
    return _convolve(x, kernel, bias, segment_ids, 0, unit_dim)


# The backward recomputes the shifted float32 copies: they would be the largest arrays it keeps.
@functools.partial(jax.checkpoint, static_argnums=(4, 5))
def _convolve(
    inputs: Float[Array, "B L D"],
    kernel: Float[Array, "S D"],
    bias: Float[Array, "D"] | None,
    segment_ids: Int[Array, "B L"] | None,
    padding: int,
    unit_dim: int | None,
) -> Float[Array, "B L+{padding}-S+1 D"]:
    """Convolution, SiLU and unit length of tokens that follow P = S - 1 others.

    The first `padding` of those others are zeros, and not in `inputs`.
    """
    past = kernel.shape[0] - 1
    inputs = jnp.pad(inputs, ((0, 0), (padding, 0), (0, 0)))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (padding, 0)))
    length = inputs.shape[1] - past
    dtype = jnp.promote_types(inputs.dtype, jnp.float32)
    output = 0 if bias is None else bias[None, None].astype(dtype)
    for tap in range(past + 1):
        seen = inputs[:, tap : tap + length].astype(dtype)
        if segment_ids is not None and tap < past:
            same = segment_ids[:, tap : tap + length] == segment_ids[:, past:]
            seen = jnp.where(same[..., None], seen, 0)
        output += kernel[tap][None, None].astype(dtype) * seen
    output = jax.nn.silu(output)
    if unit_dim is not None:
        heads = output.reshape(*output.shape[:2], -1, unit_dim)
        output = to_unit_length(heads).reshape(output.shape)
    return output.astype(inputs.dtype)


def to_unit_length(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """Divides by sqrt(sum x^2 + 1e-6) over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
