"""The gated MLP of a block."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from gdn2_jax.layers.initializers import fan_in_uniform
from gdn2_jax.layers.parts import dense


class SwiGLU(nn.Module):
    """down(SiLU(gate x) * (up x)), without biases.

    Attributes:
      hidden_dim: width between the projections.
      dtype: dtype of the products; promoted from input and parameters if None.
      param_dtype: dtype of the kernels.
      kernel_init: initialiser of the gate and up kernels. Made by nn.with_logical_partitioning, its
        two names are those of the model's width and of the channels, in all kernels.
      down_kernel_init: initialiser of the down kernel (depth-scaled in the language model).
    """

    hidden_dim: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = fan_in_uniform()
    down_kernel_init: Initializer = fan_in_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Applies the MLP to the last axis."""
        hidden = self.hidden_dim
        gate = dense(self, "gate_proj", hidden, ("embed", "mlp"))(x)
        up = dense(self, "up_proj", hidden, ("embed", "mlp"))(x)
        init = self.down_kernel_init
        down = dense(self, "down_proj", x.shape[-1], ("mlp", "embed"), kernel_init=init)
        return down(checkpoint_name(jax.nn.silu(gate) * up, "operand"))
