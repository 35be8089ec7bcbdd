"""The recurrence, token by token: the definition that every other form is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gdn2_jax.ops.gated_delta_rule_2.documents import document_of, state_of, with_state
from gdn2_jax.ops.precision import HIGHEST


def step(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    g: Float[Array, "B H #K"],
    b: Float[Array, "B H #K"],
    w: Float[Array, "B H #V"],
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """Advances the state by one token and reads it (paper eqs. 8-10).

    All arrays have one dtype (float32 or float64); `q` carries the output scale.

    Returns:
      The new state and the output `state^T q`.
    """
    decayed = jnp.exp(g)[..., None] * state
    read = jnp.einsum("bhkv,bhk->bhv", decayed, b * k, precision=HIGHEST)
    state = decayed + k[..., None] * (w * v - read)[..., None, :]
    return state, jnp.einsum("bhkv,bhk->bhv", state, q, precision=HIGHEST)


def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H #K"],
    b: Float[Array, "B T H #K"],
    w: Float[Array, "B T H #V"],
    initial_state: Float[Array, "B H K V"],
    starts: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs `step` over time with `lax.scan`; any form of differentiation works through it.

    All arrays have one dtype (float32 or float64); `q` carries the output scale. Where `starts`
    is true the state restarts from zero before the token is processed.

    Returns:
      The outputs and the state after the last token.
    """

    def body(state, token):
        *inputs, start = token
        if start is not None:
            state = jnp.where(start[:, None, None, None], 0, state)
        return step(state, *inputs)

    time_major = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, b, w, starts))
    final_state, outputs = jax.lax.scan(body, initial_state, time_major)
    return jnp.moveaxis(outputs, 0, 1), final_state


def recurrent_by_document(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H #K"],
    b: Float[Array, "B T H #K"],
    w: Float[Array, "B T H #V"],
    initial_states: Float[Array, "B N H K V"],
    starts: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B N H K V"]]:
    """`recurrent`, with the states before and after each of the N documents of a row."""

    def body(carry, token):
        state, states = carry
        *inputs, document, start = token
        start = start[:, None, None, None]
        state, output = step(jnp.where(start, state_of(initial_states, document), state), *inputs)
        return (state, with_state(states, document, state)), output

    tokens = (q, k, v, g, b, w, document_of(starts), starts.at[:, 0].set(True))
    time_major = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    carry = (jnp.zeros_like(initial_states[:, 0]), initial_states)
    (_, states), outputs = jax.lax.scan(body, carry, time_major)
    return jnp.moveaxis(outputs, 0, 1), states
