"""The operator by Triton kernels: what they serve, and the custom_vjp around them.

The forward keeps the kernels' own intermediates for the backward, as `hopper` does.
"""

import functools
import importlib
import importlib.util
import inspect
import os
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gdn2_jax.ops.arguments import match_varying_axes
from gdn2_jax.ops.batching import joining_the_batch
from gdn2_jax.ops.gated_delta_rule_2.chunkwise import chunkwise
from gdn2_jax.ops.gated_delta_rule_2.decode_step import decode_xla
from gdn2_jax.ops.gated_delta_rule_2.triton_kernels.plans import (
    Plan,
    capability,
    case,
    plan,
    tile,
)
from gdn2_jax.ops.isolation import isolated
from gdn2_jax.ops.portable import unless_portable
from gdn2_jax.ops.precision import HIGHEST, arithmetic_for, finite_log_decay

_MAX_CHANNELS = 256
_CHUNK = {True: 64, False: 32}
"""Rows of a chunk, by whether operands are bf16: registers hold fewer in fp32."""
_LOW_LEVELS = 4
_DECODE_VALUES = 32
_CACHE_DIR = "TRITON_CACHE_DIR"


def why_not_triton(q, k, v, g, b, w) -> str | None:
    """What keeps the kernels from serving these inputs ([B, *T, heads, channels]), or None."""
    for name, array in {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w}.items():
        if array.dtype == jnp.float64:
            return f"the kernels take {name} in at most float32, got float64"
        if any(map(jax.export.is_symbolic_dim, array.shape)):
            return f"the kernels take no symbolic shapes, got {array.shape} for {name}"
    if q.shape[-1] > _MAX_CHANNELS:
        return f"the kernels take up to {_MAX_CHANNELS} channels in q, got {q.shape[-1]}"
    for module in ("triton", "jax_triton"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed (pip install gdn2-jax[triton])"
    if capability() is None:
        return (
            "the kernels need an NVIDIA GPU of compute capability 8.0 or more, and none is attached"
        )
    return import_error()


def slower_than_xla(q, k, v, g, b, w) -> bool:
    """Whether "xla" is faster: in fp32 with more than 128 key channels, where passes over states spill."""
    del g
    return not _is_half(q, k, v, b, w) and q.shape[-1] > 128


@functools.cache
def import_error() -> str | None:
    """Why what the kernels need cannot be imported, or None; imports it."""
    before = os.environ.get(_CACHE_DIR)
    try:
        importlib.import_module("triton")
        importlib.import_module("jax_triton")
    except Exception as error:  # noqa: BLE001 - versions that do not go together raise anything
        return f"jax_triton cannot be imported ({type(error).__name__}: {error})"
    finally:
        # jax_triton 0.3 empties it, 0.4 deletes it. It reads it nowhere: its compiler calls store nothing.
        # Other Triton programs of this process (torch.compile's, flash-linear-attention's) store theirs there.
        if before is None:
            os.environ.pop(_CACHE_DIR, None)
        else:
            os.environ[_CACHE_DIR] = before
    return None


def triton(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    w: Float[Array, "B T H V"],
    initial_state: Float[Array, "B H K V"],
    starts: Bool[Array, "B T"] | None,
    scale: float,
    portable: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Outputs (in v's dtype) and final state (fp32); arguments as in `chunkwise`.

    Where all inputs but g are bf16 or fp16, matrix products read bf16, or what would cancel in two bf16
    parts, and the inverse TF32. Else they read fp32, in three TF32 products. If `portable`, exported
    programs hold `chunkwise` instead; else exporting raises a NotImplementedError.
    """

    def run(tokens, state):
        results: Any = _triton(scale, portable, *tokens, state, segment)
        return results

    if starts is None:
        segment = jnp.zeros(q.shape[:2], jnp.int32)
    else:
        segment = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
        g = finite_log_decay(g)
    return isolated(run, (q, k, v, g, b, w), initial_state, starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def decode_triton(state, q, k, v, g, b, w, scale: float, portable: bool = False):
    """`decode_xla` by a Triton kernel, for inputs that `why_not_triton` lets pass.

    The new state is a new buffer: jax-triton's versions differ in what they pass for one that is reused.
    """
    kernel = functools.partial(_run_decode, scale)
    form = functools.partial(decode_xla, seeds=None, scale=scale)
    return _call(kernel, form if portable else None, state, q, k, v, g, b, w)


def _decode_forward(*arguments):
    return decode_triton(*arguments), arguments[:-2]


def _decode_backward(scale, _, arrays, cotangents):
    step = functools.partial(decode_xla, seeds=None, scale=scale)
    return jax.vjp(step, *arrays)[1](cotangents)


decode_triton.defvjp(_decode_forward, _decode_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _triton(scale, portable, *arguments):
    form = functools.partial(_chunkwise, scale) if portable else None
    return _call(functools.partial(_run_forward, scale, False), form, *arguments)


def _forward(scale, portable, *arguments):
    form = functools.partial(_chunkwise, scale) if portable else None
    kernels = functools.partial(_run_forward, scale, True)
    outputs, final_state, *saved = _call(kernels, form, *arguments)
    return (outputs, final_state), (arguments, saved)


def _backward(scale, portable, residuals, cotangents):
    arguments, saved = residuals
    form = functools.partial(_chunkwise_backward, scale) if portable else None
    kernels = functools.partial(_run_backward, scale)
    return *_call(kernels, form, *cotangents, *arguments, *saved), None


_triton.defvjp(_forward, _backward)


def _call(kernels, form, *arrays) -> Any:
    return joining_the_batch(unless_portable(kernels, form, "triton"))(*arrays)


def _chunkwise(scale, *arguments):
    q, k, v, g, b, w, state, segment = arguments
    starts = jnp.diff(segment, axis=1, prepend=0) > 0
    return chunkwise(q, k, v, g, b, w, state, starts, scale)


def _chunkwise_backward(scale, d_o, d_final_state, *rest):
    *arrays, segment = rest[:8]
    _, pullback = jax.vjp(lambda *x: _chunkwise(scale, *x, segment), *arrays)
    return pullback((d_o, d_final_state))


def _run_forward(scale, save, q, k, v, g, b, w, initial_state, segment):
    """Outputs and final state, and, if `save`, what the backward reads beside the inputs."""
    from gdn2_jax.ops.gated_delta_rule_2.triton_kernels import forward

    (batch, length, heads, key_dim), value_dim = q.shape, v.shape[-1]
    operand, constants = _arithmetic(q, k, v, b, w)
    chunk = constants["C"]
    chunks = -(-length // chunk)
    cut = functools.partial(_cut, q, v, operand)
    like = functools.partial(jax.ShapeDtypeStruct, dtype=operand)
    square = (batch, heads, chunks, chunk, chunk)
    y, u, k_tail, q_gamma, read, inverse, decay = _launch(
        forward.intra_chunk_forward,
        (q, k, v, g, b, w, segment, _sums(chunk), length, heads),
        (
            *(like(q.shape), _fp32(v.shape), like(q.shape), like(q.shape), like(square)),
            _fp32(square),
            _fp32((batch, heads, chunks, key_dim)),
        ),
        (batch * heads * chunks,),
        constants | cut("intra_chunk_forward").options(),
        SCALE=scale,
    )
    outputs, final_state, *saved = _launch(
        forward.state_pass_forward,
        (y, u, k_tail, q_gamma, read, decay, initial_state, length, heads),
        (
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            _fp32(initial_state.shape),
            like(v.shape if save else (batch,)),
            like((batch, heads, chunks, key_dim, value_dim) if save else (batch,)),
        ),
        (batch * heads, -(-value_dim // cut("state_pass_forward").block_v)),
        constants | cut("state_pass_forward").options(),
        SAVE=save,
    )
    results = outputs, final_state, y, k_tail, q_gamma, read, inverse, decay, *saved
    *results, _ = match_varying_axes((*(results if save else results[:2]), q))
    return tuple(results)


def _run_backward(scale, d_o, d_final_state, *arrays):
    """Gradients of q, k, v, g, b, w and the initial state."""
    from gdn2_jax.ops.gated_delta_rule_2.triton_kernels import backward

    q, k, v, g, b, w, _, segment, *saved = arrays
    y, k_tail, q_gamma, read, inverse, decay, residual, states = saved
    (batch, length, heads, key_dim), value_dim = q.shape, v.shape[-1]
    operand, constants = _arithmetic(q, k, v, b, w)
    chunk = constants["C"]
    chunks = -(-length // chunk)
    cut = functools.partial(_cut, q, v, operand)
    # In two parts, if they are of bf16.
    pairs = (*read.shape[:3], 2 if constants["LOW"] else 1, *read.shape[3:])
    d_residual, d_states, d_initial_state = _launch(
        backward.state_pass_backward,
        (y, k_tail, q_gamma, read, decay, d_o, d_final_state, length, heads),
        (
            _fp32(v.shape),
            jax.ShapeDtypeStruct(states.shape, operand),
            _fp32(d_final_state.shape),
        ),
        (batch * heads, -(-value_dim // cut("state_pass_backward").block_v)),
        constants | cut("state_pass_backward").options(),
    )
    dv, dw, dz, d_erase, d_read, diagonal = _launch(
        backward.value_backward,
        (v, w, segment, inverse, d_o, residual, d_residual, length, heads),
        (
            *(_like(v), _like(w), _fp32(v.shape), jax.ShapeDtypeStruct(pairs, operand)),
            *(_like(read), _fp32(read.shape[:-1])),
        ),
        (batch * heads * chunks,),
        constants | cut("value_backward").options(),
    )
    dq, dk, dg, db = _launch(
        backward.key_backward,
        (
            *(q, k, g, b, segment, _sums(chunk), d_o, residual, dz, states, d_states),
            *(d_erase, d_read, diagonal, length, heads),
        ),
        tuple(map(_like, (q, k, g, b))),
        (batch * heads * chunks * -(-key_dim // cut("key_backward").block_k),),
        constants | cut("key_backward").options(),
        SCALE=scale,
    )
    *gradients, _ = match_varying_axes((dq, dk, dv, dg, db, dw, d_initial_state, q))
    return tuple(gradients)


def _run_decode(scale, state, *arrays):
    from gdn2_jax.ops.gated_delta_rule_2.triton_kernels import decode

    batch, heads, key_dim, value_dim = state.shape
    block_v = min(_DECODE_VALUES, tile(value_dim))
    constants = {"K": key_dim, "V": value_dim, "ALL_K": tile(key_dim), "BLOCK_V": block_v}
    results = _launch(
        decode.decode_step,
        (state, *arrays, heads // arrays[0].shape[1]),
        (_like(state), _like(arrays[2])),
        (batch * heads, -(-value_dim // block_v)),
        constants,
        num_warps=4,
        num_stages=1,
        SCALE=scale,
    )
    *results, _ = match_varying_axes((*results, arrays[0]))
    return tuple(results)


def _sums(chunk: int) -> Array:
    """[3 + levels, C, C] bf16, 1 where a row of a chunk sums over another one.

    0: over the rows up to it. 1: over those after it. 2: over those of its block up to it. 3 + l:
    from the middle of its part of level l up to it, if it lies in the second half; after it up to
    the middle, if in the first.
    """
    row, other = np.arange(chunk)[:, None], np.arange(chunk)[None, :]
    sums = [other <= row, other > row]
    sums.append((other <= row) & (row >> _LOW_LEVELS == other >> _LOW_LEVELS))
    for level in range(chunk.bit_length() - 1):
        towards = np.where(row >> level & 1 == 1, other <= row, other > row)
        sums.append((row >> level == other >> level) & towards)
    return jnp.asarray(np.stack(sums), jnp.bfloat16)


def _cut(q, v, operand, kernel: str) -> Plan:
    """The plan of a kernel for these inputs."""
    batch, _, heads, key_dim = q.shape
    half = operand == jnp.bfloat16
    return plan(case(kernel, key_dim, v.shape[-1], half, batch * heads))


def _is_half(*inputs) -> bool:
    return arithmetic_for(inputs, jnp.dtype(jnp.float32)).precision != HIGHEST


def _arithmetic(q, k, v, b, w) -> tuple[jnp.dtype, dict[str, Any]]:
    """The operands' dtype, and the constants that follow from it and from the sizes."""
    half = _is_half(q, k, v, b, w)
    constants = {
        "K": q.shape[-1],
        "V": v.shape[-1],
        "C": _CHUNK[half],
        "LEVELS": _CHUNK[half].bit_length() - 1,
        "LOW": _LOW_LEVELS if half else 0,
        "ALL_K": tile(q.shape[-1]),
        "PRECISION": "tf32" if half else "tf32x3",
        "PARTS": 2 if half else 3,
    }
    return jnp.dtype(jnp.bfloat16 if half else jnp.float32), constants


def _launch(kernel, arguments, outputs, grid, constants, **options):
    """Runs a kernel with the constants and options that it takes."""
    taken = {*kernel.arg_names, "num_warps", "num_stages"}
    options = {name: x for name, x in (constants | options).items() if name in taken}
    return call_kernel(kernel, arguments, outputs, grid, **options)


def call_kernel(
    kernel: Any,
    arguments: tuple[ArrayLike, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    **options: Any,
) -> tuple[Array, ...]:
    """Runs a Triton kernel by jax-triton.

    Args:
      kernel: takes pointers to the arrays among the arguments and the integers, in their order, then
        pointers to the outputs, then constants.
      arguments: arrays and integers.
      outputs: what the kernel writes.
      grid: number of programs along each axis.
      **options: the constants, and what `jax_triton.triton_call` takes.
    """
    import jax_triton

    # jax-triton 0.4 has another name for it.
    parameters = inspect.signature(jax_triton.triton_call).parameters
    name = "out_type" if "out_type" in parameters else "out_shape"
    return jax_triton.triton_call(
        *arguments, kernel=kernel, grid=grid, **{name: outputs}, **options
    )


def _fp32(shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
