"""The Gated DeltaNet token mixer; without decay DeltaNet, with several steps a token DeltaProduct."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.delta_rule_layer import DeltaRuleLayer, log_decay, split_heads
from gdn2_jax.layers.initializers import inverse_softplus_time_step, log_uniform_rate_from_zero
from gdn2_jax.layers.inputs import check_attributes, check_choices, check_inputs
from gdn2_jax.layers.parts import dense, per_head


class GatedDeltaNet(DeltaRuleLayer):
    """Gated DeltaNet (GDN, arXiv 2412.06464): one decay and one gate a value head.

    With q, k and v as in `GatedDeltaNet2`, the layer runs the Gated Delta Rule-2 with one log-decay
    for all channels of a head and both gates tied to beta:

        beta = sigmoid(b_proj(x))
        g = -exp(A_log) softplus(a_proj(x) + dt_bias)      (0 in DeltaNet, arXiv 2406.06484)
        o = gated_delta_rule_2(q, k, v, g, beta, beta)
        y = o_proj(RMSNorm(o) * SiLU(g_proj(x)))

    With n = `num_householder` > 1 it is Gated DeltaProduct (arXiv 2502.10297): a token has n keys,
    values and betas a head, decays the state once, takes n steps of the delta rule and reads once. The
    operator runs on a sequence n times as long.

    beta, g, A_log and dt_bias belong to value heads: with several value heads a key head, q and k
    are repeated. Dtypes, decoding and `segment_ids` are those of `GatedDeltaNet2`.

    Attributes, in addition to those of `GatedDeltaNet2` (`num_heads` to `allow_negative_eigenvalues`,
    which doubles beta here, and `norm_epsilon` to `implementation`):
      use_decay: False for DeltaNet, which never forgets but by overwriting.
      num_householder: steps a token.
      output_gate: "silu" or "sigmoid".
    """

    use_decay: bool = True
    num_householder: int = 1
    output_gate: Literal["silu", "sigmoid"] = "silu"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Mixes tokens within each document; see `GatedDeltaNet2.__call__`."""
        check_inputs(x, segment_ids, self.variables.get("cache"))
        self._check_attributes()
        steps, key_dim = self.num_householder, self.head_dim
        q, k, v = (
            split_heads(self._convolved(name, x, heads * channels, segment_ids, unit_dim), heads)
            for name, heads, channels, unit_dim in (
                ("q", self.num_heads, key_dim, key_dim),
                ("k", self.num_heads * steps, key_dim, key_dim),
                ("v", self._value_heads * steps, self._value_dim, None),
            )
        )
        beta = jax.nn.sigmoid(dense(self, "b_proj", self._value_heads * steps)(x))
        if self.allow_negative_eigenvalues:
            beta = 2 * beta
        g, beta = self._log_decay(x, v.dtype)[..., None], beta[..., None]
        if steps > 1:
            # The first step of a token decays, the last one reads.
            q, g = _at_step(q, steps - 1, steps), _at_step(g, 0, steps)
            k, v, beta = (_in_turn(u, steps) for u in (k, v, beta))
            if segment_ids is not None:
                shape = (*segment_ids.shape, steps)
                segment_ids = jnp.broadcast_to(segment_ids[..., None], shape)
                segment_ids = segment_ids.reshape(shape[0], -1)
        o = self._mix_tied(q, k, v, g, beta, segment_ids)
        if steps > 1:
            o = o.reshape(*x.shape[:2], steps, *o.shape[2:])[:, :, -1]
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
        check_attributes(self, "num_householder")


def _in_turn(x: Float[Array, "B T Hn C"], steps: int) -> Float[Array, "B T*{steps} Hn//{steps} C"]:
    """The steps of each token one after another."""
    batch, length, _, channels = x.shape
    x = jnp.moveaxis(x.reshape(batch, length, -1, steps, channels), 3, 2)
    return x.reshape(batch, length * steps, -1, channels)


def _at_step(x: Float[Array, "B T H C"], step: int, steps: int) -> Float[Array, "B T*{steps} H C"]:
    """Zeros but at one step of each token."""
    around = ((0, 0), (0, 0), (step, steps - 1 - step), (0, 0), (0, 0))
    return jnp.pad(x[:, :, None], around).reshape(x.shape[0], -1, *x.shape[2:])
