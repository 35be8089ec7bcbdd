"""The Mamba-3 token mixer."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int

from gdn2_jax.fields import require
from gdn2_jax.layers.initializers import fan_in_uniform, inverse_softplus_time_step
from gdn2_jax.layers.inputs import (
    check_attributes,
    check_choices,
    check_inputs,
)
from gdn2_jax.layers.parts import dense, from_cached_state, per_head
from gdn2_jax.ops import (
    Implementation,
    Mamba3Inputs,
    Mamba3State,
    Mamba3Weights,
    mamba3_from_state,
    mamba3_initial_state,
    mamba3_on_mesh,
)

_MIN_RATE = 1e-4


class Mamba3(nn.Module):
    """Mamba-3: trapezoidal steps of a rotating state, with one (SISO) or R inputs a head (MIMO).

    From x [B, T, D] (normalised by the block) the layer forms, with P = head_dim and N = state_dim,

        z, v, k, q, s, a, l, r = in_proj(x)     H P, H P, R G N, R G N, H, H, H and A channels
        q, k = RMSNorm(q), RMSNorm(k)           over N; one scale for all ranks, groups and heads
        dt = softplus(s + dt_bias)              g = -max(softplus(a), 1e-4) dt
        trapezoid = sigmoid(l)                  rotation = pi tanh(r)
        y = out_proj(mamba3(...))               biases, rotation, ranks, skip and gate are its part

    Mamba's names are x for v, B for k and C for q. Channels are head-major, ranks slowest. Matrix
    products run in `dtype`; the norms, the time step, the decay, the angles and the state are
    float32 (float64 when `dtype` is), and so are all parameters but those of projections and norms.
    `decode` and `segment_ids` work as in `GatedDeltaNet2`.

    Attributes:
      num_heads: number of heads H.
      head_dim: value channels of each.
      state_dim: key channels, an even number.
      num_groups: groups G of heads that share keys and queries before their biases.
      mimo_rank: R; None for SISO, without rank weights.
      rotary_fraction: share of the key channels that rotate, in pairs.
      decay_activation: of the decay rate; "heavy_tail" (1 + a for a >= 0, 1 / (1 - a) below) is
        what later releases of Mamba-3 use instead of "softplus".

    The others, `norm_epsilon` to `implementation`, are those of `Mamba2`.
    """

    num_heads: int
    head_dim: int = 64
    state_dim: int = 64
    num_groups: int = 1
    mimo_rank: int | None = None
    rotary_fraction: float = 0.5
    decay_activation: Literal["softplus", "heavy_tail"] = "softplus"
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
        heads, ranks = self.num_heads, self.mimo_rank or 1
        inner = heads * self.head_dim
        shared = (*x.shape[:2], ranks, self.num_groups, self.state_dim)
        sizes = [inner] * 2 + [ranks * self.num_groups * self.state_dim] * 2 + [heads] * 3

        features = sum(sizes) + self._angles
        # Its channels' parts do not end where a device's channels end.
        in_proj = dense(self, "in_proj", features, split_channels=False)
        projected = in_proj(x)
        starts = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        z, v, k, q, *scalars = jnp.split(projected, starts, axis=-1)
        wide = jnp.promote_types(projected.dtype, jnp.float32)

        def norm(name, u):
            norm = nn.RMSNorm(
                self.norm_epsilon, dtype=wide, param_dtype=self.param_dtype, name=name
            )
            return norm(u.reshape(shared)).astype(u.dtype)

        dt_bias = per_head(self, "dt_bias", inverse_softplus_time_step, heads)
        s, a, l, r = (u.astype(wide) for u in scalars)
        dt = jax.nn.softplus(s + dt_bias[None, None])
        inputs = Mamba3Inputs(
            q=norm("C_norm", q),
            k=norm("B_norm", k),
            v=v.reshape(*x.shape[:2], heads, self.head_dim),
            z=z.reshape(*x.shape[:2], heads, self.head_dim),
            g=-jnp.maximum(self._rate(a), _MIN_RATE) * dt,
            dt=dt,
            trapezoid=jax.nn.sigmoid(l),
            rotation=jnp.pi * jnp.tanh(r),
        )
        o = self._mix(inputs, self._weights(wide), segment_ids)
        init = self.out_kernel_init
        out_proj = dense(self, "out_proj", x.shape[-1], ("heads", "embed"), kernel_init=init)
        return out_proj(o.reshape(*x.shape[:2], inner))

    @property
    def _angles(self) -> int:
        return int(self.state_dim * self.rotary_fraction) // 2

    def _rate(self, a: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        if self.decay_activation == "softplus":
            return jax.nn.softplus(a)
        # Each branch sees only its own side, so that neither divides by zero.
        return jnp.where(a >= 0, 1 + a, 1 / (1 - jnp.minimum(a, 0)))

    def _weights(self, dtype: Any) -> Mamba3Weights:
        heads, ranks = self.num_heads, self.mimo_rank or 1

        def param(name, value, *shape):
            init = nn.initializers.constant(value)
            return per_head(self, name, init, heads, *shape).astype(dtype)

        weights = Mamba3Weights(
            q_bias=param("C_bias", 1, ranks, self.state_dim),
            k_bias=param("B_bias", 1, ranks, self.state_dim),
            skip=param("D", 1),
        )
        if self.mimo_rank is None:
            return weights
        return weights._replace(
            v_rank=param("mimo_x", 1 / ranks, ranks, self.head_dim),
            z_rank=param("mimo_z", 1, ranks, self.head_dim),
            o_rank=param("mimo_o", 1 / ranks, ranks, self.head_dim),
        )

    def _mix(
        self, inputs: Mamba3Inputs, weights: Mamba3Weights, segment_ids: Array | None
    ) -> Float[Array, "B T H V"]:
        """Runs the operator, from and to the cached state when decoding."""
        if not self.decode:
            return mamba3_on_mesh(inputs, weights, segment_ids, self.implementation)

        def advance(*state):
            state = Mamba3State(*state)
            return mamba3_from_state(state, inputs, weights, segment_ids, self.implementation)

        names: list[str] = ["phase", "state", "key", "value"]
        zeros = dict(zip(names, mamba3_initial_state(inputs), strict=True))
        return from_cached_state(self, zeros, segment_ids, inputs.v, advance)

    def _check_attributes(self) -> None:
        check_attributes(self, "num_heads", "head_dim", "state_dim", "num_groups", "mimo_rank")
        heads, groups = self.num_heads, self.num_groups
        require("num_groups", heads % groups == 0, f"a divisor of num_heads {heads}", groups)
        size, share = self.state_dim, self.rotary_fraction
        require("state_dim", size % 2 == 0, "an even number", size)
        expected = f"at most 1 and at least one pair of the {size} channels"
        require("rotary_fraction", 0 < share <= 1 and self._angles > 0, expected, share)
        check_choices(self, ("softplus", "heavy_tail"), "decay_activation")
