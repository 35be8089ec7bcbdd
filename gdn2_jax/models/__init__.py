"""Language models: configuration, presets, the model and generation from it."""

from gdn2_jax.models.config import SEQUENCE_PARALLEL_MIXERS, ModelConfig, tensor_axes
from gdn2_jax.models.generate import generate
from gdn2_jax.models.language_model import LanguageModel
from gdn2_jax.models.loss import next_token_loss
from gdn2_jax.models.presets import PRESETS, matched_preset
from gdn2_jax.models.sizes import Sizes, model_sizes

__all__ = [
    "PRESETS",
    "SEQUENCE_PARALLEL_MIXERS",
    "LanguageModel",
    "ModelConfig",
    "Sizes",
    "generate",
    "matched_preset",
    "model_sizes",
    "next_token_loss",
    "tensor_axes",
]
