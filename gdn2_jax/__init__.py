"""Gated DeltaNet-2 in JAX: the operator, the layers, a language model that trains and decodes."""

from gdn2_jax.layers import GatedDeltaNet2
from gdn2_jax.ops.gated_delta_rule_2.api import gated_delta_rule_2, gated_delta_rule_2_step

__version__ = "0.2.0"

__all__ = ["GatedDeltaNet2", "__version__", "gated_delta_rule_2", "gated_delta_rule_2_step"]
