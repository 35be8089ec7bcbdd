"""The operators: Gated Delta Rule-2, and the state spaces of Mamba-2 and Mamba-3."""

from gdn2_jax.ops.arguments import Implementation
from gdn2_jax.ops.gated_delta_rule_2.api import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.ops.gated_delta_rule_2.decode_step import rounding_seeds
from gdn2_jax.ops.gated_delta_rule_2.sharded import (
    gated_delta_rule_2_from_state,
    gated_delta_rule_2_on_mesh,
)
from gdn2_jax.ops.gated_delta_rule_2.states import gated_delta_rule_2_states
from gdn2_jax.ops.mamba.mamba2 import mamba2, mamba2_step
from gdn2_jax.ops.mamba.mamba3 import (
    Mamba3Inputs,
    Mamba3State,
    Mamba3Weights,
    mamba3,
    mamba3_initial_state,
    mamba3_step,
)
from gdn2_jax.ops.mamba.sharded import (
    mamba2_from_state,
    mamba2_on_mesh,
    mamba3_from_state,
    mamba3_on_mesh,
)

__all__ = [
    "Implementation",
    "Mamba3Inputs",
    "Mamba3State",
    "Mamba3Weights",
    "gated_delta_rule_2",
    "gated_delta_rule_2_from_state",
    "gated_delta_rule_2_on_mesh",
    "gated_delta_rule_2_states",
    "gated_delta_rule_2_step",
    "mamba2",
    "mamba2_from_state",
    "mamba2_on_mesh",
    "mamba2_step",
    "mamba3",
    "mamba3_from_state",
    "mamba3_initial_state",
    "mamba3_on_mesh",
    "mamba3_step",
    "rounding_seeds",
]
