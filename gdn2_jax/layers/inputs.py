"""Checks that every mixer makes at its boundary."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.fields import require
from gdn2_jax.parallel import explicit_sharding


def check_wide_dtypes(**dtypes: Any) -> None:
    """Raises ValueError where a dtype is float64 and JAX would silently make it float32."""
    for name, dtype in dtypes.items():
        if dtype is None or jax.config.jax_enable_x64:
            continue
        if jnp.dtype(dtype) == jnp.float64:
            raise ValueError(
                f"{name}: expected 64-bit mode (JAX_ENABLE_X64=1) or a narrower dtype, "
                f"got 'float64'"
            )


def check_attributes(module: Any, *sizes: str) -> None:
    """Raises ValueError where a mixer's size is below 1 or JAX does not have a dtype."""
    check_wide_dtypes(dtype=module.dtype, param_dtype=module.param_dtype)
    for name in sizes:
        value = getattr(module, name)
        require(name, value is None or value >= 1, "at least 1", value)


def check_choices(module: Any, choices: tuple[str, ...], *names: str) -> None:
    """Raises ValueError unless each of these attributes is one of the choices."""
    for name in names:
        value = getattr(module, name)
        if value not in choices:
            expected = " or ".join(f'"{choice}"' for choice in choices)
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_inputs(
    x: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"] | None,
    cache: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError unless `x` is a non-empty [B, T, D] and `segment_ids` and `cache` fit it."""
    if x.ndim != 3 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x: expected a non-empty floating-point array [B T D], "
            f"got shape {tuple(x.shape)} of {x.dtype}"
        )
    sharding = explicit_sharding(x)
    if sharding is not None and sharding.spec[1] is not None:
        raise ValueError(
            "x: expected T in one piece on a mesh of Explicit axes, got it split over "
            f"{sharding.spec[1]}; spans of T need a mesh of gdn2_jax.parallel.make_mesh"
        )
    for leaf in jax.tree.leaves(cache):
        if leaf.ndim and leaf.shape[0] != x.shape[0]:
            raise ValueError(
                f"cache: expected the batch of x, {x.shape[0]}, got a cache made for "
                f"{leaf.shape[0]}"
            )
    if segment_ids is None:
        return
    if tuple(segment_ids.shape) != tuple(x.shape[:2]):
        raise ValueError(
            f"segment_ids: expected shape {tuple(x.shape[:2])} (B, T) as x's, "
            f"got {tuple(segment_ids.shape)}"
        )
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids: expected an integer dtype, got {segment_ids.dtype}")
