"""Which form of the operator runs where the caller names none."""

from collections.abc import Callable

import jax
from jax.typing import ArrayLike

from gdn2_jax.ops.gated_delta_rule_2 import hopper


def fastest(forms: dict[str, Callable], *arrays: ArrayLike | None):
    """Calls the form "pallas" beside a Hopper GPU, else "triton", else "xla".

    All take the arrays (or None) and return the same types. Kernels that cannot serve are left out.
    Other platforms than CUDA get "xla".
    """
    beside_hopper = "pallas" in forms and hopper.hopper_attached()
    kernels = forms["pallas"] if beside_hopper else forms.get("triton")
    if kernels is None:
        return forms["xla"](*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=kernels, default=forms["xla"])
