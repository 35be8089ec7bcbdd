"""The Mamba-2 token mixer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int

from gdn2_jax.fields import require
from gdn2_jax.layers.decay import decay_rate
from gdn2_jax.layers.initializers import (
    fan_in_uniform,
    inverse_softplus_time_step,
    log_uniform_rate,
)
from gdn2_jax.layers.inputs import check_attributes, check_inputs
from gdn2_jax.layers.parts import dense, from_cached_state, per_head, short_convolution
from gdn2_jax.ops import Implementation, mamba2_from_state, mamba2_on_mesh


class Mamba2(nn.Module):
    """Mamba-2 (arXiv 2405.21060): one input-dependent decay a head, keys and queries shared by heads.

    From x [B, T, D] (normalised by the block) the layer forms, with P = head_dim and N = state_dim,

        z, u, k, q, s = in_proj(x)                    H P, H P, G N, G N and H channels
        u, k, q = SiLU(conv(u, k, q))                 one convolution, with bias
        dt = softplus(s + dt_bias)                    g = -exp(A_log) dt
        o = mamba2(q, k, u, g, dt) + D u
        y = out_proj(RMSNorm(o * SiLU(z)))            over H P / norm_groups channels each

    Mamba's names are x for u, B for k and C for q. Channels are head-major. Matrix products run in
    `dtype`; the convolution, the norm, the time step, the decay and the state are float32 (float64
    when `dtype` is), and so are A_log, dt_bias and D. `decode` and `segment_ids` work as in
    `GatedDeltaNet2`.

    Attributes:
      num_heads: number of heads H.
      head_dim: value channels of each.
      state_dim: key channels.
      num_groups: groups G of heads that share keys and queries.
      norm_groups: parts of the channels that the norm takes apart; `num_groups` if None, as in
        mamba_ssm and flash-linear-attention; 1 in transformers.
      conv_size: tokens seen by the convolution.
      norm_epsilon: epsilon of the RMSNorm.
      dtype: as in `GatedDeltaNet2`.
      param_dtype: dtype of all parameters but A_log, dt_bias and D.
      kernel_init: initialiser of `in_proj`; its names of axes count as in `GatedDeltaNet2`.
      out_kernel_init: initialiser of `out_proj` (depth-scaled in the language model).
      decode: keep state between calls.
      implementation: of the operator, see `gdn2_jax.ops.mamba2`.
    """

    num_heads: int
    head_dim: int = 64
    state_dim: int = 64
    num_groups: int = 1
    norm_groups: int | None = None
    conv_size: int = 4
    norm_epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = fan_in_uniform()
    out_kernel_init: Initializer = fan_in_uniform()
    decode: bool = False
    implementation: Implementation | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Mixes tokens within each document; see `GatedDeltaNet2.__call__`."""
        check_inputs(x, segment_ids, self.variables.get("cache"))
        self._check_attributes()
        heads, groups = self.num_heads, self.num_groups
        inner, shared = heads * self.head_dim, groups * self.state_dim

        features = 2 * inner + 2 * shared + heads
        # Its channels' parts do not end where a device's channels end.
        in_proj = dense(self, "in_proj", features, split_channels=False)
        projected = in_proj(x)
        z, vkq, s = jnp.split(projected, [inner, 2 * inner + 2 * shared], axis=-1)
        convolution = short_convolution(
            self, "conv1d", use_bias=True, implementation=self.implementation
        )
        v, k, q = jnp.split(convolution(vkq, segment_ids), [inner, inner + shared], axis=-1)
        q, k = (u.reshape(*x.shape[:2], groups, self.state_dim) for u in (q, k))
        v = v.reshape(*x.shape[:2], heads, self.head_dim)

        dt_bias = per_head(self, "dt_bias", inverse_softplus_time_step, heads)
        a_log = per_head(self, "A_log", log_uniform_rate, heads)
        skip = per_head(self, "D", nn.initializers.ones, heads)
        wide = jnp.promote_types(projected.dtype, jnp.float32)
        dt = jax.nn.softplus(s.astype(wide) + dt_bias[None, None])
        g = -decay_rate(a_log, wide)[None, None] * dt
        o = self._mix(q, k, v, g, dt, segment_ids)

        y = o.astype(wide) + skip[None, None, :, None] * v.astype(wide)
        y = y.reshape(z.shape) * jax.nn.silu(z.astype(wide))
        y = y.reshape(*x.shape[:2], self.norm_groups or groups, -1)
        norm = nn.RMSNorm(
            self.norm_epsilon,
            dtype=wide,
            param_dtype=self.param_dtype,
            feature_axes=(-2, -1),
            reduction_axes=-1,
            name="norm",
        )
        y = norm(y).astype(projected.dtype).reshape(z.shape)
        init = self.out_kernel_init
        return dense(self, "out_proj", x.shape[-1], ("heads", "embed"), kernel_init=init)(y)

    def _mix(self, q, k, v, g, dt, segment_ids) -> Float[Array, "B T H V"]:
        """Runs the operator, from and to the cached state when decoding."""
        arrays = (q, k, v, g, dt)
        if not self.decode:
            return mamba2_on_mesh(*arrays, segment_ids, self.implementation)
        shape = (v.shape[0], self.num_heads, self.state_dim, self.head_dim)

        def advance(state):
            o, state = mamba2_from_state(state, arrays, segment_ids, self.implementation)
            return o, (state,)

        zeros = {"state": jax.ShapeDtypeStruct(shape, g.dtype)}
        return from_cached_state(self, zeros, segment_ids, v, advance)

    def _check_attributes(self) -> None:
        check_attributes(self, "num_heads", "head_dim", "state_dim", "num_groups", "conv_size")
        heads, groups = self.num_heads, self.num_groups
        require("num_groups", heads % groups == 0, f"a divisor of num_heads {heads}", groups)
        inner, parts = self.num_heads * self.head_dim, self.norm_groups
        if parts is not None and (parts < 1 or inner % parts):
            raise ValueError(f"norm_groups: expected None or a divisor of {inner}, got {parts}")
