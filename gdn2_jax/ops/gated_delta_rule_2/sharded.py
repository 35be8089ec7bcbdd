"""The operator on a mesh: rows, heads and, exactly, spans of the sequence on different devices.

A span's map from the state before it to the state after it, and to its outputs, is affine:

    S_after = M S_before + L        o_t = scale P_t^T S_before + o_t(S_before = 0)

with M [K, K] and the reads P_t^T q_t [K]. Both come out of the operator itself, run on the span with
K more value channels whose values are zero and whose initial state is the identity. So one call
gives M, L, reads and outputs; then each device gathers all M and L, a few [K, K + V] a head, and
carries the state through the spans before its own. The gradient is that of these steps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gdn2_jax.fields import require
from gdn2_jax.ops.arguments import Implementation, segment_starts
from gdn2_jax.ops.gated_delta_rule_2.api import (
    fold_state,
    gated_delta_rule_2,
    gated_delta_rule_2_step,
    unfold_state,
)
from gdn2_jax.ops.gated_delta_rule_2.decode_step import rounded
from gdn2_jax.ops.gated_delta_rule_2.documents import document_of
from gdn2_jax.ops.isolation import replace
from gdn2_jax.ops.precision import HIGHEST, arithmetic_for
from gdn2_jax.parallel.halo import AXIS, previous_tokens
from gdn2_jax.parallel.logical import (
    ambient_mesh,
    as_typed,
    axis_size,
    explicit_sharding,
    per_device,
)


def gated_delta_rule_2_on_mesh(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    g: Float[Array, "B T Hk #K"],
    b: Float[Array, "B T Hk #K"],
    w: Float[Array, "B T Hv #V"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B Hv K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
    """`gated_delta_rule_2` on the ambient mesh; that function itself without one.

    Rows lie over "data" and "fsdp", key heads with their value heads over "tensor", spans of T
    over "sequence", where T need not divide. No device holds more of a sequence than its span. On a
    mesh of Explicit axes, rows and heads stay split as the arguments' types say. The arguments are
    those of `gated_delta_rule_2` for the whole sequence.

    Returns:
      Outputs, and the state after the last token of the whole sequence.

    Raises:
      ValueError: in addition, the mesh does not divide the rows or the key heads.
      NotImplementedError: the implementation asked for cannot serve these inputs.
    """
    options = {"scale": scale, "implementation": implementation}
    arguments = (q, k, v, g, b, w, initial_state, segment_ids)
    if ambient_mesh() is None and explicit_sharding(arguments) is None:
        return gated_delta_rule_2(
            q, k, v, g, b, w, initial_state=initial_state, segment_ids=segment_ids, **options
        )
    for name, size, shards in (
        ("B", q.shape[0], axis_size("data") * axis_size("fsdp")),
        ("Hk", q.shape[2], axis_size("tensor")),
    ):
        require("q", size % shards == 0, f"{name} to be a multiple of the mesh's {shards}", size)
    length, spans = q.shape[1], axis_size(AXIS)
    arrays, padding = [q, k, v, g, b, w], -q.shape[1] % spans
    if padding:
        # Padded tokens are exact no-ops: they write nothing and do not decay the state.
        arrays = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in arrays]
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge")
    if initial_state is None:
        shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
        initial_state = jnp.zeros(shape, g.dtype)

    rows = ("batch", "sequence" if spans > 1 else None)
    tokens, state = (*rows, "heads", None), ("batch", "heads", None, None)
    run = per_device(
        functools.partial(_whole if spans == 1 else _span, **options),
        ((tokens,) * 6, state, rows),
        (tokens, state),
    )
    outputs, final_state = run(tuple(arrays), initial_state, segment_ids)
    return outputs[:, :length], final_state


def gated_delta_rule_2_from_state(
    state: Float[Array, "B Hv K V"],
    arrays: tuple[Array, ...],
    segment_ids: Int[Array, "B T"] | None,
    implementation: Implementation | None,
    rounding_seeds: UInt32[Array, "B Hv"] | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
    """The operator on T tokens after `state`: the step for one token, else the whole form.

    A bfloat16 state is rounded after all T tokens, see `gated_delta_rule_2_step`. On a mesh of
    Explicit axes, rows and heads stay split as the types of q, k, v, g, b, w say.
    """

    def advance(state, arrays, segment_ids, seeds):
        options: dict[str, Any] = {"implementation": implementation}
        if arrays[0].shape[1] > 1:
            wide = state.astype(arrays[3].dtype)
            o, new_state = _whole(arrays, wide, segment_ids, **options)
            return o, rounded(new_state, state.dtype, seeds)
        token = (x[:, 0] for x in arrays)
        state, o = gated_delta_rule_2_step(state, *token, rounding_seeds=seeds, **options)
        return o[:, None], state

    tokens, heads = ("batch", None, "heads"), ("batch", "heads")
    advance = as_typed(advance, (heads, (tokens,) * 6, ("batch",), heads), (tokens, heads))
    return advance(state, arrays, segment_ids, rounding_seeds)


def _whole(arrays, initial_state, segment_ids, **options):
    return gated_delta_rule_2(
        *arrays, initial_state=initial_state, segment_ids=segment_ids, **options
    )


def _span(arrays, initial_state, segment_ids, **options):
    """Outputs of this device's span and the state after the whole sequence."""
    q, k, v, g, b, w = arrays
    batch, length, key_heads, key_dim = q.shape
    identity = jnp.broadcast_to(
        jnp.eye(key_dim, dtype=g.dtype), (batch, key_heads, key_dim, key_dim)
    )
    carried = None
    if segment_ids is not None:
        before = previous_tokens(segment_ids, 1)[:, 0]
        carries = (segment_ids[:, 0] == before) | (jax.lax.axis_index(AXIS) == 0)
        carried = carries[:, None] & (document_of(segment_starts(segment_ids)) == 0)
        identity = jnp.where(carries[:, None, None, None], identity, 0)
    initial_state = fold_state(initial_state, key_heads)
    nothing = jnp.zeros_like(q, dtype=v.dtype)
    if w.shape[-1] > 1 or v.shape[2] > key_heads:
        w = jnp.broadcast_to(w, v.shape).reshape(batch, length, key_heads, -1)
        w = jnp.concatenate([nothing.astype(w.dtype), w], axis=-1)
    outputs, state = gated_delta_rule_2(
        q,
        k,
        jnp.concatenate([nothing, v.reshape(batch, length, key_heads, -1)], axis=-1),
        g,
        b,
        w,
        initial_state=jnp.concatenate([identity, jnp.zeros_like(initial_state)], axis=-1),
        segment_ids=segment_ids,
        **options,
    )
    reads, outputs = jnp.split(outputs, [key_dim], axis=-1)
    transition, contribution = jnp.split(state, [key_dim], axis=-1)
    if carried is not None:
        # These are zeros already, except in documents with NaN, which must not reach the document
        # before.
        reads = replace(~carried, 0, reads)
        transition = replace(~carried[:, -1], 0, transition)
    incoming, final_state = _carry_over(transition, contribution, initial_state)
    product = arithmetic_for((q, k, v, b, w), g.dtype).product
    from_before = product("tk,kv->tv", jnp.moveaxis(reads.astype(g.dtype), 1, 2), incoming)
    from_before = jnp.moveaxis(from_before, 1, 2)
    if carried is not None:
        from_before = replace(~carried, 0, from_before)
    outputs = (outputs.astype(g.dtype) + from_before).astype(v.dtype)
    return outputs.reshape(v.shape), unfold_state(final_state, v.shape[2])


def _carry_over(
    transition: Float[Array, "B H K K"],
    contribution: Float[Array, "B H K V"],
    initial_state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H K V"]]:
    """The state before this device's span, and after the last span (the same on all devices)."""
    spans = jax.lax.all_gather((transition, contribution), AXIS)

    def advance(state, span):
        transition, contribution = span
        product = jnp.matmul(transition, state, precision=HIGHEST)
        # A span that forgets the state forgets a NaN in it, too.
        forgets = jnp.all(transition == 0, axis=(-2, -1))
        product = replace(forgets, 0, product)
        return product + contribution, state

    initial_state = jax.lax.pcast(initial_state, AXIS, to="varying")
    final_state, before = jax.lax.scan(advance, initial_state, spans)
    index = jax.lax.axis_index(AXIS)
    last = index == jax.lax.axis_size(AXIS) - 1
    incoming = jax.lax.dynamic_index_in_dim(before, index, keepdims=False)
    return incoming, jax.lax.psum(jnp.where(last, final_state, 0), AXIS)
