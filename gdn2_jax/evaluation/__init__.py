"""Evaluation of trained language models."""

from gdn2_jax.evaluation.perplexity import Perplexity, evaluate_perplexity, lower_evaluation
from gdn2_jax.evaluation.sample import continue_rows, sample_text
from gdn2_jax.evaluation.scoring import (
    LocalModel,
    TokenLosses,
    continue_prompts,
    on_local_devices,
    score_tokens,
)
from gdn2_jax.evaluation.texts import TextPerplexity, text_perplexity

__all__ = [
    "LocalModel",
    "Perplexity",
    "TextPerplexity",
    "TokenLosses",
    "continue_prompts",
    "continue_rows",
    "evaluate_perplexity",
    "lower_evaluation",
    "on_local_devices",
    "sample_text",
    "score_tokens",
    "text_perplexity",
]
