"""The operator on a Hopper GPU: the Pallas kernels, and the custom_vjp around them.

Forward and backward each run two kernels: one over all chunks at once, for everything that needs no
state, and one over the sequence, for the states. The forward keeps the kernels' own intermediates
for the backward, about 1.2 times the inputs; `jax.checkpoint` around a layer trades them for a
second run.
"""

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gdn2_jax.ops.arguments import match_varying_axes
from gdn2_jax.pallas.chunk_backward import chunk_backward, from_sums_in_chunks
from gdn2_jax.pallas.intra_chunk_forward import intra_chunk_forward, sums_in_chunks
from gdn2_jax.pallas.mosaic import CHUNK, is_scalar
from gdn2_jax.pallas.segments import first_flaws, segment_masks
from gdn2_jax.pallas.state_pass import state_pass_backward, state_pass_forward

_KEY_CHANNELS = (64, 128)
_VALUE_CHANNELS = 64
_GRID = 65535  # blocks along the shorter axes of a CUDA grid


def why_not_hopper(q, k, v, g, b, w) -> str | None:
    """What keeps the kernels from serving these inputs ([B, T, heads, channels]), or None."""
    for name, array in {"q": q, "k": k, "v": v, "b": b, "w": w}.items():
        if array.dtype not in (jnp.bfloat16, jnp.float16):
            return f"the kernels take {name} in bfloat16 or float16, got {array.dtype}"
    if g.dtype != jnp.float32:
        return f"the kernels take g in float32, got {g.dtype}"
    batch, length, heads, _ = q.shape
    if any(map(jax.export.is_symbolic_dim, q.shape)):
        return f"the kernels take no symbolic shapes, got {q.shape}"
    if max(batch, -(-length // CHUNK), heads) > _GRID:
        return f"the kernels take up to {_GRID} sequences, heads and chunks of {CHUNK} tokens"
    if q.shape[-1] not in _KEY_CHANNELS:
        return f"the kernels take {_KEY_CHANNELS} channels in q, got {q.shape[-1]}"
    if g.shape[-1] == 1 < b.shape[-1]:
        # Broadcast, a decay below the clamp would leave 2^-12 of each channel in the sum that dg is.
        return f"the kernels take one channel in g where b has one, too, got {b.shape[-1]} in b"
    values = v.shape[-2] // q.shape[-2] * v.shape[-1]
    if values % _VALUE_CHANNELS:
        return (
            f"the kernels take multiples of {_VALUE_CHANNELS} value channels a key head, "
            f"got {values}"
        )
    return None


def hopper(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H #K"],
    b: Float[Array, "B T H #K"],
    w: Float[Array, "B T H #V"],
    initial_state: Float[Array, "B H K V"],
    starts: Bool[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Outputs (in v's dtype) and final state (fp32); arguments as in `chunkwise`, dtypes as above.

    K is 64 or 128 and V a multiple of 64; fp16 inputs are rounded to bf16. The kernels read gates with
    one channel as one number a head, and leave their gradients so.
    """
    length, key_dim, value_dim, dtype = q.shape[1], q.shape[-1], v.shape[-1], v.dtype
    padding = -length % CHUNK
    # A block of value channels is as wide as the key's two halves.
    value_padding = -value_dim % key_dim
    if padding or value_padding:
        # Padded rows are exact no-ops: they write nothing and do not decay the state.
        rows = ((0, 0), (0, padding), (0, 0))
        q, k, g, b = (jnp.pad(x, (*rows, (0, 0))) for x in (q, k, g, b))
        v = jnp.pad(v, (*rows, (0, value_padding)))
        w = jnp.pad(w, (*rows, (0, 0 if w.shape[-1] == 1 else value_padding)))
        initial_state = jnp.pad(initial_state, ((0, 0),) * 3 + ((0, value_padding),))
    masks = None
    if starts is not None:
        masks = segment_masks(jnp.pad(starts, ((0, 0), (0, padding))))
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    b, w = (_by_head(x) if x.shape[-1] == 1 else x.astype(jnp.bfloat16) for x in (b, w))
    g = _by_head(g) if g.shape[-1] == 1 else g
    results: Any = _hopper(scale, q, k, v, g, b, w, _transpose(initial_state), masks)
    outputs, final_state = results
    outputs = outputs[:, :length, :, :value_dim].astype(dtype)
    return outputs, _transpose(final_state)[..., :value_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hopper(scale, *arguments):
    return _run_forward(scale, *arguments, save=False)[0]


def _forward(scale, *arguments):
    return _run_forward(scale, *arguments, save=True)


def _run_forward(scale, q, k, v, g, b, w, state, masks, *, save):
    unknown = None
    if is_scalar(g):
        if masks is not None:
            unknown = ~((g < jnp.inf) & jnp.isfinite(b))
            g = jnp.where(g < jnp.inf, g, 0)
        g = sums_in_chunks(g)
    results: Any = intra_chunk_forward(q, k, v, g, b, w, masks, scale=scale, save=save)
    y_t, u_t, k_tail, q_gamma, a_qk_t, decay, x, steps, flaws = results
    if decay is None:
        decay = jnp.exp2(g[..., 0, -1]).reshape(y_t.shape[:2])
        decay = jnp.broadcast_to(decay[..., None], y_t.shape[:3])
    if masks is not None:
        decay = _carried(decay, masks)
        # NaN would reach every segment of a row through products with zero: the kernels leave it out,
        # and what follows it in its segment becomes NaN here.
        state, flawed = _without_flaws(state)
        flaws = flaws.reshape(*state.shape[:2], -1)
        flaws = flaws if unknown is None else flaws + unknown
        flaws = flaws.at[..., 0].add(flawed)
    outputs, final_state, states, r_t = state_pass_forward(
        y_t, u_t, k_tail, q_gamma, a_qk_t, decay, state, save=save
    )
    if masks is not None:
        lost = first_flaws(flaws, masks) <= jnp.arange(flaws.shape[-1])
        outputs = jnp.where(jnp.swapaxes(lost, 1, 2)[..., None], jnp.nan, outputs)
        final_state = jnp.where(lost[..., -1, None, None], jnp.nan, final_state)
    inputs = (q, k, v, g, b, w), masks
    operands = y_t, k_tail, q_gamma, a_qk_t, decay, x
    *results, _ = match_varying_axes((outputs, final_state, q))
    return tuple(results), (inputs, operands, steps, states, r_t, flaws)


def _backward(scale, residuals, cotangents):
    ((q, k, v, g, b, w), masks), operands, steps, states, r_t, flaws = residuals
    y_t, k_tail, q_gamma, a_qk_t, decay, x = operands
    d_o, d_state = cotangents
    poison = None
    if masks is not None:
        d_o, flawed = _without_flaws(d_o, axes=-1)
        d_state, flawed_state = _without_flaws(d_state)
        flaws = (flaws + jnp.swapaxes(flawed, 1, 2)).at[..., -1].add(flawed_state)
        lost = first_flaws(flaws, masks) < flaws.shape[-1]
        poison = jnp.where(lost, jnp.nan, jnp.zeros_like(flaws))
    d_z, d_states, d_initial_state = state_pass_backward(
        y_t, d_o, k_tail, q_gamma, a_qk_t, decay, x, d_state
    )
    dq, dk, dg, db, dv, dw = chunk_backward(
        *(q, k, v, g, b, w, d_o, r_t, d_z, states, d_states, decay, steps),
        *(masks, _rows(poison)),
        scale=scale,
    )
    # The kernels leave summands of what has one number a head.
    if g.ndim == 5:
        dg = from_sums_in_chunks(dg)
    if is_scalar(b):
        db = jnp.sum(db, axis=2)
    if is_scalar(w):
        dw = jnp.sum(dw, axis=2)
    if poison is not None:
        dg, db, dw = (x + poison if is_scalar(x) else x for x in (dg, db, dw))
        d_initial_state += poison[..., 0, None, None]
    *gradients, _ = match_varying_axes((dq, dk, dv, dg, db, dw, d_initial_state, q))
    return *gradients, None


_hopper.defvjp(_forward, _backward)


def _without_flaws(x: Array, axes=(-2, -1)) -> tuple[Array, Array]:
    """The array with zeros in place of NaN and infinity, and their number along the axes."""
    finite = jnp.isfinite(x)
    return jnp.where(finite, x, 0), jnp.sum(~finite, axis=axes, dtype=jnp.float32)


def _by_head(gate: Float[Array, "B T H 1"]) -> Float[Array, "B H T"]:
    """One number a head and token, as the kernels read it."""
    return jnp.swapaxes(gate[..., 0], 1, 2).astype(jnp.float32)


def _rows(x: Float[Array, "B H T"] | None) -> Float[Array, "BH T"] | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _carried(decay: Float[Array, "BH N K"], masks) -> Float[Array, "BH N K"]:
    """Zeroes a chunk's decay where no segment spans it."""
    batch, chunks = masks.carries.shape
    carries = masks.carries[:, None, :, None]
    return (decay.reshape(batch, -1, chunks, decay.shape[-1]) * carries).reshape(decay.shape)


def _transpose(state: Array) -> Array:
    return jnp.swapaxes(state, -1, -2)
