"""Pre-norm residual blocks."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gdn2_jax.layers import SwiGLU
from gdn2_jax.layers.rms_norm import RMSNorm
from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.mixers import Mixer, depth_scaled
from gdn2_jax.models.remat import policy
from gdn2_jax.parallel import beside, constrain


def residual_dtype(config: ModelConfig) -> Any:
    """The residual stream, the norms and the logits: float32, or float64 in float64 models."""
    return jnp.promote_types(config.dtype, jnp.float32)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) unless `config.mlp_dim` is None.

    The stream `x` and the norms are float32, the branches run in `config.dtype`.

    Attributes:
      config: sizes and options.
      decode: keep state between calls.
    """

    config: ModelConfig
    mixer: Mixer
    decode: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Adds both branches to the stream."""
        config = self.config

        def norm(name, x):
            module = RMSNorm(config.norm_epsilon, config.dtype, config.param_dtype, name=name)
            return module(x)

        mixer = self.mixer.layer(config, self.decode, "mixer")
        mixed = mixer(norm("mixer_norm", x), segment_ids)
        x += checkpoint_name(mixed, "mixer_output").astype(x.dtype)
        x = constrain(x, "batch", "sequence", None)
        if config.mlp_dim is None:
            return x
        mlp = SwiGLU(
            config.mlp_dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            down_kernel_init=depth_scaled(config),
            name="mlp",
        )
        x += mlp(norm("mlp_norm", x)).astype(x.dtype)
        return constrain(x, "batch", "sequence", None)


class Layers(nn.Module):
    """What the model scans over: one block, or a pair (mixer, attention).

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
        y = block(config, config.mixer, self.decode, name="block")(x, segment_ids)
        if config.hybrid:
            attention_block = block(config, config.attention, self.decode, name="attention_block")
            y = attention_block(y, segment_ids)
        # Of one type in all iterations, however the last kernel is split over Explicit axes.
        return beside(y, x), None
