"""The Gated DeltaNet token mixer, and DeltaNet, which is the same without decay."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.delta_rule_layer import DeltaRuleLayer, check_output_gate, log_decay
from gdn2_jax.layers.initializers import inverse_softplus_time_step, log_uniform_rate_from_zero
from gdn2_jax.layers.inputs import check_inputs


class GatedDeltaNet(DeltaRuleLayer):
    """Gated DeltaNet (GDN, arXiv 2412.06464): one decay and one gate a value head.

    With q, k and v as in `GatedDeltaNet2`, the layer runs the Gated Delta Rule-2 with one log-decay
    for all channels of a head and both gates tied to beta:

        beta = sigmoid(b_proj(x))
        g = -exp(A_log) softplus(a_proj(x) + dt_bias)      (0 in DeltaNet, arXiv 2406.06484)
        o = gated_delta_rule_2(q, k, v, g, beta, beta)
        y = o_proj(RMSNorm(o) * SiLU(g_proj(x)))

    beta, g, A_log and dt_bias belong to value heads: with several value heads a key head, q and k
    are repeated. Dtypes, decoding and `segment_ids` are those of `GatedDeltaNet2`.

    Attributes:
      num_heads: number of query and key heads.
      head_dim: key channels per head.
      num_value_heads: number of value heads, a multiple of `num_heads`; `num_heads` if None.
        Value head i reads key head i // (num_value_heads / num_heads).
      expand_v: value channels per head, as a multiple of `head_dim`.
      use_short_conv: convolve q, k and v along time; otherwise SiLU alone is applied.
      conv_size: tokens seen by each convolution.
      allow_negative_eigenvalues: beta in [0, 2] instead of [0, 1].
      use_decay: False for DeltaNet, which never forgets but by overwriting.
      output_gate: "silu" or "sigmoid".
      norm_epsilon: epsilon of the output RMSNorm.
      dtype: dtype of the matrix products; promoted from input and parameters if None.
      param_dtype: dtype of all parameters but A_log and dt_bias.
      kernel_init: initialiser of every projection. Made by nn.with_logical_partitioning, its two
        names are those of the model's width and of the channels, in all parameters.
      decode: keep state between calls.
      implementation: of the operator, see `gdn2_jax.gated_delta_rule_2`.
    """

    use_decay: bool = True
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
        q, k, v = self._queries_keys_values(x, segment_ids)
        beta = jax.nn.sigmoid(self._dense("b_proj", self._value_heads)(x))
        if self.allow_negative_eigenvalues:
            beta = 2 * beta
        g = self._log_decay(x, v.dtype)
        o = self._mix_tied(q, k, v, g[..., None], beta[..., None], segment_ids)
        z = self._dense("g_proj", self._value_heads * self._value_dim)(x)
        return self._output(o, z, self.output_gate, x.shape[-1])

    def _log_decay(self, x: Float[Array, "B T D"], dtype) -> Float[Array, "B T Hv"]:
        heads = self._value_heads
        if not self.use_decay:
            return jnp.zeros((*x.shape[:2], heads), jnp.promote_types(dtype, jnp.float32))
        a_log = self._per_head("A_log", log_uniform_rate_from_zero, heads)
        dt_bias = self._per_head("dt_bias", inverse_softplus_time_step, heads)
        return log_decay(self._dense("a_proj", heads)(x), a_log, dt_bias, None)

    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_output_gate(self.output_gate)
