"""Products of row pairs under decay against the sums that define them, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gated_delta_rule_2.decayed_products import (
    decayed,
    from_chunk_start,
    pair_products,
    pair_products_transpose,
    to_chunk_end,
)
from gdn2_jax.ops.precision import Arithmetic

ROWS, KEY_DIM = 64, 3
ARITHMETIC = Arithmetic(jnp.dtype("float64"), jax.lax.Precision.HIGHEST)


def products(e, q, k, g):
    d = decayed(e, q, k, g, ARITHMETIC.operand)
    ends = from_chunk_start(d.e_prefix, d), from_chunk_start(d.q_prefix, d)
    return *pair_products(d, ARITHMETIC), *ends, to_chunk_end(d.k_suffix, d), d.total


def sums(e, q, k, g):
    """The same, pair by pair: exp of the sum of g over the rows between."""
    row = np.arange(ROWS)
    after, until = row[None, None, :] > row[None, :, None], row[None, None, :] <= row[:, None, None]
    decay = jnp.exp(jnp.einsum("rst,tk->rsk", (after & until).astype(float), g))
    decay *= (row[:, None] > row)[..., None]
    from_start = jnp.exp(jnp.cumsum(g, 0))
    to_end = jnp.exp(jnp.cumsum(g[::-1], 0)[::-1] - g)
    pairs = (jnp.einsum("rk,sk,rsk->rs", x, k, decay) for x in (e, q))
    return *pairs, e * from_start, q * from_start, k * to_end, jnp.exp(g.sum(0))


def products_and_gradients(e, q, k, g, cotangents):
    d = decayed(e, q, k, g, ARITHMETIC.operand)
    return products(e, q, k, g), pair_products_transpose(d, *cotangents, ARITHMETIC)


def sums_and_gradients(e, q, k, g, cotangents):
    results, pullback = jax.vjp(sums, e, q, k, g)
    return results, pullback(cotangents)


@pytest.fixture(scope="module")
def both():
    """The programs, each compiled once."""
    return jax.jit(products_and_gradients), jax.jit(sums_and_gradients)


@pytest.mark.parametrize("strongest", [0.0, 0.5, 8.0])
def test_products_and_their_gradients_are_those_of_the_sums(both, strongest):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        e, q, k = jnp.asarray(rng.normal(size=(3, ROWS, KEY_DIM)))
        g = -strongest * jnp.asarray(rng.random((ROWS, KEY_DIM)))
        # Entries on and above the diagonal belong to no pair.
        pairs = jnp.asarray(np.tril(rng.normal(size=(2, ROWS, ROWS)), -1))
        ends = jnp.asarray(rng.normal(size=(3, ROWS, KEY_DIM)))
        cotangents = (*pairs, *ends, jnp.asarray(rng.normal(size=KEY_DIM)))
        results, expected = (run(e, q, k, g, cotangents) for run in both)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(results), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11, err_msg=jax.tree_util.keystr(path))
