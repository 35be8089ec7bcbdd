"""The public operator: input checks, grouped value heads, choice of implementation."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from gdn2_jax.ops.arguments import (
    Implementation,
    as_arrays,
    check_dtypes,
    check_heads,
    check_implementation,
    check_segment_ids,
    check_shape,
    match_varying_axes,
    opaque,
    segment_starts,
)
from gdn2_jax.ops.choice import fastest, hopper_attached
from gdn2_jax.ops.gated_delta_rule_2.chunkwise import chunkwise, chunkwise_by_document
from gdn2_jax.ops.gated_delta_rule_2.decode_step import (
    decode_kernel,
    decode_xla,
    why_not_decode_kernel,
)
from gdn2_jax.ops.gated_delta_rule_2.hopper import hopper, why_not_hopper
from gdn2_jax.ops.gated_delta_rule_2.recurrent import recurrent, recurrent_by_document
from gdn2_jax.ops.gated_delta_rule_2.triton_kernels.form import (
    decode_triton,
    slower_than_xla,
    triton,
    why_not_triton,
)
from gdn2_jax.ops.portable import for_one_platform


def gated_delta_rule_2(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    g: Float[Array, "B T Hk #K"],
    b: Float[Array, "B T Hk #K"],
    w: Float[Array, "B T Hv #V"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B *N Hv K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    num_documents: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B *N Hv K V"]]:
    """Gated Delta Rule-2 over a sequence (arXiv 2605.22791, eqs. 8-10 and 18-25).

    For every head, with the state S of shape [K, V]:

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T
        o_t = scale * S_t^T q_t

    Value head i reads key head i // (Hv / Hk). A gate g, b or w may have one channel, which counts for
    all channels of its head; its gradient has one, too. Both results are differentiable in every array
    input; each cotangent has its input's dtype. Reverse mode only, except through
    `implementation="recurrent"`; numerical checks of gradients need to know:

        jax.test_util.check_grads(fn, args, order=1, modes=("rev",))
        chex.assert_numerical_grads(fn, args, order=1, modes=("rev",))

    Args:
      q: queries; bf16, fp16, fp32 or fp64, as `k`, `v`, `b` and `w` (mixtures allowed). Matrix
        products read them in bf16 if all are bf16 or fp16. Where all are fp16, "xla" reads them in
        fp32 at the backend's default precision (TF32 on a GPU): as exact, and in no danger of
        overflow.
      k: keys, normally of unit length.
      v: values.
      g: log-decay, <= 0, of any size; -inf resets its channel of the state, and has gradient 0.
        fp32 (fp64 when any other input is fp64).
      b: erase gate, in [0, 1], or [0, 2] with negative eigenvalues.
      w: write gate, in [0, 1].
      scale: factor on the output; 1 / sqrt(K) if None.
      initial_state: state before the first token, dtype as `g`; zeros if None.
      segment_ids: document of each token; the state restarts from zero at every change.
        `initial_state` feeds the first segment of a row.
      num_documents: N, the most documents that a row holds. If given, states are those of documents,
        [B, N, Hv, K, V], in the order of their first tokens: `initial_state` before them and the
        result after them. A document that a row does not hold keeps its state; outputs of documents
        beyond the N-th are NaN. Not served by "pallas" and "triton".
      implementation: "pallas" (Hopper GPU kernels; K = 64 or 128, a multiple of 64 value channels a
        key head, bf16 or fp16 beside a fp32 g), "triton" (kernels for NVIDIA GPUs of compute
        capability 8.0 or more, if jax-triton is installed; K up to 256, any dtypes but fp64; no
        `jax.export`), "xla" (chunkwise, any backend), "recurrent" (the definition, token by token),
        or None for "pallas" on a Hopper GPU where it serves, else "triton" where that serves and is
        faster than "xla" (not in fp32 with K > 128), and the program is not exported, else "xla".

    Returns:
      Outputs of `v`'s shape and dtype, and the state after the last token (of each document, with
      `num_documents`) in float32 (float64 with float64 inputs).

    Raises:
      ValueError: an argument has a wrong shape or dtype, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve these inputs.
    """
    check_implementation(implementation)
    q, k, v, g, b, w, initial_state, segment_ids = as_arrays(
        (q, k, v, g, b, w, initial_state, segment_ids)
    )
    count = num_documents
    if count is not None and (not isinstance(count, numbers.Integral) or count < 1):
        raise ValueError(f"num_documents: expected a positive integer or None, got {count!r}")
    documents = () if count is None else (count,)
    state_shape = _check_inputs(q, k, v, g, b, w, "initial_state", initial_state, "B T", documents)
    if v.shape[2] != q.shape[2]:
        w = jnp.broadcast_to(w, v.shape)  # a head of the forms holds several value heads
    batch, length, key_heads, key_dim = q.shape
    check_segment_ids(segment_ids, (batch, length))
    scale = _resolve_scale(scale, key_dim)
    obstacles: dict[str, str | None]
    if num_documents is None:
        obstacles = _obstacles(implementation, why_not_hopper, (q, k, v, g, b, w))
    else:
        no_states = "the kernels keep no states of documents (num_documents)"
        obstacles = {"pallas": no_states, "triton": no_states}
    _check_kernels(implementation, obstacles)
    if implementation != "recurrent" and jax.export.is_symbolic_dim(length):
        raise NotImplementedError(
            f'q: only implementation="recurrent" takes a symbolic length, got {q.shape}'
        )

    # The value channels of a group share everything on the key side, so a group of value heads is
    # one head with more value channels: grouping is a reshape, never a repeat.
    folded = (batch, length, key_heads, -1)
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, g.dtype)
    state = fold_state(initial_state.reshape(-1, *state_shape[-3:]), key_heads)
    state = state.reshape(batch, *documents, *state.shape[1:])
    arrays, segment_ids = match_varying_axes(
        (opaque((q, k, v.reshape(folded), g, b, w.reshape(folded), state)), segment_ids)
    )
    starts = None if segment_ids is None else segment_starts(segment_ids)
    forms: tuple[Callable, Callable] = recurrent, chunkwise
    if num_documents is not None:
        forms = recurrent_by_document, chunkwise_by_document
        starts = jnp.zeros((batch, length), bool) if starts is None else starts
    definition, matrix_form = forms[0], _of_channels(forms[1])
    if implementation == "recurrent":
        q, *rest = (x.astype(g.dtype) for x in arrays)
        outputs, final_state = definition(q * scale, *rest, starts)
    elif implementation == "pallas":
        first: Any = for_one_platform(arrays[0], implementation)
        outputs, final_state = hopper(first, *arrays[1:], starts, scale)
    elif implementation == "triton":
        outputs, final_state = _of_channels(triton)(*arrays, starts, scale)
    elif implementation == "xla":
        outputs, final_state = matrix_form(*arrays, starts, scale)
    else:
        by_triton = functools.partial(_of_channels(triton), portable=True)
        choice = {"pallas": hopper, "triton": by_triton, "xla": matrix_form}
        if slower_than_xla(q, k, v, g, b, w):
            del choice["triton"]
        outputs, final_state = fastest(_serving(choice, obstacles, scale), *arrays, starts)
    outputs, final_state = opaque((outputs, final_state))
    final_state = final_state.reshape(-1, *final_state.shape[-3:])
    final_state = unfold_state(final_state, v.shape[2]).reshape(state_shape)
    return outputs.astype(v.dtype).reshape(v.shape), final_state


def gated_delta_rule_2_step(
    state: Float[Array, "B Hv K V"],
    q: Float[Array, "B Hk K"],
    k: Float[Array, "B Hk K"],
    v: Float[Array, "B Hv V"],
    g: Float[Array, "B Hk #K"],
    b: Float[Array, "B Hk #K"],
    w: Float[Array, "B Hv #V"],
    *,
    scale: float | None = None,
    rounding_seeds: Integer[Array, "B Hv"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B Hv K V"], Float[Array, "B Hv V"]]:
    """One token of `gated_delta_rule_2`, for decoding with constant memory.

    Args:
      state: state before the token; float32 (float64 when any other input is float64), or bfloat16,
        which halves what a step reads and writes. The arithmetic is float32 then, too; the new state
        is rounded, after the output was read from it. "triton" does not serve it.
      q: query; dtypes of all inputs, and gates with one channel, as in `gated_delta_rule_2`.
      k: key.
      v: value.
      g: log-decay, <= 0; -inf resets its channel of the state.
      b: erase gate.
      w: write gate.
      scale: factor on the output; 1 / sqrt(K) if None.
      rounding_seeds: with a bfloat16 state, rounds each head's new state stochastically, by random
        bits that its seed and the place in the state decide alone; so a seed serves for one token.
        Rounded to nearest if None.
      implementation: as in `gated_delta_rule_2`; "xla" and "recurrent" are the same here. "pallas"
        updates the state in place where the caller donates it to the compiled function; "triton" writes
        a new one.

    Returns:
      The state after the token and the output, of `v`'s shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape or dtype, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve these inputs.
    """
    check_implementation(implementation)
    state, q, k, v, g, b, w, seeds = as_arrays((state, q, k, v, g, b, w, rounding_seeds))
    shape = _check_inputs(q, k, v, g, b, w, "state", None, "B")
    check_shape("state", state, shape)
    dtypes = [g.dtype] if g.dtype == jnp.float64 else [g.dtype, jnp.bfloat16]
    if state.dtype not in dtypes:
        expected = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"state: expected {expected} beside these inputs, got {state.dtype}")
    if seeds is not None:
        check_shape("rounding_seeds", seeds, shape[:2])
        if not jnp.issubdtype(seeds.dtype, jnp.integer):
            raise ValueError(f"rounding_seeds: expected integers, got {seeds.dtype}")
        if state.dtype != jnp.bfloat16:
            raise ValueError(f"rounding_seeds: expected None beside a state in {state.dtype}")
        seeds = seeds.astype(jnp.uint32)
    scale = _resolve_scale(scale, q.shape[-1])
    obstacles = _obstacles(implementation, why_not_decode_kernel, (q, k, v, g, b, w))
    if state.dtype == jnp.bfloat16:
        obstacles["triton"] = "the Triton kernel keeps the state in float32, got bfloat16"
    _check_kernels(implementation, obstacles)

    g, b, w = _gates_of_channels(q, v, g, b, w)
    arrays = match_varying_axes(opaque((state, q, k, v, g, b, w, seeds)))
    if implementation == "pallas":
        state = for_one_platform(arrays[0], implementation)
        results: Any = decode_kernel(state, *arrays[1:], scale)
    elif implementation == "triton":
        results = decode_triton(*arrays[:-1], scale)
    elif implementation is not None:
        results = decode_xla(*arrays, scale)
    else:

        def by_triton(*arrays, scale):
            return decode_triton(*arrays[:-1], scale, True)

        choice = {"pallas": decode_kernel, "triton": by_triton, "xla": decode_xla}
        results = fastest(_serving(choice, obstacles, scale), *arrays)
    return opaque(results)


def fold_state(state: Array, key_heads: int) -> Array:
    """[B, Hv, K, V] -> [B, Hk, K, (Hv / Hk) * V]."""
    batch, _, key_dim, value_dim = state.shape
    grouped = state.reshape(batch, key_heads, -1, key_dim, value_dim)
    return jnp.moveaxis(grouped, 2, 3).reshape(batch, key_heads, key_dim, -1)


def unfold_state(state: Array, value_heads: int) -> Array:
    """The inverse of `fold_state`."""
    batch, key_heads, key_dim, _ = state.shape
    grouped = state.reshape(batch, key_heads, key_dim, value_heads // key_heads, -1)
    return jnp.moveaxis(grouped, 3, 2).reshape(batch, value_heads, key_dim, -1)


def _check_inputs(
    q, k, v, g, b, w, name: str, state: Array | None, leading: str, documents: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Returns the shape of the state, whose argument has that name."""
    check_heads(q, v, f"{leading} Hk K", f"{leading} Hv V")
    check_shape("k", k, q.shape)
    for gate, array, full in (("g", g, q.shape), ("b", b, q.shape), ("w", w, v.shape)):
        if tuple(array.shape) not in (full, (*full[:-1], 1)):
            raise ValueError(
                f"{gate}: expected shape {full}, or 1 in place of {full[-1]}, "
                f"got {tuple(array.shape)}"
            )
    shape = (q.shape[0], *documents, v.shape[-2], q.shape[-1], v.shape[-1])
    full = {"g": g}
    if state is not None:
        check_shape(name, state, shape)
        full[name] = state
    check_dtypes({"q": q, "k": k, "v": v, "b": b, "w": w}, full)
    return shape


