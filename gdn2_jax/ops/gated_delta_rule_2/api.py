"""The public operator: input checks, grouped value heads, choice of implementation."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Literal, get_args

import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.arguments import as_arrays, match_varying_axes, opaque
from gdn2_jax.ops.gated_delta_rule_2.chunkwise import chunkwise, chunkwise_by_document
from gdn2_jax.ops.gated_delta_rule_2.decode_step import (
    decode_kernel,
    decode_xla,
    why_not_decode_kernel,
)
from gdn2_jax.ops.gated_delta_rule_2.hopper import hopper, on_hopper, why_not_hopper
from gdn2_jax.ops.gated_delta_rule_2.recurrent import recurrent, recurrent_by_document

Implementation = Literal["pallas", "xla", "recurrent"]

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def gated_delta_rule_2(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    g: Float[Array, "B T Hk K"],
    b: Float[Array, "B T Hk K"],
    w: Float[Array, "B T Hv V"],
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

    Value head i reads key head i // (Hv / Hk). Both results are differentiable in every array
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
        beyond the N-th are NaN. Not served by "pallas".
      implementation: "pallas" (Hopper GPU kernels; K = 64 or 128, a multiple of 64 value channels a
        key head, bf16 or fp16 beside a fp32 g), "xla" (chunkwise, any backend), "recurrent" (the
        definition, token by token), or None for the kernels on a Hopper GPU
        where they serve, else "xla".

    Returns:
      Outputs of `v`'s shape and dtype, and the state after the last token (of each document, with
      `num_documents`) in float32 (float64 with float64 inputs).

    Raises:
      ValueError: an argument has a wrong shape or dtype, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve these inputs.
    """
    _check_implementation(implementation)
    q, k, v, g, b, w, initial_state, segment_ids = as_arrays(
        (q, k, v, g, b, w, initial_state, segment_ids)
    )
    _check_inputs(q, k, v, g, b, w, leading=("B", "T"))
    batch, length, key_heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    _check_num_documents(num_documents)
    documents = () if num_documents is None else (num_documents,)
    state_shape = (batch, *documents, value_heads, key_dim, value_dim)
    _check_state("initial_state", initial_state, state_shape, g.dtype)
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, (batch, length))
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids: expected an integer dtype, got {segment_ids.dtype}")
    scale = _resolve_scale(scale, key_dim)
    obstacle = why_not_hopper(q, k, v, g, b, w)
    if num_documents is not None:
        obstacle = "the kernels keep no states of documents (num_documents)"
    if implementation == "pallas" and obstacle:
        raise NotImplementedError(f'implementation="pallas": {obstacle}; use "xla"')
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
    starts = None if segment_ids is None else _segment_starts(segment_ids)
    definition, matrix_form = recurrent, chunkwise
    if num_documents is not None:
        definition, matrix_form = recurrent_by_document, chunkwise_by_document
        starts = jnp.zeros((batch, length), bool) if starts is None else starts
    if implementation == "recurrent":
        q, *rest = (x.astype(g.dtype) for x in arrays)
        outputs, final_state = definition(q * scale, *rest, starts)
    else:
        kernels, xla = (_in_dtype(form, scale, v.dtype) for form in (hopper, matrix_form))
        if implementation == "pallas":
            form = kernels
        elif implementation is not None or obstacle:
            form = xla
        else:
            form = functools.partial(on_hopper, kernels, xla)
        outputs, final_state = form(*arrays, starts)
    outputs, final_state = opaque((outputs, final_state))
    final_state = final_state.reshape(-1, *final_state.shape[-3:])
    final_state = unfold_state(final_state, value_heads).reshape(state_shape)
    return outputs.astype(v.dtype).reshape(v.shape), final_state


