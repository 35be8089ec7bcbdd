"""Which form of the operator runs where the caller names none."""

from collections.abc import Callable

import jax
from jax.typing import ArrayLike

from gdn2_jax.ops.gated_delta_rule_2 import hopper


def fastest(
    pallas_fn: Callable | None,
    triton_fn: Callable | None,
    default_fn: Callable,
    *arrays: ArrayLike | None,
):
    """Calls the Hopper kernels beside a Hopper GPU, else the Triton kernels, else `default_fn`.

    All take the arrays (or None) and return the same types. Kernels that cannot serve here are None.
    What is lowered for another platform than CUDA has `default_fn`.
    """
    kernels = pallas_fn if pallas_fn and hopper.hopper_attached() else triton_fn
    if kernels is None:
        return default_fn(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=kernels, default=default_fn)
