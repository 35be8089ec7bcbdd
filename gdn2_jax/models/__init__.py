"""Language models: configuration, presets, the model and generation from it."""

from gdn2_jax.models.config import ModelConfig, config_from_json, with_state_rounding
from gdn2_jax.models.generate import GenerationOptions, continue_session, generate
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
from gdn2_jax.models.session import (
    Session,
    extend_session,
    load_session,
    put_rows,
    replace_row,
    save_session,
    sessions_along,
    start_session,
    take_rows,
)
from gdn2_jax.models.sizes import Sizes, model_sizes, with_parameters_of

__all__ = [
    "MIXERS",
    "PRESETS",
    "SCALES",
    "Batch",
    "DeltaRule",
    "GenerationOptions",
    "LanguageModel",
    "Mixer",
    "ModelConfig",
    "Session",
    "Sizes",
    "SoftmaxAttention",
    "StateSpace",
    "config_from_json",
    "continue_session",
    "extend_session",
    "generate",
    "load_session",
    "matched_preset",
    "model_sizes",
    "named_mixer",
    "next_token_loss",
    "put_rows",
    "replace_row",
    "save_session",
    "sessions_along",
    "start_session",
    "take_rows",
    "with_parameters_of",
    "with_state_rounding",
]