def gated_delta_rule_2_step(
    state: Float[Array, "B Hv K V"],
    q: Float[Array, "B Hk K"],
    k: Float[Array, "B Hk K"],
    v: Float[Array, "B Hv V"],
    g: Float[Array, "B Hk K"],
    b: Float[Array, "B Hk K"],
    w: Float[Array, "B Hv V"],
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B Hv K V"], Float[Array, "B Hv V"]]:
    """One token of `gated_delta_rule_2`, for decoding with constant memory.

    Args:
      state: state before the token; float32 (float64 when any other input is float64).
      q: query; dtypes of all inputs as in `gated_delta_rule_2`.
      k: key.
      v: value.
      g: log-decay, <= 0; -inf resets its channel of the state.
      b: erase gate.
      w: write gate.
      scale: factor on the output; 1 / sqrt(K) if None.
      implementation: as in `gated_delta_rule_2`; "xla" and "recurrent" are the same here. The
        kernel updates the state in place where the caller donates it to the compiled function.

    Returns:
      The state after the token and the output, of `v`'s shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape or dtype, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve these inputs.
    """
    _check_implementation(implementation)
    state, q, k, v, g, b, w = as_arrays((state, q, k, v, g, b, w))
    _check_inputs(q, k, v, g, b, w, leading=("B",))
    batch, _, key_dim = q.shape
    value_heads, value_dim = v.shape[1:]
    _check_state("state", state, (batch, value_heads, key_dim, value_dim), g.dtype)
    scale = _resolve_scale(scale, key_dim)
    obstacle = why_not_decode_kernel(q, k, v, g, b, w)
    if implementation == "pallas" and obstacle:
        raise NotImplementedError(f'implementation="pallas": {obstacle}; use "xla"')

    kernel, xla = (functools.partial(form, scale=scale) for form in (decode_kernel, decode_xla))
    if implementation == "pallas":
        form = kernel
    elif implementation is not None or obstacle:
        form = xla
    else:
        form = functools.partial(on_hopper, kernel, xla)
    return opaque(form(*match_varying_axes(opaque((state, q, k, v, g, b, w)))))


def _in_dtype(form: Callable, scale: float, dtype) -> Callable:
    """The form with its scale set and its outputs in `dtype`."""

    def run(*arrays):
        outputs, final_state = form(*arrays, scale)
        return outputs.astype(dtype), final_state

    return run


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


def _segment_starts(segment_ids: Int[Array, "B T"]) -> Array:
    """True where a token's segment differs from the one before; false for the first token."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))


def _check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation: expected one of {(None, *get_args(Implementation))}, "
            f"got {implementation!r}"
        )


def _check_num_documents(count: int | None) -> None:
    if count is not None and (not isinstance(count, numbers.Integral) or count < 1):
        raise ValueError(f"num_documents: expected a positive integer or None, got {count!r}")


def _check_shape(name: str, array: Array, expected: tuple[int, ...]) -> None:
    if tuple(array.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(array.shape)}")


def _check_inputs(q, k, v, g, b, w, leading: tuple[str, ...]) -> None:
    for name, array, dims in (("q", q, "Hk K"), ("v", v, "Hv V")):
        layout = " ".join((*leading, dims))
        if array.ndim != len(leading) + 2 or 0 in array.shape:
            raise ValueError(
                f"{name}: expected a non-empty array [{layout}], got shape {tuple(array.shape)}"
            )
    for name, array in (("k", k), ("g", g), ("b", b)):
        _check_shape(name, array, q.shape)
    _check_shape("w", w, v.shape)
    if v.shape[:-2] != q.shape[:-2]:
        raise ValueError(
            f"v: expected leading dimensions {tuple(q.shape[:-2])} ({', '.join(leading)}) as q's, "
            f"got {tuple(v.shape[:-2])}"
        )
    key_heads, value_heads = q.shape[-2], v.shape[-2]
    if value_heads % key_heads:
        raise ValueError(
            f"v: expected a number of heads that is a multiple of q's {key_heads}, "
            f"got {value_heads}"
        )
    named = {"q": q, "k": k, "v": v, "b": b, "w": w}
    for name, array in named.items():
        if array.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: expected bfloat16, float16, float32 or float64, got {array.dtype}"
            )
    double = any(array.dtype == jnp.float64 for array in named.values())
    allowed = ("float64",) if double else ("float32", "float64")
    if g.dtype.name not in allowed:
        raise ValueError(f"g: expected {' or '.join(allowed)} beside these inputs, got {g.dtype}")


def _check_state(name: str, state: Array | None, shape: tuple[int, ...], dtype) -> None:
    if state is None:
        return
    _check_shape(name, state, shape)
    if state.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype} as g's, got {state.dtype}")


def _resolve_scale(scale: float | None, key_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(key_dim)
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    return float(scale)
