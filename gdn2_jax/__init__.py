"""Gated DeltaNet-2 in JAX: the operator, the layers, a language model that trains and decodes."""

from gdn2_jax.layers import GatedDeltaNet2
from gdn2_jax.ops import gated_delta_rule_2, gated_delta_rule_2_step

__all__ = ["GatedDeltaNet2", "gated_delta_rule_2", "gated_delta_rule_2_step"]
