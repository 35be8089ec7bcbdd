"""Which form of an operator runs where the caller names none."""

from collections.abc import Callable

import jax
from jax.typing import ArrayLike


def compute_capabilities() -> list[float]:
    """The compute capabilities of the local NVIDIA GPUs."""
    found = (getattr(device, "compute_capability", None) for device in jax.local_devices())
    return [float(x) for x in found if isinstance(x, str) and x[:1].isdigit()]


def hopper_attached() -> bool:
    """Whether a local GPU is a Hopper GPU."""
    return 9.0 in compute_capabilities()


def fastest(forms: dict[str, Callable], *arrays: ArrayLike | None):
    """Calls the form "pallas" beside a Hopper GPU, else "triton", else "xla".

    All take the arrays (or None) and return the same types. Kernels that cannot serve are left out.
    Other platforms than CUDA get "xla".
    """
    beside_hopper = "pallas" in forms and hopper_attached()
    kernels = forms["pallas"] if beside_hopper else forms.get("triton")
    if kernels is None:
        return forms["xla"](*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=kernels, default=forms["xla"])
