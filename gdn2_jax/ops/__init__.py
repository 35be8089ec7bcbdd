"""The Gated Delta Rule-2 operator: public functions, the recurrence, the chunkwise form."""

from gdn2_jax.ops.gated_delta_rule import (
    Implementation,
    gated_delta_rule_2,
    gated_delta_rule_2_step,
)

__all__ = ["Implementation", "gated_delta_rule_2", "gated_delta_rule_2_step"]
