"""Where the Hopper kernels run by default."""

from collections.abc import Callable

import jax
from jax.typing import ArrayLike


def hopper_attached() -> bool:
    """Whether a local GPU has compute capability 9.0."""
    return any(
        getattr(device, "compute_capability", None) == "9.0" for device in jax.local_devices()
    )


def on_hopper(kernel_fn: Callable, default_fn: Callable, *arrays: ArrayLike | None):
    """Calls `kernel_fn` where the computation lands on a Hopper GPU, else `default_fn`.

    Both take the arrays (or None) and return the same types. The choice falls per platform when
    the computation is lowered; without a local Hopper GPU it is always `default_fn`.
    """
    if not hopper_attached():
        return default_fn(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=kernel_fn, default=default_fn)
