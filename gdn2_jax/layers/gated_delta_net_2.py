"""The Gated DeltaNet-2 token mixer."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.initializers import (
    inverse_softplus_time_step,
    log_uniform_rate,
    small_xavier_uniform,
)
from gdn2_jax.layers.inputs import check_inputs
from gdn2_jax.layers.short_convolution import ShortConvolution
from gdn2_jax.ops import Implementation, gated_delta_rule_2, gated_delta_rule_2_step

GateStructure = Literal["channel", "scalar"]


class GatedDeltaNet2(nn.Module):
    """Gated DeltaNet-2: linear attention with separate, channel-wise erase and write gates.

    From x [B, T, D] (normalised by the block) the layer forms, per head (arXiv 2605.22791,
    sections 3.1, 3.5, C.1 and D.5):

        q, k = l2_normalize(SiLU(conv(W x)))      v = SiLU(conv(W_v x))
        b = sigmoid(W_b x)                        w = sigmoid(W_w x)
        g = -exp(A_log) softplus(f_proj_1(f_proj_0(x)) + dt_bias)
        y = o_proj(RMSNorm(gated_delta_rule_2(q, k, v, g, b, w)) * SiLU(g_proj_1(g_proj_0(x))))

    Channels are head-major. Matrix products run in `dtype`; the convolutions, the norms, the
    decay and the state are float32 (float64 when `dtype` is), and so are A_log and dt_bias.

    With `decode=True` the "cache" collection keeps the state and the last inputs of the three
    convolutions. A call takes any T >= 1: more tokens run the chunkwise form from the cached
    state, one token runs the step. The first `apply(..., mutable=["cache"])` starts from zeros
    and advances; `init` returns a cache of zeros. `segment_ids` then continue from call to call: a
    token whose id differs from the one before, in this call or the last, starts a new document;
    None continues the document of the last token.

    Attributes:
      num_heads: number of key heads H.
      head_dim: key channels per head.
      num_value_heads: number of value heads, a multiple of `num_heads`; `num_heads` if None.
        Value head i reads key head i // (num_value_heads / num_heads).
      expand_v: value channels per head, as a multiple of `head_dim`.
      use_short_conv: convolve q, k and v along time; otherwise SiLU alone is applied.
      conv_size: tokens seen by each convolution.
      allow_negative_eigenvalues: erase gate in [0, 2] instead of [0, 1].
      erase_gate: "channel", or "scalar" for the gate's mean over the channels of each head.
      write_gate: the same for the write gate.
      decay_lower_bound: None, or a bound in [-5, 0) on the log-decay, which then is
        bound * sigmoid(exp(A_log) (f + dt_bias)).
      output_gate: "silu", or "sigmoid" as in flash-linear-attention.
      norm_epsilon: epsilon of the output RMSNorm.
      dtype: dtype of the matrix products; promoted from input and parameters if None.
      param_dtype: dtype of all parameters but A_log and dt_bias.
      kernel_init: initialiser of every projection.
      decode: keep state between calls.
      implementation: of the operator, see `gdn2_jax.gated_delta_rule_2`.
    """

    num_heads: int
    head_dim: int = 128
    num_value_heads: int | None = None
    expand_v: float = 1.0
    use_short_conv: bool = True
    conv_size: int = 4
    allow_negative_eigenvalues: bool = False
    erase_gate: GateStructure = "channel"
    write_gate: GateStructure = "channel"
    decay_lower_bound: float | None = None
    output_gate: Literal["silu", "sigmoid"] = "silu"
    norm_epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = small_xavier_uniform()
    decode: bool = False
    implementation: Implementation | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Mixes tokens within each document.

        Args:
          x: inputs.
          segment_ids: document of each token, non-decreasing along T; neither the convolutions
            nor the state cross a change.

        Returns:
          Outputs of `x`'s shape, in the compute dtype.

        Raises:
          ValueError: an input or an attribute is malformed.
        """
        check_inputs(x, segment_ids)
        self._check_attributes()
        heads, key_dim = self.num_heads, self.head_dim
        value_heads, value_dim = self.num_value_heads or heads, round(key_dim * self.expand_v)

        q = self._convolved("q", x, heads * key_dim, segment_ids)
        k = self._convolved("k", x, heads * key_dim, segment_ids)
        v = self._convolved("v", x, value_heads * value_dim, segment_ids)
        q, k = _l2_normalize(_split(q, heads)), _l2_normalize(_split(k, heads))

        f = self._dense("f_proj_1", heads * key_dim)(self._dense("f_proj_0", value_dim)(x))
        g = self._log_decay(_split(f, heads))
        b = _gate(_split(self._dense("b_proj", heads * key_dim)(x), heads), self.erase_gate)
        if self.allow_negative_eigenvalues:
            b = 2 * b
        w = self._dense("w_proj", value_heads * value_dim)(x)
        w = _gate(_split(w, value_heads), self.write_gate)

        o = self._mix(q, k, _split(v, value_heads), g, b, w, segment_ids)

        z = self._dense("g_proj_0", value_dim)(x)
        z = self._dense("g_proj_1", value_heads * value_dim, use_bias=True)(z)
        activation = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}[self.output_gate]
        wide = jnp.promote_types(o.dtype, jnp.float32)
        norm = nn.RMSNorm(
            self.norm_epsilon, dtype=wide, param_dtype=self.param_dtype, name="o_norm"
        )
        y = norm(o) * activation(_split(z, value_heads).astype(wide))
        return self._dense("o_proj", x.shape[-1])(y.astype(o.dtype).reshape(*x.shape[:2], -1))

    def _dense(self, name: str, features: int, use_bias: bool = False) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name=name,
        )

    def _convolved(self, name: str, x: Array, features: int, segment_ids: Array | None) -> Array:
        y = self._dense(f"{name}_proj", features)(x)
        if not self.use_short_conv:
            return jax.nn.silu(y)
        convolution = ShortConvolution(
            self.conv_size,
            param_dtype=self.param_dtype,
            decode=self.decode,
            name=f"{name}_conv1d",
        )
        return convolution(y, segment_ids)

    def _log_decay(self, f: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        a_log = self.param("A_log", log_uniform_rate, (self.num_heads,), jnp.float32)
        shape = (self.num_heads, self.head_dim)
        dt_bias = self.param("dt_bias", inverse_softplus_time_step, shape, jnp.float32)
        return _log_decay(f, a_log, dt_bias, self.decay_lower_bound)

    def _mix(self, q, k, v, g, b, w, segment_ids) -> Float[Array, "B T Hv V"]:
        """Runs the operator, from and to the cached state when decoding."""
        if not self.decode:
            return gated_delta_rule_2(
                q, k, v, g, b, w, segment_ids=segment_ids, implementation=self.implementation
            )[0]
        batch, length, value_heads, value_dim = v.shape
        shape = (batch, value_heads, self.head_dim, value_dim)
        state = self.variable("cache", "state", jnp.zeros, shape, g.dtype)
        document = self.variable("cache", "segment_id", jnp.zeros, (batch,), jnp.int32)
        initial_state = state.value
        if segment_ids is not None:
            restarts = segment_ids[:, 0] != document.value
            initial_state = jnp.where(restarts[:, None, None, None], 0, initial_state)
        if length == 1:
            final_state, o = gated_delta_rule_2_step(
                initial_state,
                *(array[:, 0] for array in (q, k, v, g, b, w)),
                implementation=self.implementation,
            )
            o = o[:, None]
        else:
            o, final_state = gated_delta_rule_2(
                *(q, k, v, g, b, w),
                initial_state=initial_state,
                segment_ids=segment_ids,
                implementation=self.implementation,
            )
        if not self.is_initializing():
            state.value = final_state
            if segment_ids is not None:
                document.value = segment_ids[:, -1].astype(jnp.int32)
        return o

    def _check_attributes(self) -> None:
        for name in ("num_heads", "head_dim", "conv_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        value_heads = self.num_value_heads
        if value_heads is not None and (value_heads < 1 or value_heads % self.num_heads):
            raise ValueError(
                f"num_value_heads: expected a multiple of num_heads {self.num_heads}, "
                f"got {value_heads}"
            )
        value_dim = self.head_dim * self.expand_v
        if value_dim < 1 or value_dim != round(value_dim):
            raise ValueError(
                f"expand_v: expected head_dim * expand_v to be a positive whole number, "
                f"got {self.head_dim} * {self.expand_v}"
            )
        for name in ("erase_gate", "write_gate"):
            if getattr(self, name) not in ("channel", "scalar"):
                raise ValueError(
                    f'{name}: expected "channel" or "scalar", got {getattr(self, name)!r}'
                )
        bound = self.decay_lower_bound
        if bound is not None and not -5 <= bound < 0:
            raise ValueError(
                f"decay_lower_bound: expected None or a number in [-5, 0), got {bound}"
            )
        if self.output_gate not in ("silu", "sigmoid"):
            raise ValueError(f'output_gate: expected "silu" or "sigmoid", got {self.output_gate!r}')


def _split(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T H C"]:
    return x.reshape(*x.shape[:2], heads, -1)


# The backward recomputes the float32 intermediates of the next two from their narrow inputs.
@functools.partial(jax.checkpoint, static_argnums=(3,))
def _log_decay(
    f: Float[Array, "B T H K"],
    a_log: Float[Array, "H"],
    dt_bias: Float[Array, "H K"],
    lower_bound: float | None,
) -> Float[Array, "B T H K"]:
    """The log-decay (paper eqs. 12 and 86), in float32 or wider."""
    rate = jnp.exp(a_log)[:, None]
    f = f.astype(jnp.promote_types(f.dtype, jnp.float32)) + dt_bias
    if lower_bound is None:
        return -rate * jax.nn.softplus(f)
    return lower_bound * jax.nn.sigmoid(rate * f)


@jax.checkpoint
def _l2_normalize(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """Divides by sqrt(sum x^2 + 1e-6) over channels, computed in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square_sum = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square_sum + 1e-6)).astype(x.dtype)


def _gate(logits: Float[Array, "B T H C"], structure: GateStructure) -> Float[Array, "B T H C"]:
    gate = jax.nn.sigmoid(logits)
    if structure == "scalar":
        gate = jnp.broadcast_to(jnp.mean(gate, axis=-1, keepdims=True), gate.shape)
    return gate
