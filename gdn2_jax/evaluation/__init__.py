"""Evaluation of trained language models."""

from gdn2_jax.evaluation.perplexity import Perplexity, evaluate_perplexity, lower_evaluation
from gdn2_jax.evaluation.sample import sample_text

__all__ = ["Perplexity", "evaluate_perplexity", "lower_evaluation", "sample_text"]