def _of_channels(form: Callable) -> Callable:
    """The form of the operator, called with a number of each gate for each channel."""

    def run(q, k, v, g, b, w, *rest, **options):
        return form(q, k, v, *_gates_of_channels(q, v, g, b, w), *rest, **options)

    return run


def _gates_of_channels(q, v, g, b, w) -> tuple[Array, ...]:
    """The gates with a number for each channel."""
    return tuple(jnp.broadcast_to(x, like.shape) for x, like in ((g, q), (b, q), (w, v)))


def _obstacles(
    implementation: str | None, why_not_pallas: Callable, inputs: tuple
) -> dict[str, str | None]:
    """What keeps each kind of kernels that may be chosen from serving these inputs, or None.

    Asking about the Triton kernels imports triton: they are asked about last.
    """
    obstacles = {}
    if implementation in (None, "pallas"):
        obstacles["pallas"] = why_not_pallas(*inputs)
        if obstacles["pallas"] is None and hopper_attached():
            return obstacles
    if implementation in (None, "triton"):
        obstacles["triton"] = why_not_triton(*inputs)
    return obstacles


def _check_kernels(implementation: str | None, obstacles: dict[str, str | None]) -> None:
    """Raises NotImplementedError if the kernels asked for have an obstacle."""
    if obstacle := obstacles.get(implementation or ""):
        raise NotImplementedError(f'implementation="{implementation}": {obstacle}; use "xla"')


def _serving(
    forms: dict[str, Callable], obstacles: dict[str, str | None], scale: float
) -> dict[str, Callable]:
    """The forms without an obstacle, all with this scale."""
    return {
        name: functools.partial(form, scale=scale)
        for name, form in forms.items()
        if not obstacles.get(name)
    }


def _resolve_scale(scale: float | None, key_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(key_dim)
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    return float(scale)
