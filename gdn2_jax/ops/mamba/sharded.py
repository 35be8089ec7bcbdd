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
from gdn2_jax.parallel.logical import per_device

_HEADS = ("batch", None, "heads")


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

    # One group is read by all heads.
    groups = ("batch", None, None if q.shape[2] == 1 else "heads")
    run = per_device(run, (groups, groups, _HEADS, _HEADS, _HEADS, ("batch",)), _HEADS)
    return run(q, k, v, g, dt, segment_ids)


def mamba2_from_state(
    state: Float[Array, "B H K V"],
    tokens: tuple[Array, ...],
    segment_ids: Int[Array, "B T"] | None,
    implementation: Implementation | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`mamba2` on T tokens (q, k, v, g, dt) after `state`: the step for one token."""
    if tokens[0].shape[1] == 1:
        state, o = mamba2_step(state, *(x[:, 0] for x in tokens))
        return o[:, None], state
    return mamba2(
        *tokens, initial_state=state, segment_ids=segment_ids, implementation=implementation
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

    groups = ("batch", None, None, None if inputs.q.shape[3] == 1 else "heads")
    axes = Mamba3Inputs(groups, groups, *[_HEADS] * 5, rotation=("batch",))
    return per_device(run, (axes, ("heads",), ("batch",)), _HEADS)(inputs, weights, segment_ids)


def mamba3_from_state(
    state: Mamba3State,
    inputs: Mamba3Inputs,
    weights: Mamba3Weights,
    segment_ids: Int[Array, "B T"] | None,
    implementation: Implementation | None,
) -> tuple[Float[Array, "B T H V"], Mamba3State]:
    """`mamba3` on T tokens after `state`: the step for one token."""
    if inputs.v.shape[1] == 1:
        state, o = mamba3_step(state, Mamba3Inputs(*(x[:, 0] for x in inputs)), weights)
        return o[:, None], state
    return mamba3(
        inputs, weights, initial_state=state, segment_ids=segment_ids, implementation=implementation
    )
