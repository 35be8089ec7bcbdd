"""The Gated DeltaNet-2 token mixer."""

from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.delta_rule_layer import (
    DeltaRuleLayer,
    check_decay_lower_bound,
    log_decay,
    repeat_heads,
    split_heads,
)
from gdn2_jax.layers.initializers import inverse_softplus_time_step, log_uniform_rate
from gdn2_jax.layers.inputs import check_choices, check_inputs
from gdn2_jax.layers.parts import dense, per_head

EraseGate = Literal["channel", "scalar"]
WriteGate = Literal["channel", "scalar", "tied"]


class GatedDeltaNet2(DeltaRuleLayer):
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
      write_gate: the same for the write gate, or "tied": the mean of the erase gate, in [0, 1], over the
        channels of each head, so no `w_proj`. Beside a scalar erase gate one number erases and writes.
      decay_lower_bound: None, or a bound in [-5, 0) on the log-decay, which then is
        bound * sigmoid(exp(A_log) (f + dt_bias)).
      output_gate: "silu", or "sigmoid" as in flash-linear-attention.
      norm_epsilon: epsilon of the output RMSNorm.
      dtype: dtype of the matrix products; promoted from input and parameters if None.
      param_dtype: dtype of all parameters but A_log and dt_bias.
      kernel_init: initialiser of every projection. Made by nn.with_logical_partitioning, its two
        names are those of the model's width and of the channels, in all parameters.
      decode: keep state between calls.
      state_rounding: None keeps the state between calls in float32. "nearest" and "stochastic" keep it
        in bfloat16, to which each call rounds it: half the memory and traffic of a decoding step.
        The random bits of "stochastic" follow from the number of tokens of the row's document so
        far, which the cache then has as `position`: the same document gives the same outputs, beside
        any other rows.
      implementation: of the operator, see `gdn2_jax.gated_delta_rule_2`, and of the convolutions, see
        `ShortConvolution`.
    """

    erase_gate: EraseGate = "channel"
    write_gate: WriteGate = "channel"
    decay_lower_bound: float | None = None
    output_gate: Literal["silu", "sigmoid"] = "silu"

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
        check_inputs(x, segment_ids, self.variables.get("cache"))
        self._check_attributes()
        heads, key_dim = self.num_heads, self.head_dim
        value_heads, value_dim = self._value_heads, self._value_dim
        # First, so that in the sum of x's gradients all projections to heads meet without them between:
        # a mesh axis "tensor" then takes one all-reduce for that sum, not one for each projection.
        f = self._low_rank("f_proj", x, value_dim, heads * key_dim)
        z = self._low_rank("g_proj", x, value_dim, value_heads * value_dim, use_bias=True)

        q, k, v = self._queries_keys_values(x, segment_ids)
        g = self._log_decay(split_heads(f, heads))
        b = dense(self, "b_proj", heads * key_dim)(x)
        b = _gate(split_heads(b, heads), self.erase_gate)
        if self.write_gate == "tied":
            w = repeat_heads(jnp.mean(b, axis=-1, keepdims=True), value_heads // heads)
        else:
            w = dense(self, "w_proj", value_heads * value_dim)(x)
            w = _gate(split_heads(w, value_heads), self.write_gate)
        if self.allow_negative_eigenvalues:
            b = 2 * b

        o = self._mix(q, k, v, g, b, w, segment_ids)
        return self._output(o, z, self.output_gate, x.shape[-1])

    def _log_decay(self, f: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        a_log = per_head(self, "A_log", log_uniform_rate, self.num_heads)
        dt_bias = per_head(
            self, "dt_bias", inverse_softplus_time_step, self.num_heads, self.head_dim
        )
        return log_decay(f, a_log, dt_bias, self.decay_lower_bound)

    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_choices(self, get_args(EraseGate), "erase_gate")
        check_choices(self, get_args(WriteGate), "write_gate")
        check_decay_lower_bound(self.decay_lower_bound)
        check_choices(self, ("silu", "sigmoid"), "output_gate")


def _gate(logits: Float[Array, "B T H C"], structure: EraseGate) -> Float[Array, "B T H #C"]:
    gate = jax.nn.sigmoid(logits)
    return jnp.mean(gate, axis=-1, keepdims=True) if structure == "scalar" else gate
