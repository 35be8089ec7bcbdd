"""The Gated DeltaNet token mixer, and DeltaNet, which is the same without decay."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.delta_rule_layer import DeltaRuleLayer, log_decay
from gdn2_jax.layers.initializers import inverse_softplus_time_step, log_uniform_rate_from_zero
from gdn2_jax.layers.inputs import check_choices, check_inputs
from gdn2_jax.layers.parts import dense, per_head


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

    Attributes, in addition to those of `GatedDeltaNet2` (`num_heads` to `allow_negative_eigenvalues`,
    which doubles beta here, and `norm_epsilon` to `implementation`):
      use_decay: False for DeltaNet, which never forgets but by overwriting.
      output_gate: "silu" or "sigmoid".
    """

    use_decay: bool = True
    output_gate: Literal["silu", "sigmoid"] = "silu"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Mixes tokens within each document; see `GatedDeltaNet2.__call__`."""
        check_inputs(x, segment_ids, self.variables.get("cache"))
        self._check_attributes()
        q, k, v = self._queries_keys_values(x, segment_ids)
        beta = jax.nn.sigmoid(dense(self, "b_proj", self._value_heads)(x))
        if self.allow_negative_eigenvalues:
            beta = 2 * beta
        g = self._log_decay(x, v.dtype)
        o = self._mix_tied(q, k, v, g[..., None], beta[..., None], segment_ids)
        z = dense(self, "g_proj", self._value_heads * self._value_dim)(x)
        return self._output(o, z, self.output_gate, x.shape[-1])

    def _log_decay(self, x: Float[Array, "B T D"], dtype) -> Float[Array, "B T Hv"]:
        heads = self._value_heads
        if not self.use_decay:
            return jnp.zeros((*x.shape[:2], heads), jnp.promote_types(dtype, jnp.float32))
        a_log = per_head(self, "A_log", log_uniform_rate_from_zero, heads)
        dt_bias = per_head(self, "dt_bias", inverse_softplus_time_step, heads)
        return log_decay(dense(self, "a_proj", heads)(x), a_log, dt_bias, None)

    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_choices(self, ("silu", "sigmoid"), "output_gate")
