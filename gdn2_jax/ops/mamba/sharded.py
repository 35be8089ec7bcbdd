"""Mamba's operators on a mesh: rows and heads on different devices, and the steps of decoding."""

from jaxtyping import Array, Float, Int

from gdn2_jax.ops.arguments import Implementation
from gdn2_jax.ops.mamba.mamba2 import mamba2, mamba2_step
from gdn2_jax.ops.mamba.mamba3 import (
    Mamba3Inputs,
    Mamba3State,
    Mamba3Weights,
    mamba3,
    mamba3_step,
)
from gdn2_jax.parallel.logical import as_typed, per_device

_HEADS = ("batch", None, "heads")
_STATE = ("batch", "heads")


def _groups(array: Array) -> tuple[str | None, ...]:
    """Names of the axes of keys or queries: one group is read by all heads."""
    lead = (None,) * (array.ndim - 3)
    return "batch", *lead, None if array.shape[-2] == 1 else "heads"


def mamba2_on_mesh(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H"],
    dt: Float[Array, "B T H"],
    segment_ids: Int[Array, "B T"] | None,
    implementation: Implementation | None,
) -> Float[Array, "B T H V"]:
    """Outputs of `mamba2`: rows lie over "data" and "fsdp", heads over "tensor"."""

    def run(*arrays):
        *tokens, segment_ids = arrays
        return mamba2(*tokens, segment_ids=segment_ids, implementation=implementation)[0]

    groups = _groups(q)
    run = per_device(run, (groups, groups, _HEADS, _HEADS, _HEADS, ("batch",)), _HEADS)
    return run(q, k, v, g, dt, segment_ids)


def mamba2_from_state(
    state: Float[Array, "B H K V"],
    tokens: tuple[Array, ...],
    segment_ids: Int[Array, "B T"] | None,
    implementation: Implementation | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`mamba2` on T tokens (q, k, v, g, dt) after `state`: the step for one token.

    On a mesh of Explicit axes, rows and heads stay split as the types of the tokens say.
    """

    def advance(state, tokens, segment_ids):
        if tokens[0].shape[1] == 1:
            state, o = mamba2_step(state, *(x[:, 0] for x in tokens))
            return o[:, None], state
        return mamba2(
            *tokens, initial_state=state, segment_ids=segment_ids, implementation=implementation
        )

    axes = (*[_groups(tokens[0])] * 2, *[_HEADS] * 3)
    return as_typed(advance, (_STATE, axes, ("batch",)), (_HEADS, _STATE))(
        state, tokens, segment_ids
    )


def mamba3_on_mesh(
    inputs: Mamba3Inputs,
    weights: Mamba3Weights,
    segment_ids: Int[Array, "B T"] | None,
    implementation: Implementation | None,
) -> Float[Array, "B T H V"]:
    """Outputs of `mamba3`: rows lie over "data" and "fsdp", heads over "tensor"."""

    def run(inputs, weights, segment_ids):
        return mamba3(inputs, weights, segment_ids=segment_ids, implementation=implementation)[0]

    axes = (_mamba3_axes(inputs), ("heads",), ("batch",))
    return per_device(run, axes, _HEADS)(inputs, weights, segment_ids)


def mamba3_from_state(
    state: Mamba3State,
    inputs: Mamba3Inputs,
    weights: Mamba3Weights,
    segment_ids: Int[Array, "B T"] | None,
    implementation: Implementation | None,
) -> tuple[Float[Array, "B T H V"], Mamba3State]:
    """`mamba3` on T tokens after `state`, as `mamba2_from_state`."""

    def advance(state, inputs, weights, segment_ids):
        if inputs.v.shape[1] == 1:
            state, o = mamba3_step(state, Mamba3Inputs(*(x[:, 0] for x in inputs)), weights)
            return o[:, None], state
        options = {"segment_ids": segment_ids, "implementation": implementation}
        return mamba3(inputs, weights, initial_state=state, **options)

    axes = (_STATE, _mamba3_axes(inputs), ("heads",), ("batch",))
    return as_typed(advance, axes, (_HEADS, _STATE))(state, inputs, weights, segment_ids)


def _mamba3_axes(inputs: Mamba3Inputs) -> Mamba3Inputs:
    groups = _groups(inputs.q)
    return Mamba3Inputs._make((groups, groups, *[_HEADS] * 5, ("batch",)))
