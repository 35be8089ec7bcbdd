"""The backward: the pass over the states' gradients, then everything inside a chunk.

In the symbols of `forward`, with dO and dS' given (arXiv 2605.22791, eqs. 49-82, rearranged):

    dR = A^T dO + Kt dS'    dS = D dS' + Qg^T dO - Y^T dR

and for every chunk by itself

    dz = X^T dR    dA = tril(dO R^T)    dE = -stril(dz R^T)
    d(e exp(G)) = -dz S^T    dQg = dO S^T    dKt = R dS'^T    dD = rowsum(S * dS')

The gradient of g is a sum over all exponents that it enters: nothing cancels, however strong gates are.
"""

import triton
import triton.language as tl

from gdn2_jax.ops.gated_delta_rule_2.triton_kernels.tiles import (
    CLAMP,
    bf16_part,
    chunk_rows,
    chunk_segments,
    dot,
    dot_wide,
    first_row,
    load_log2_decay,
    load_operand,
    load_pairs,
    load_rows,
    load_square,
    load_state,
    load_sums,
    load_sums_transposed,
    store_rows,
    store_square,
    store_state,
    sum_in_block,
    sum_rows,
    wide_dot,
)


@triton.jit
def state_pass_backward(
    y,
    k_tail,
    q_gamma,
    read,
    decay,
    d_o,
    d_final_state,
    T,
    H,
    d_residual,
    d_states,
    d_initial_state,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ALL_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a key head and block of value channels; writes dR in fp32 and each chunk's dS'."""
    index = tl.program_id(0)
    chunks = tl.cdiv(T, C)
    head, batch = index % H, index // H
    channel = tl.arange(0, ALL_K)
    value_channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    operand = y.dtype.element_ty
    d_state = load_state(d_final_state, index, channel, value_channel, K, V)
    for step in range(chunks):
        chunk = chunks - 1 - step
        row, count = first_row(batch, chunk, head, T, H, C)
        at = index * chunks + chunk
        store_state(d_states, at, channel, value_channel, d_state, K, V)
        d_out = load_rows(d_o, row, count, H, value_channel, V, C).to(operand)
        # k^T dS vanishes by cancellation where keys repeat: dS and dR keep more than an operand's digits.
        k_ = load_operand(k_tail, row, count, H, channel, K, C)
        d_r = dot_wide(k_, d_state, PRECISION)
        read_ = tl.trans(load_square(read, at, C))
        d_r = dot(read_, d_out, PRECISION, d_r)
        store_rows(d_residual, row, count, H, value_channel, d_r, V, C)
        total = tl.load(decay + at.to(tl.int64) * K + channel, mask=channel < K, other=0.0)
        d_state *= total[:, None]
        q_ = tl.trans(load_operand(q_gamma, row, count, H, channel, K, C))
        d_state = dot(q_, d_out, PRECISION, d_state)
        y_ = tl.trans(load_operand(y, row, count, H, channel, K, C))
        d_state -= dot_wide(y_, d_r, PRECISION)
    store_state(d_initial_state, index, channel, value_channel, d_state, K, V)


@triton.jit
def value_backward(
    v,
    w,
    segment,
    inverse,
    d_o,
    residual,
    d_residual,
    T,
    H,
    dv,
    dw,
    dz,
    d_erase,
    d_read,
    diagonal,
    V: tl.constexpr,
    C: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a chunk and key head: what sums over value channels, and their gradients."""
    index = tl.program_id(0)
    batch, chunk, row, count = chunk_rows(index, T, H, C)
    here, _, _ = chunk_segments(segment, batch, chunk, T, C)
    operand = residual.dtype.element_ty
    x = tl.trans(load_square(inverse, index, C))
    erase_pairs = tl.zeros((C, C), tl.float32)
    read_pairs = tl.zeros((C, C), tl.float32)
    for first in range(0, V, BLOCK_V):
        channel = first + tl.arange(0, BLOCK_V)
        d_r = load_rows(d_residual, row, count, H, channel, V, C)
        d_value = dot(x, d_r, PRECISION)
        value = load_rows(v, row, count, H, channel, V, C)
        write = load_rows(w, row, count, H, channel, V, C)
        store_rows(dv, row, count, H, channel, write * d_value, V, C)
        store_rows(dw, row, count, H, channel, value * d_value, V, C)
        store_rows(dz, row, count, H, channel, d_value, V, C)
        r = tl.trans(load_operand(residual, row, count, H, channel, V, C))
        d_out = load_rows(d_o, row, count, H, channel, V, C).to(operand)
        read_pairs = dot(d_out, r, PRECISION, read_pairs)
        erase_pairs -= wide_dot(d_value, r, PRECISION)
    i = tl.arange(0, C)
    same = here[:, None] == here[None, :]
    strict = i[:, None] > i[None, :]
    erase_pairs = tl.where(same & strict, erase_pairs, 0.0)
    if LOW > 0:
        # Along a row of repeated keys dE telescopes, so its entries must not be rounded: two parts.
        high = bf16_part(erase_pairs)
        store_square(d_erase, 2 * index, high, C)
        store_square(d_erase, 2 * index + 1, erase_pairs - high, C)
    else:
        store_square(d_erase, index, erase_pairs, C)
    store_square(d_read, index, tl.where(same & strict, read_pairs, 0.0), C)
    read_pairs = tl.where(i[:, None] == i[None, :], read_pairs, 0.0)
    tl.store(diagonal + index.to(tl.int64) * C + i, tl.sum(read_pairs, axis=1))


@triton.jit
def pair_gradients(
    d_erase,
    d_read,
    index,
    step,
    left_e,
    left_q,
    right,
    LOW: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of these operands of the products over some pairs of rows, see `level_pairs`."""
    pairs = load_pairs(d_read, index, step, LOW, C)
    d_left_q = dot(pairs, right, PRECISION)
    d_right = dot(tl.trans(pairs), left_q, PRECISION)
    parts: tl.constexpr = 2 if LOW > 0 else 1
    d_left_e = tl.zeros(left_e.shape, tl.float32)
    for part in tl.static_range(parts):
        pairs = load_pairs(d_erase, parts * index + part, step, LOW, C)
        d_left_e = dot(pairs, right, PRECISION, d_left_e)
        d_right = dot(tl.trans(pairs), left_e, PRECISION, d_right)
    return d_left_e, d_left_q, d_right


@triton.jit
def key_backward(
    q,
    k,
    g,
    b,
    segment,
    sums,
    d_o,
    residual,
    dz,
    states,
    d_states,
    d_erase,
    d_read,
    diagonal,
    T,
    H,
    dq,
    dk,
    dg,
    db,
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
    """One program a chunk, key head and block of key channels: gradients of q, k, g and b."""
    # The blocks of a chunk follow one another, so that what they share is read from memory once.
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    index = tl.program_id(0) // blocks
    batch, chunk, row, count = chunk_rows(index, T, H, C)
    here, before, last = chunk_segments(segment, batch, chunk, T, C)
    operand = residual.dtype.element_ty
    channel = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    i = tl.arange(0, C)

    # Through the state: gradients of e exp(G), Qg, Kt and D.
    d_e_gamma = tl.zeros((C, BLOCK_K), tl.float32)
    d_q_gamma = tl.zeros((C, BLOCK_K), tl.float32)
    d_k_tail = tl.zeros((C, BLOCK_K), tl.float32)
    d_total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, V, BLOCK_V):
        value_channel = first + tl.arange(0, BLOCK_V)
        state = load_state(states, index, channel, value_channel, K, V)
        d_state = load_state(d_states, index, channel, value_channel, K, V)
        d_total += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)
        r = load_operand(residual, row, count, H, value_channel, V, C)
        d_k_tail = dot(r, tl.trans(d_state), PRECISION, d_k_tail)
        state = tl.trans(state)
        d_out = load_rows(d_o, row, count, H, value_channel, V, C).to(operand)
        d_q_gamma = dot(d_out, state, PRECISION, d_q_gamma)
        d_value = load_rows(dz, row, count, H, value_channel, V, C)
        d_e_gamma -= wide_dot(d_value, state, PRECISION)

    log_decay = load_log2_decay(g, row, count, H, channel, K, C)
    key = load_rows(k, row, count, H, channel, K, C)
    erase = load_rows(b, row, count, H, channel, K, C) * key
    query = load_rows(q, row, count, H, channel, K, C) * SCALE
    reads = (here == before).to(tl.float32)[:, None]
    factor = tl.exp2(sum_rows(load_sums(sums, 0, C), log_decay, PARTS)) * reads
    d_erase_row = d_e_gamma * factor
    d_query = d_q_gamma * factor
    d_exponent = erase * d_erase_row + query * d_query
    d_decay = sum_rows(load_sums_transposed(sums, 0, C), d_exponent, PARTS)
    writes = (here == last).to(tl.float32)[:, None]
    factor = tl.exp2(sum_rows(load_sums(sums, 1, C), log_decay, PARTS)) * writes
    d_key = d_k_tail * factor
    d_decay += sum_rows(load_sums_transposed(sums, 1, C), key * d_key, PARTS)
    total = tl.exp2(tl.sum(log_decay, axis=0)) * d_total
    d_decay += tl.where(before == last, total, 0.0)[None, :]

    # Through pairs of rows. Rows of a pair with themselves do not decay.
    own = tl.load(diagonal + index.to(tl.int64) * C + i)[:, None]
    d_query += own * key
    d_key += own * query
    if LOW > 0:
        exponent = sum_in_block(sums, log_decay, C, PARTS)
        # Weights of pairs fill fp32's range: gradients of pairs times a key may be 2^-38 to 2^15.
        up, down = tl.exp2(exponent + 104), tl.exp2(-80 - exponent)
        left_e = (erase * up).to(operand)
        left_q = (query * up).to(operand)
        right = (key * down).to(operand)
        d_left_e, d_left_q, d_right = pair_gradients(
            d_erase, d_read, index, 0, left_e, left_q, right, LOW, C, PRECISION
        )
        # Both sides of a pair enter this difference with the same rounding: pairs of rows that are
        # summed over cancel.
        d_exponent = left_e.to(tl.float32) * d_left_e + left_q.to(tl.float32) * d_left_q
        d_exponent = (d_exponent - right.to(tl.float32) * d_right) * 2.0**-24
        d_block = sum_rows(load_sums_transposed(sums, 2, C), d_exponent, PARTS)
        # A clamped decay is larger than the true one, and so is what went through it. One decay a head
        # would sum that up over its channels.
        excess = load_log2_decay(g, row, count, H, channel, K, C) - CLAMP
        d_decay += d_block * tl.exp2(tl.where(excess < 0, excess, 0.0))
        up, down = up * 2.0**-24, down * 2.0**-24
        d_erase_row += d_left_e * up
        d_query += d_left_q * up
        d_key += d_right * down
    for step in range(1, LEVELS - LOW + 1):
        factor = tl.exp2(sum_rows(load_sums(sums, 2 + LOW + step, C), log_decay, PARTS))
        left_e = (erase * factor).to(operand)
        left_q = (query * factor).to(operand)
        right = (key * factor).to(operand)
        d_left_e, d_left_q, d_right = pair_gradients(
            d_erase, d_read, index, step, left_e, left_q, right, LOW, C, PRECISION
        )
        d_left_e *= factor
        d_left_q *= factor
        d_right *= factor
        d_erase_row += d_left_e
        d_query += d_left_q
        d_key += d_right
        d_exponent = erase * d_left_e + query * d_left_q + key * d_right
        d_decay += sum_rows(load_sums_transposed(sums, 2 + LOW + step, C), d_exponent, PARTS)

    store_rows(dg, row, count, H, channel, d_decay, K, C)
    store_rows(dq, row, count, H, channel, d_query * SCALE, K, C)
    store_rows(db, row, count, H, channel, d_erase_row * key, K, C)
    gate = load_rows(b, row, count, H, channel, K, C)
    store_rows(dk, row, count, H, channel, d_key + gate * d_erase_row, K, C)
