"""What the backward of a block keeps from its forward, and what it recomputes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Results of these are always worth keeping: GPU kernels of the operators, and cuDNN's attention.
_KERNELS = ("custom_vmap_call", "hopper_kernel", "dot_product_attention_fwd_wrapper")


def policy(remat: str) -> Callable[..., bool]:
    """Returns the `jax.checkpoint` policy of `ModelConfig.remat`, but for "none"."""
    # Layers name what kernels and matrix products take, and blocks what mixers give.
    # Statistics of norms are one number a token.
    names = ("mixer_output", "statistic", *(["operand"] if remat == "intermediates" else []))
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def keep(primitive: Any, *avals: Any, **params: Any) -> bool:
        if remat == "full":
            return False
        if named(primitive, *avals, **params) or primitive.name in _KERNELS:
            return True
        if remat == "mixer":
            return False
        return _projects(primitive, *avals) or _casts_a_kernel(primitive, *avals, **params)

    return keep


def _projects(primitive: Any, *avals: Any) -> bool:
    """Of activations [B, T, D] by a matrix; the operators' own products have other shapes."""
    return primitive is jax.lax.dot_general_p and [x.ndim for x in avals] == [3, 2]


def _casts_a_kernel(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Of matrices: activations have an axis more."""
    return (
        primitive is jax.lax.convert_element_type_p
        and avals[0].ndim == 2
        and jnp.issubdtype(params["new_dtype"], jnp.floating)
    )
