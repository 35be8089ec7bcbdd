"""One token: the state is read once and written once."""

import triton
import triton.language as tl

from gdn2_jax.ops.gated_delta_rule_2.triton_kernels.tiles import load_state, store_state


@triton.jit
def decode_step(
    state,
    q,
    k,
    v,
    g,
    b,
    w,
    GROUP,
    new_state,
    o,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ALL_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a value head and block of value channels; GROUP value heads share a key head."""
    index = tl.program_id(0)
    channel = tl.arange(0, ALL_K)
    value_channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    at, known = index // GROUP * K + channel, channel < K
    query = tl.load(q + at, mask=known, other=0.0).to(tl.float32) * SCALE
    key = tl.load(k + at, mask=known, other=0.0).to(tl.float32)
    erase = tl.load(b + at, mask=known, other=0.0).to(tl.float32) * key
    decay = tl.exp(tl.load(g + at, mask=known, other=0.0))
    at, known = index * V + value_channel, value_channel < V
    value = tl.load(v + at, mask=known, other=0.0).to(tl.float32)
    value *= tl.load(w + at, mask=known, other=0.0).to(tl.float32)

    tile = load_state(state, index, channel, value_channel, K, V) * decay[:, None]
    value -= tl.sum(tile * erase[:, None], axis=0)
    tile += key[:, None] * value[None, :]
    store_state(new_state, index, channel, value_channel, tile, K, V)
    out = tl.sum(tile * query[:, None], axis=0)
    tl.store(o + at, out.to(o.dtype.element_ty), mask=known)
