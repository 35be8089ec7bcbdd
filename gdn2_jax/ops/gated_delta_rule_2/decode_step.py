"""The two forms of a decoding step: jnp on any backend, and the Hopper kernel."""

import functools

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from gdn2_jax.ops.batching import joining_the_batch
from gdn2_jax.ops.gated_delta_rule_2.recurrent import step
from gdn2_jax.pallas.decode_step import decode_step
from gdn2_jax.pallas.rounding import mixed, round_stochastically

_CHANNELS = (64, 128)


def why_not_decode_kernel(q, k, v, g, b, w) -> str | None:
    """What keeps the kernel from serving these inputs ([B, heads, channels]), or None."""
    for name, array in {"q": q, "k": k, "v": v, "b": b, "w": w}.items():
        if array.dtype not in (jnp.bfloat16, jnp.float16):
            return f"the kernel takes {name} in bfloat16 or float16, got {array.dtype}"
    if g.dtype != jnp.float32:
        return f"the kernel takes g in float32, got {g.dtype}"
    if any(map(jax.export.is_symbolic_dim, q.shape)):
        return f"the kernel takes no symbolic shapes, got {q.shape}"
    for name, array in {"q": q, "v": v}.items():
        if array.shape[-1] not in _CHANNELS:
            return f"the kernel takes {_CHANNELS} channels in {name}, got {array.shape[-1]}"
    return None


def decode_xla(
    state: Float[Array, "B Hv K V"],
    q: Float[Array, "B Hk K"],
    k: Float[Array, "B Hk K"],
    v: Float[Array, "B Hv V"],
    g: Float[Array, "B Hk K"],
    b: Float[Array, "B Hk K"],
    w: Float[Array, "B Hv V"],
    seeds: UInt32[Array, "B Hv"] | None,
    scale: float,
) -> tuple[Float[Array, "B Hv K V"], Float[Array, "B Hv V"]]:
    """Advances the state by one token, in the dtype of `g`, and reads it; the output is as `v`."""
    key_heads = q.shape[1]

    def grouped(x):
        return x.reshape(x.shape[0], key_heads, -1, *x.shape[2:])

    arrays = (q, k, grouped(v), g, b, grouped(w), grouped(state))
    q, *rest, wide_state = (x.astype(g.dtype) for x in arrays)
    # The heads of a group share the key side. vmap maps over it, so it is not repeated.
    over_group = jax.vmap(step, in_axes=(2, None, None, 2, None, None, 2), out_axes=2)
    new_state, output = over_group(wide_state, q * scale, *rest)
    new_state = new_state.reshape(state.shape)
    return rounded(new_state, state.dtype, seeds), output.reshape(v.shape).astype(v.dtype)


def rounded(
    state: Float[Array, "B H K V"], dtype: jnp.dtype, seeds: UInt32[Array, "B H"] | None
) -> Float[Array, "B H K V"]:
    """The state in the dtype in which it is kept: rounded to nearest, or stochastically with seeds.

    The gradient is that of a conversion.
    """
    return state.astype(dtype) if seeds is None else _rounded_stochastically(state, seeds)


@jax.custom_jvp
def _rounded_stochastically(state, seeds):
    key_dim, value_dim = state.shape[-2:]
    place = jnp.arange(key_dim * value_dim, dtype=jnp.uint32).reshape(1, 1, key_dim, value_dim)
    seeds, place = jnp.broadcast_arrays(seeds[..., None, None], place)
    return round_stochastically(state, seeds, place)


@_rounded_stochastically.defjvp
def _(primals, tangents):
    return _rounded_stochastically(*primals), tangents[0].astype(jnp.bfloat16)


def rounding_seeds(position: UInt32[Array, "B"], heads: int) -> UInt32[Array, "B {heads}"]:
    """Seeds of a row's heads after so many tokens; they do not depend on other rows."""
    return mixed(position)[:, None] + jnp.arange(heads, dtype=jnp.uint32)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def decode_kernel(state, q, k, v, g, b, w, seeds, scale: float):
    """Does the same as `decode_xla` by the Hopper kernel.

    It serves inputs to which `why_not_decode_kernel` has no objection, and updates the state's
    buffer in place where the caller donates it.
    """

    def run(*arrays):
        *arrays, seeds = arrays
        return decode_step(*arrays, scale, seeds=seeds)

    return joining_the_batch(run)(state, q, k, v, g, b, w, seeds)


def _forward(*arguments):
    return decode_kernel(*arguments), arguments[:-1]


def _backward(scale, arrays, cotangents):
    return jax.vjp(functools.partial(decode_xla, scale=scale), *arrays)[1](cotangents)


decode_kernel.defvjp(_forward, _backward)
