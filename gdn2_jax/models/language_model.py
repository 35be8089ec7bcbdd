"""The language model: embedding, scanned blocks, final norm, untied head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.initializers import fan_in_uniform
from gdn2_jax.layers.rms_norm import RMSNorm
from gdn2_jax.models.blocks import Layers, residual_dtype
from gdn2_jax.models.config import ModelConfig
from gdn2_jax.parallel import as_typed, constrain, dense_product, gathered, partitioned


class LanguageModel(nn.Module):
    """A causal language model of one mixer's blocks, or of those and windowed attention in turn.

    The parameters of all layers are stacked along a leading axis, under "layers". Their tree does
    not depend on `config.remat`, `config.unroll` or `decode`.

    Attributes:
      config: sizes and options.
      decode: keep every mixer's state in the "cache" collection, see `GatedDeltaNet2`.
    """

    config: ModelConfig
    decode: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        last_only: bool = False,
        head: bool = True,
    ) -> Float[Array, "B L vocab"]:
        """Logits of the token after each token.

        Args:
          tokens: ids in [0, vocab_size).
          segment_ids: document of each token, non-decreasing along T; None for one document.
          last_only: compute the logits of the last position only, [B, 1, vocab].
          head: apply the output layer.

        Returns:
          Logits, float32. Without `head` the inputs of the output layer, [B, T, D] in the compute
          dtype.

        Raises:
          ValueError: `tokens` or `segment_ids` has a wrong shape or dtype.
        """
        if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens: expected a non-empty integer array [B T], "
                f"got shape {tuple(tokens.shape)} of {tokens.dtype}"
            )
        config = self.config
        dtype = residual_dtype(config)
        embed = nn.Embed(
            config.vocab_size,
            config.d_model,
            dtype=dtype,
            param_dtype=config.param_dtype,
            embedding_init=partitioned(jax.nn.initializers.normal(0.02), "vocab", "embed"),
            name="embed",
        )
        length = config.num_layers // len(config.mixers)
        layers = nn.scan(
            Layers,
            variable_axes={"params": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # the stub knows ints
            length=length,
            unroll=length if config.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
            # Nothing is shared by the layers, and the check traces them once more.
            check_constancy_invariants=False,
        )
        with jax.named_scope("embed"):
            # Gathered over "fsdp" before the lookup: the rows it yields are split over that axis.
            table = gathered(embed.embedding, ("vocab", "embed"), ("vocab", None))
            lookup = as_typed(
                lambda table, tokens: jnp.take(table, tokens, axis=0),
                ((None, None), ("batch", None)),
                ("batch", None, None),
            )
            x = lookup(table, tokens).astype(dtype)
            x = constrain(x, "batch", "sequence", None)
        x, _ = layers(config, self.decode, name="layers")(x, segment_ids)
        if last_only:
            x = x[:, -1:]
        x = RMSNorm(config.norm_epsilon, config.dtype, config.param_dtype, name="final_norm")(x)
        if not head:
            return x
        logits = nn.Dense(
            config.vocab_size,
            use_bias=False,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=partitioned(fan_in_uniform(), "embed", "vocab"),
            dot_general=dense_product,
            name="lm_head",
        )(x)
        return logits.astype(dtype)
