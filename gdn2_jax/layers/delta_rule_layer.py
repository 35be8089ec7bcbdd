"""What the mixers that run on the Gated Delta Rule-2 have in common."""

import functools
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int, UInt32

from gdn2_jax.layers.decay import decay_rate
from gdn2_jax.layers.initializers import small_xavier_uniform
from gdn2_jax.layers.inputs import check_attributes, check_choices
from gdn2_jax.layers.parts import dense, from_cached_state, short_convolution
from gdn2_jax.layers.rms_norm import RMSNorm
from gdn2_jax.layers.short_convolution import to_unit_length
from gdn2_jax.ops import (
    Implementation,
    gated_delta_rule_2_from_state,
    gated_delta_rule_2_on_mesh,
    rounding_seeds,
)
from gdn2_jax.parallel import beside

StateRounding = Literal["nearest", "stochastic"]


class DeltaRuleLayer(nn.Module):
    """The parts and attributes of GDN-2, KDA, GDN and DeltaNet layers; see `GatedDeltaNet2`.

    Matrix products run in `dtype`; the convolutions, the norms, the decay and the state are
    float32 (float64 when `dtype` is), and so are A_log and dt_bias.
    """

    num_heads: int
    head_dim: int = 128
    num_value_heads: int | None = None
    expand_v: float = 1.0
    use_short_conv: bool = True
    conv_size: int = 4
    allow_negative_eigenvalues: bool = False
    norm_epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = small_xavier_uniform()
    decode: bool = False
    state_rounding: StateRounding | None = None
    implementation: Implementation | None = None

    @property
    def _value_heads(self) -> int:
        return self.num_value_heads or self.num_heads

    @property
    def _value_dim(self) -> int:
        return round(self.head_dim * self.expand_v)

    def _low_rank(
        self, name: str, x: Float[Array, "B T D"], rank: int, features: int, use_bias: bool = False
    ) -> Array:
        """Two projections without anything between; the bias is the second one's."""
        x = dense(self, f"{name}_0", rank, ("embed", None))(x)
        return dense(self, f"{name}_1", features, (None, "heads"), use_bias=use_bias)(x)

    def _queries_keys_values(self, x: Float[Array, "B T D"], segment_ids: Array | None) -> tuple:
        """Queries and keys [B, T, H, K] of unit length, values [B, T, Hv, V]."""
        key_features = self.num_heads * self.head_dim
        value_features = self._value_heads * self._value_dim
        q = self._convolved("q", x, key_features, segment_ids, unit_dim=self.head_dim)
        k = self._convolved("k", x, key_features, segment_ids, unit_dim=self.head_dim)
        v = self._convolved("v", x, value_features, segment_ids, unit_dim=None)
        return *(split_heads(u, self.num_heads) for u in (q, k)), split_heads(v, self._value_heads)

    def _convolved(
        self, name: str, x: Array, features: int, segment_ids: Array | None, unit_dim: int | None
    ) -> Array:
        y = dense(self, f"{name}_proj", features)(x)
        if not self.use_short_conv:
            y = jax.nn.silu(y)
            return y if unit_dim is None else _heads_to_unit_length(y, unit_dim)
        convolution = short_convolution(
            self, f"{name}_conv1d", unit_dim=unit_dim, implementation=self.implementation
        )
        return convolution(y, segment_ids)

    def _mix_tied(self, q, k, v, g, beta, segment_ids) -> Float[Array, "B T Hv V"]:
        """The operator with one gate `beta` [B, T, Hv, 1] a value head, for erasing and writing.

        `g` [B, T, Hv, K or 1] is the log-decay of each value head, so q and k are repeated to the
        value heads.
        """
        q, k = (repeat_heads(u, self._value_heads // self.num_heads) for u in (q, k))
        return self._mix(q, k, v, g, beta, beta, segment_ids)

    def _mix(self, q, k, v, g, b, w, segment_ids) -> Float[Array, "B T Hv V"]:
        """Runs the operator, from and to the cached state when decoding."""
        q, k, v, g, b, w = (checkpoint_name(x, "operand") for x in (q, k, v, g, b, w))
        if not self.decode:
            return gated_delta_rule_2_on_mesh(
                q, k, v, g, b, w, segment_ids=segment_ids, implementation=self.implementation
            )[0]
        if self.state_rounding is not None and g.dtype == jnp.float64:
            raise ValueError(
                f"state_rounding: expected None with a decay in float64, got {self.state_rounding!r}"
            )
        kept = g.dtype if self.state_rounding is None else jnp.bfloat16
        shape = (v.shape[0], v.shape[2], self.head_dim, v.shape[3])
        zeros = {"state": jax.ShapeDtypeStruct(shape, kept)}
        if self.state_rounding == "stochastic":
            zeros["position"] = jax.ShapeDtypeStruct(shape[:1], jnp.uint32)

        def advance(state, *position):
            position = [_advanced(beside(x, v), v, segment_ids) for x in position]
            seeds = [rounding_seeds(x, v.shape[2]) for x in position]
            o, state = gated_delta_rule_2_from_state(
                state, (q, k, v, g, b, w), segment_ids, self.implementation, *seeds
            )
            return o, (state, *position)

        return from_cached_state(self, zeros, segment_ids, v, advance)

    def _output(
        self,
        o: Float[Array, "B T Hv V"],
        z: Float[Array, "B T D"],
        activation: Literal["silu", "sigmoid"],
        width: int,
    ) -> Float[Array, "B T {width}"]:
        """o_proj(RMSNorm(o) * activation(z))."""
        wide = jnp.promote_types(o.dtype, jnp.float32)
        norm = RMSNorm(self.norm_epsilon, wide, self.param_dtype, name="o_norm")
        gate = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}[activation]
        y = norm(o) * gate(split_heads(z, self._value_heads).astype(wide))
        y = checkpoint_name(y.astype(o.dtype), "operand")
        o_proj = dense(self, "o_proj", width, ("heads", "embed"))
        return o_proj(y.reshape(*o.shape[:2], -1))

    def _check_attributes(self) -> None:
        check_attributes(self, "num_heads", "head_dim", "conv_size")
        if self.state_rounding is not None:
            check_choices(self, get_args(StateRounding), "state_rounding")
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


def _advanced(
    position: UInt32[Array, "B"], like: Array, segment_ids: Int[Array, "B T"] | None
) -> UInt32[Array, "B"]:
    """Tokens of each row's document after `like` [B, T, ...], `position` before it."""
    if segment_ids is None:
        return position + np.uint32(like.shape[1])
    segment_ids = beside(segment_ids, like)
    own = segment_ids == segment_ids[:, -1:]
    before = jnp.where(own[:, 0], position, 0)
    return before + jnp.sum(own, axis=1, dtype=jnp.uint32)


def split_heads(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T H C"]:
    """Splits the last axis into heads and their channels."""
    return x.reshape(*x.shape[:2], heads, -1)


def repeat_heads(x: Float[Array, "B T H K"], count: int) -> Float[Array, "B T H*{count} K"]:
    """Repeats each head `count` times; on Explicit axes jnp.repeat would ask for a sharding."""
    shape = (*x.shape[:3], count, x.shape[3])
    return jnp.broadcast_to(x[:, :, :, None], shape).reshape(*x.shape[:2], -1, x.shape[3])


# The backward recomputes the float32 intermediates of the next two from their narrow inputs.
@functools.partial(jax.checkpoint, static_argnums=(3,))
def log_decay(
    f: Float[Array, "B T H *K"],
    a_log: Float[Array, "H"],
    dt_bias: Float[Array, "H *K"],
    lower_bound: float | None,
) -> Float[Array, "B T H *K"]:
    """-exp(A_log) softplus(f + dt_bias), or lower_bound sigmoid(exp(A_log) (f + dt_bias)).

    Per channel as in GDN-2 (paper eqs. 12 and 86) and KDA, or per head as in GDN; in float32 or
    wider.
    """
    wide = jnp.promote_types(f.dtype, jnp.float32)
    rate = decay_rate(a_log, wide).reshape(1, 1, -1, *[1] * (dt_bias.ndim - 1))
    f = f.astype(wide) + dt_bias[None, None]
    if lower_bound is None:
        return -rate * jax.nn.softplus(f)
    return lower_bound * jax.nn.sigmoid(rate * f)


@functools.partial(jax.checkpoint, static_argnums=(1,))
def _heads_to_unit_length(x: Float[Array, "B T D"], head_dim: int) -> Float[Array, "B T D"]:
    """Divides every `head_dim` channels by their length, computed in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    heads = wide.reshape(*x.shape[:2], -1, head_dim)
    return to_unit_length(heads).reshape(x.shape).astype(x.dtype)


def check_decay_lower_bound(bound: float | None) -> None:
    """Raises ValueError unless `bound` is None or in [-5, 0)."""
    if bound is not None and not -5 <= bound < 0:
        raise ValueError(f"decay_lower_bound: expected None or a number in [-5, 0), got {bound}")
