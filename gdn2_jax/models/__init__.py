"""Language models: configuration, presets, the model and generation from it."""

from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.generate import generate
from gdn2_jax.models.language_model import LanguageModel
from gdn2_jax.models.loss import next_token_loss
from gdn2_jax.models.presets import PRESETS, matched_preset
from gdn2_jax.models.sizes import Sizes, model_sizes

__all__ = [
    "PRESETS",
    "LanguageModel",
    "ModelConfig",
    "Sizes",
    "generate",
    "matched_preset",
    "model_sizes",
    "next_token_loss",
]
