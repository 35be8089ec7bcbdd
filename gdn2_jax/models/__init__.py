"""Language models: configuration, presets, the model and generation from it."""

from gdn2_jax.models.config import ModelConfig, config_from_json
from gdn2_jax.models.generate import generate
from gdn2_jax.models.language_model import LanguageModel
from gdn2_jax.models.loss import Batch, next_token_loss
from gdn2_jax.models.mixers import (
    MIXERS,
    DeltaRule,
    Mixer,
    SoftmaxAttention,
    StateSpace,
    named_mixer,
)
from gdn2_jax.models.presets import PRESETS, SCALES, matched_preset
from gdn2_jax.models.sizes import Sizes, model_sizes

__all__ = [
    "MIXERS",
    "PRESETS",
    "SCALES",
    "Batch",
    "DeltaRule",
    "LanguageModel",
    "Mixer",
    "ModelConfig",
    "Sizes",
    "SoftmaxAttention",
    "StateSpace",
    "config_from_json",
    "generate",
    "matched_preset",
    "model_sizes",
    "named_mixer",
    "next_token_loss",
]
