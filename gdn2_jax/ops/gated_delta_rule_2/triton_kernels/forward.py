"""The forward: everything inside a chunk that needs no state, then the pass over the states.

With G the running sum of the log-decay, e = b * k, z = w * v (arXiv 2605.22791, eqs. 18-25):

    E = stril(e exp(G_r - G_s) k^T)    X = (I + E)^-1    A = tril(scale q exp(G_r - G_s) k^T)
    Y = X (e exp(G))    U = X z    Qg = scale q exp(G)    Kt = k exp(G_C - G)    D = exp(G_C)

and from chunk to chunk: R = U - Y S, O = Qg S + A R, S' = D S + Kt^T R.
"""

import triton
import triton.language as tl

from gdn2_jax.ops.gated_delta_rule_2.triton_kernels.tiles import (
    chunk_rows,
    chunk_segments,
    dot,
    first_row,
    level_pairs,
    load_log2_decay,
    load_operand,
    load_rows,
    load_square,
    load_state,
    load_sums,
    store_rows,
    store_square,
    store_state,
    sum_in_block,
    sum_rows,
    unit_lower_inverse,
    wide_dot,
)


@triton.jit
def intra_chunk_forward(
    q,
    k,
    v,
    g,
    b,
    w,
    segment,
    sums,
    T,
    H,
    y,
    u,
    k_tail,
    q_gamma,
    read,
    inverse,
    decay,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program a chunk and key head; y, Kt, Qg, A in the operands' dtype, u, X and D in fp32."""
    index = tl.program_id(0)
    batch, chunk, row, count = chunk_rows(index, T, H, C)
    here, before, last = chunk_segments(segment, batch, chunk, T, C)
    same = here[:, None] == here[None, :]
    reads = (here == before).to(tl.float32)[:, None]
    writes = (here == last).to(tl.float32)[:, None]
    operand = y.dtype.element_ty
    i = tl.arange(0, C)

    erase_pairs = tl.zeros((C, C), tl.float32)
    read_pairs = tl.zeros((C, C), tl.float32)
    diagonal = tl.zeros((C,), tl.float32)
    FIRST: tl.constexpr = 0 if LOW > 0 else 1  # Step 0 takes all pairs in blocks.
    for first in range(0, K, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        log_decay = load_log2_decay(g, row, count, H, channel, K, C)
        key = load_rows(k, row, count, H, channel, K, C)
        erase = load_rows(b, row, count, H, channel, K, C) * key
        query = load_rows(q, row, count, H, channel, K, C) * SCALE
        gamma = tl.exp2(sum_rows(load_sums(sums, 0, C), log_decay, PARTS)) * reads
        store_rows(q_gamma, row, count, H, channel, query * gamma, K, C)
        # Waits in y for the inverse.
        store_rows(y, row, count, H, channel, erase * gamma, K, C)
        tail = tl.exp2(sum_rows(load_sums(sums, 1, C), log_decay, PARTS)) * writes
        store_rows(k_tail, row, count, H, channel, key * tail, K, C)
        total = tl.exp2(tl.sum(log_decay, axis=0))
        total = tl.where(before == last, total, 0.0)
        tl.store(decay + index.to(tl.int64) * K + channel, total, mask=channel < K)
        if LOW > 0:
            exponent = sum_in_block(sums, log_decay, C, PARTS)
            # What overflows is above the diagonal.
            up, down = tl.exp2(exponent + 96), tl.exp2(-96 - exponent)
        else:
            # Rows of a pair with themselves do not decay.
            diagonal += tl.sum(query * key, axis=1)
            up, down = log_decay, log_decay
        for step in range(FIRST, LEVELS - LOW + 1):
            if step > 0:
                up = tl.exp2(sum_rows(load_sums(sums, 2 + LOW + step, C), log_decay, PARTS))
                down = up
            pairs = level_pairs(step, LOW, C)
            right = tl.trans((key * down).to(operand))
            product = dot((erase * up).to(operand), right, PRECISION)
            erase_pairs += tl.where(pairs, product, 0.0)
            product = dot((query * up).to(operand), right, PRECISION)
            read_pairs += tl.where(pairs, product, 0.0)
    if LOW == 0:
        read_pairs = tl.where(i[:, None] == i[None, :], diagonal[:, None], read_pairs)
    lower = i[:, None] >= i[None, :]
    store_square(read, index, tl.where(same & lower, read_pairs, 0.0), C)
    strict = i[:, None] > i[None, :]
    x = unit_lower_inverse(tl.where(same & strict, erase_pairs, 0.0), LEVELS, PRECISION)
    store_square(inverse, index, x, C)

    tl.debug_barrier()  # for what waits in y
    for first in range(0, K, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        erase = load_operand(y, row, count, H, channel, K, C)
        store_rows(y, row, count, H, channel, wide_dot(x, erase, PRECISION), K, C)
    for first in range(0, V, BLOCK_V):
        channel = first + tl.arange(0, BLOCK_V)
        value = load_rows(v, row, count, H, channel, V, C)
        value *= load_rows(w, row, count, H, channel, V, C)
        product = wide_dot(x, value.to(operand), PRECISION)
        store_rows(u, row, count, H, channel, product, V, C)


@triton.jit
def state_pass_forward(
    y,
    u,
    k_tail,
    q_gamma,
    read,
    decay,
    initial_state,
    T,
    H,
    o,
    final_state,
    residual,
    states,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ALL_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    SAVE: tl.constexpr,
):
    """One program a key head and block of value channels, over all chunks in turn.

    Writes R and the state before each chunk, in the operands' dtype, if SAVE.
    """
    index = tl.program_id(0)
    chunks = tl.cdiv(T, C)
    head, batch = index % H, index // H
    channel = tl.arange(0, ALL_K)
    value_channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    operand = y.dtype.element_ty
    state = load_state(initial_state, index, channel, value_channel, K, V)
    for chunk in range(chunks):
        row, count = first_row(batch, chunk, head, T, H, C)
        at = index * chunks + chunk
        low = state.to(operand)
        if SAVE:
            store_state(states, at, channel, value_channel, state, K, V)
        y_ = load_operand(y, row, count, H, channel, K, C)
        r = load_rows(u, row, count, H, value_channel, V, C)
        r -= dot(y_, low, PRECISION)
        r_low = r.to(operand)
        if SAVE:
            store_rows(residual, row, count, H, value_channel, r_low, V, C)
        total = tl.load(decay + at.to(tl.int64) * K + channel, mask=channel < K, other=0.0)
        k_ = tl.trans(load_operand(k_tail, row, count, H, channel, K, C))
        state = dot(k_, r_low, PRECISION, state * total[:, None])
        if operand == tl.bfloat16:
            # Where keys repeat, k^T S is a sum of R that telescopes: U and R keep more than an operand's digits.
            state = dot(k_, (r - r_low.to(tl.float32)).to(operand), PRECISION, state)
        q_ = load_operand(q_gamma, row, count, H, channel, K, C)
        out = dot(q_, low, PRECISION)
        out = dot(load_square(read, at, C), r_low, PRECISION, out)
        store_rows(o, row, count, H, value_channel, out, V, C)
    store_state(final_state, index, channel, value_channel, state, K, V)
