"""The states along a sequence, as caches of prefixes need them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.arguments import Implementation
from gdn2_jax.ops.gated_delta_rule_2.api import gated_delta_rule_2


def gated_delta_rule_2_states(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    g: Float[Array, "B T Hk #K"],
    b: Float[Array, "B T Hk #K"],
    w: Float[Array, "B T Hv #V"],
    *,
    every: int,
    scale: float | None = None,
    initial_state: Float[Array, "B Hv K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B N Hv K V"]]:
    """`gated_delta_rule_2` with the states after each `every` tokens, which divide T.

    A loop over spans of `every` tokens, as fast as the operator where these fill the device.
    The state after each packed document is what `gated_delta_rule_2(num_documents=...)` returns.

    Returns:
      Outputs, and the N = T / every states after tokens `every`, 2 `every`, ..., T. The last one is
      the final state. Both are differentiable in every array.

    Raises:
      ValueError: as there, or `every` does not divide T.
      NotImplementedError: as there.
    """
    batch, length, _, key_dim = jnp.shape(q)
    if every < 1 or length % every:
        raise ValueError(f"every: expected a divisor of the length {length}, got {every}")
    if initial_state is None:
        shape = (batch, jnp.shape(v)[2], key_dim, jnp.shape(v)[3])
        initial_state = jnp.zeros(shape, jnp.result_type(g))

    def split(x):
        x = jnp.asarray(x)
        return jnp.moveaxis(x.reshape(batch, -1, every, *x.shape[2:]), 1, 0)

    restarts = None
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, every - 1 : -1 : every]], 1)
        restarts = (segment_ids[:, ::every] != before).T
        segment_ids = split(segment_ids)

    def advance(state, span):
        arrays, segment_ids, restarts = span
        if restarts is not None:
            state = jnp.where(restarts[:, None, None, None], 0, state)
        o, state = gated_delta_rule_2(
            *arrays,
            scale=scale,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=implementation,
        )
        return state, (o, state)

    spans = (tuple(map(split, (q, k, v, g, b, w))), segment_ids, restarts)
    _, (outputs, states) = jax.lax.scan(advance, jnp.asarray(initial_state), spans)
    outputs = jnp.moveaxis(outputs, 0, 1).reshape(batch, length, *outputs.shape[3:])
    return outputs, jnp.moveaxis(states, 0, 1)
