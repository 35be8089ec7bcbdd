"""How kernels, whose arrays begin with a batch axis, are mapped over."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def joining_the_batch(run: Callable[..., tuple]) -> Callable[..., tuple]:
    """`run` with a rule for `jax.vmap`: a mapped axis joins the batch.

    Args:
      run: arrays [B, ...], or None in their place -> arrays [B, ...].
    """

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        return run(*arrays)

    @call.def_vmap
    def _(axis_size, mapped, *arrays):
        def join(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = call(*jax.tree.map(join, arrays, tuple(mapped)))
        split = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in results)
        return split, (True,) * len(split)

    return call
