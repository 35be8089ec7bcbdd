"""The short convolution by kernels for a Hopper GPU, where they serve."""

import functools
from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.batching import joining_the_batch
from gdn2_jax.ops.choice import fastest
from gdn2_jax.pallas.short_convolution import TAPS, TOKENS, WIDTH, convolve, convolve_backward
from gdn2_jax.parallel.logical import ambient_mesh

_GRID = 65535  # blocks along the shorter axes of a CUDA grid


def short_convolution_kernels_or(
    default: Callable[..., Array],
    unit_dim: int | None,
    x: Float[Array, "B T D"],
    kernel: Float[Array, "S D"],
    bias: Float[Array, "D"] | None,
    segment_ids: Int[Array, "B T"] | None,
    before: Float[Array, "B P D"] | None,
) -> Float[Array, "B T D"]:
    """Runs the kernels where they serve, else default(x, kernel, bias, segment_ids, before).

    Both are a causal depthwise convolution, SiLU, and division of every `unit_dim` channels by their
    length. `before` are the P = S - 1 inputs before the first; zeros if None.
    """
    if not _serve(unit_dim, x, kernel, bias, segment_ids):
        return default(x, kernel, bias, segment_ids, before)

    def kernels(x, kernel, bias, segment_ids, before):
        y = short_convolution_by_kernels(unit_dim, x, kernel)
        if before is None:
            return y
        # The kernels take zeros for what was before. The first outputs alone see it.
        past = before.shape[1]
        return y.at[:, :past].set(default(x[:, :past], kernel, bias, segment_ids, before))

    return fastest({"pallas": kernels, "xla": default}, x, kernel, bias, segment_ids, before)


def short_convolution_by_kernels(
    unit_dim: int | None, x: Float[Array, "B T D"], kernel: Float[Array, "4 D"]
) -> Float[Array, "B T D"]:
    """The same by kernels alone."""
    # A kernel for each row, so that all arrays begin with the batch.
    kernels = jnp.broadcast_to(kernel.astype(jnp.float32), (x.shape[0], *kernel.shape))
    return _by_kernels(unit_dim, x, kernels)


def _serve(unit_dim, x, kernel, bias, segment_ids) -> bool:
    if any(map(jax.export.is_symbolic_dim, x.shape)) or bias is not None or segment_ids is not None:
        return False
    batch, length, channels = x.shape
    return (
        x.dtype == jnp.bfloat16
        and kernel.dtype != jnp.float64
        and kernel.shape[0] == TAPS
        and unit_dim in (None, WIDTH)
        and channels % WIDTH == 0
        and length % TOKENS == 0
        and max(batch, length // TOKENS) <= _GRID
        # On several devices the compiler would give each the whole arrays; inside shard_map the types of
        # the kernels' loops would have to vary over the mesh.
        and ambient_mesh() is None
        and not jax.typeof(x).manual_axis_type.varying
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernels(unit_dim, x, kernels):
    run = joining_the_batch(lambda *arrays: (convolve(*arrays, unit=unit_dim is not None),))
    return run(x, kernels)[0]


def _forward(unit_dim, x, kernels):
    return _by_kernels(unit_dim, x, kernels), (x, kernels)


def _backward(unit_dim, residuals, dy):
    run = joining_the_batch(lambda *arrays: convolve_backward(*arrays, unit=unit_dim is not None))
    return run(*residuals, dy)


_by_kernels.defvjp(_forward, _backward)
