"""Pre-norm residual blocks, and the choice of their mixers by name."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gdn2_jax.layers import (
    Attention,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    Mamba2,
    Mamba3,
    SlidingWindowAttention,
    SwiGLU,
)
from gdn2_jax.layers.initializers import fan_in_uniform
from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.remat import policy
from gdn2_jax.parallel import constrain


def residual_dtype(config: ModelConfig) -> Any:
    """The residual stream, the norms and the logits: float32, or float64 in float64 models."""
    return jnp.promote_types(config.dtype, jnp.float32)


def _depth_scaled(config: ModelConfig):
    return fan_in_uniform(math.sqrt(2 * config.num_layers))


def _delta_rule(config: ModelConfig, decode: bool, name: str) -> dict[str, Any]:
    """The attributes that all delta-rule layers have."""
    return {
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "num_value_heads": config.num_value_heads,
        "expand_v": config.expand_v,
        "conv_size": config.conv_size,
        "allow_negative_eigenvalues": config.allow_negative_eigenvalues,
        "norm_epsilon": config.norm_epsilon,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "decode": decode,
        "implementation": config.implementation,
        "name": name,
    }


def _gdn2(config: ModelConfig, decode: bool, name: str) -> nn.Module:
    return GatedDeltaNet2(
        **_delta_rule(config, decode, name),
        erase_gate=config.erase_gate,
        write_gate=config.write_gate,
        decay_lower_bound=config.decay_lower_bound,
        output_gate=config.output_gate or "silu",
    )


def _kda(config: ModelConfig, decode: bool, name: str) -> nn.Module:
    return KimiDeltaAttention(
        **_delta_rule(config, decode, name),
        decay_lower_bound=config.decay_lower_bound,
        output_gate=config.output_gate or "sigmoid",
    )


def _gdn(config: ModelConfig, decode: bool, name: str) -> nn.Module:
    return GatedDeltaNet(
        **_delta_rule(config, decode, name), output_gate=config.output_gate or "silu"
    )


def _deltanet(config: ModelConfig, decode: bool, name: str) -> nn.Module:
    return GatedDeltaNet(
        **_delta_rule(config, decode, name),
        use_decay=False,
        output_gate=config.output_gate or "silu",
    )


def _state_space(config: ModelConfig, decode: bool, name: str) -> dict[str, Any]:
    """The attributes that Mamba-2 and Mamba-3 share."""
    return {
        "num_heads": config.ssm_inner_dim // config.ssm_head_dim,
        "head_dim": config.ssm_head_dim,
        "state_dim": config.ssm_state_dim,
        "norm_epsilon": config.norm_epsilon,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "out_kernel_init": _depth_scaled(config),
        "decode": decode,
        "implementation": config.implementation,
        "name": name,
    }


def _mamba2(config: ModelConfig, decode: bool, name: str) -> nn.Module:
    return Mamba2(**_state_space(config, decode, name), conv_size=config.conv_size)


def _mamba3(config: ModelConfig, decode: bool, name: str) -> nn.Module:
    rank = config.mimo_rank if config.mamba3_form == "mimo" else None
    return Mamba3(**_state_space(config, decode, name), mimo_rank=rank)


def _attention(config: ModelConfig, decode: bool, name: str) -> nn.Module:
    return Attention(
        num_heads=config.attention_heads,
        window_size=config.context_length,
        rope_theta=config.rope_theta,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        out_kernel_init=_depth_scaled(config),
        decode=decode,
        name=name,
    )


def _sliding_window_attention(config: ModelConfig, decode: bool, name: str) -> nn.Module:
    return SlidingWindowAttention(
        num_heads=config.attention_heads,
        window_size=config.window_size,
        rope_theta=config.rope_theta,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        out_kernel_init=_depth_scaled(config),
        decode=decode,
        name=name,
    )


MIXERS: dict[str, Callable[[ModelConfig, bool, str], nn.Module]] = {
    "gdn2": _gdn2,
    "kda": _kda,
    "gdn": _gdn,
    "deltanet": _deltanet,
    "mamba2": _mamba2,
    "mamba3": _mamba3,
    "attention": _attention,
    "sliding_window_attention": _sliding_window_attention,
}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    The stream `x` and the norms are float32, the branches run in `config.dtype`.

    Attributes:
      config: sizes and options.
      mixer: key of `MIXERS`.
      decode: keep state between calls.
    """

    config: ModelConfig
    mixer: str
    decode: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Adds both branches to the stream."""
        config = self.config

        def norm(name, x):
            module = nn.RMSNorm(
                config.norm_epsilon, dtype=x.dtype, param_dtype=config.param_dtype, name=name
            )
            return checkpoint_name(module(x).astype(config.dtype), "operand")

        mixer = MIXERS[self.mixer](config, self.decode, "mixer")
        mixed = mixer(norm("mixer_norm", x), segment_ids)
        x += checkpoint_name(mixed, "mixer_output").astype(x.dtype)
        x = constrain(x, "batch", "sequence", None)
        mlp = SwiGLU(
            config.mlp_dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            down_kernel_init=_depth_scaled(config),
            name="mlp",
        )
        x += mlp(norm("mlp_norm", x)).astype(x.dtype)
        return constrain(x, "batch", "sequence", None)


class Layers(nn.Module):
    """What the model scans over: one block, or a pair (mixer, sliding-window attention).

    Attributes:
      config: sizes and options.
      decode: keep state between calls.
    """

    config: ModelConfig
    decode: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], None]:
        """Returns the stream as the scan's carry."""
        block, config = Block, self.config
        if config.remat != "none" and not self.decode:
            # In a loop nothing can be merged across iterations, so no barrier is needed.
            block = nn.remat(Block, prevent_cse=config.unroll, policy=policy(config.remat))
        x = block(config, config.mixer, self.decode, name="block")(x, segment_ids)
        if config.hybrid:
            attention = "sliding_window_attention"
            x = block(config, attention, self.decode, name="attention_block")(x, segment_ids)
        return x, None
