"""The Kimi Delta Attention token mixer."""

from typing import Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.delta_rule_layer import (
    DeltaRuleLayer,
    check_decay_lower_bound,
    log_decay,
    split_heads,
)
from gdn2_jax.layers.initializers import inverse_softplus_time_step, log_uniform_rate
from gdn2_jax.layers.inputs import check_choices, check_inputs
from gdn2_jax.layers.parts import dense, per_head


class KimiDeltaAttention(DeltaRuleLayer):
    """Kimi Delta Attention (KDA, arXiv 2510.26692): channel-wise decay, one gate a value head.

    With q, k and v as in `GatedDeltaNet2`, the layer runs the Gated Delta Rule-2 with both of its
    gates tied to beta:

        beta = sigmoid(b_proj(x))
        g = -exp(A_log) softplus(f_proj_1(f_proj_0(x)) + dt_bias)
        o = gated_delta_rule_2(q, k, v, g, beta, beta)
        y = o_proj(RMSNorm(o) * sigmoid(g_proj_1(g_proj_0(x))))

    beta, g, A_log and dt_bias belong to value heads: with several value heads a key head, q and k
    are repeated. Dtypes, decoding and `segment_ids` are those of `GatedDeltaNet2`.

    Attributes, in addition to those of `GatedDeltaNet2` (`num_heads` to `allow_negative_eigenvalues`,
    which doubles beta here, and `norm_epsilon` to `implementation`):
      decay_lower_bound: None, or a bound in [-5, 0) on the log-decay, which then is
        bound * sigmoid(exp(A_log) (f + dt_bias)), A_log starting from 0.
      output_gate: "sigmoid", or "silu" as in GDN-2.
    """

    decay_lower_bound: float | None = None
    output_gate: Literal["silu", "sigmoid"] = "sigmoid"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Mixes tokens within each document; see `GatedDeltaNet2.__call__`."""
        check_inputs(x, segment_ids, self.variables.get("cache"))
        self._check_attributes()
        heads, value_dim = self._value_heads, self._value_dim
        # First, for one all-reduce on a mesh axis "tensor", as in GDN-2.
        f = split_heads(self._low_rank("f_proj", x, value_dim, heads * self.head_dim), heads)
        z = self._low_rank("g_proj", x, value_dim, heads * value_dim, use_bias=True)

        q, k, v = self._queries_keys_values(x, segment_ids)
        bounded = self.decay_lower_bound is not None
        rate_init = nn.initializers.zeros if bounded else log_uniform_rate
        a_log = per_head(self, "A_log", rate_init, heads)
        dt_bias = per_head(self, "dt_bias", inverse_softplus_time_step, heads, self.head_dim)
        g = log_decay(f, a_log, dt_bias, self.decay_lower_bound)

        beta = jax.nn.sigmoid(dense(self, "b_proj", heads)(x))[..., None]
        if self.allow_negative_eigenvalues:
            beta = 2 * beta
        o = self._mix_tied(q, k, v, g, beta, segment_ids)
        return self._output(o, z, self.output_gate, x.shape[-1])

    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_decay_lower_bound(self.decay_lower_bound)
        check_choices(self, ("silu", "sigmoid"), "output_gate")
