"""The operators that Gated Delta Rule-2 contains, each from its own definition in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.testing import operator_inputs

LENGTH, HEADS, KEY_DIM, VALUE_DIM = 70, 2, 8, 6


@functools.cache
def compiled(implementation):
    return jax.jit(functools.partial(gated_delta_rule_2, implementation=implementation))


def linear_recurrence(q, k, v, transition, strength):
    """S_t = transition_t S_{t-1} + strength_t k_t v_t^T, read by q_t / sqrt(K); one sequence."""
    outputs = np.zeros(v.shape)
    for h in range(HEADS):
        state = np.zeros((KEY_DIM, VALUE_DIM))
        for t in range(LENGTH):
            write = strength[t, h] * np.outer(k[t, h], v[t, h])
            state = transition(t, h) @ state + write
            outputs[t, h] = state.T @ q[t, h] / np.sqrt(KEY_DIM)
    return outputs


@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
@pytest.mark.parametrize("name", ["kda", "gdn", "deltanet", "gated linear attention"])
def test_tied_gates_give_the_operator_of(name, implementation):
    inputs = operator_inputs(1, LENGTH, HEADS, KEY_DIM, VALUE_DIM, dtype="float64")
    q, k, v, g = (np.asarray(x[0]) for x in inputs[:4])
    identity = np.eye(KEY_DIM)
    beta = np.asarray(inputs.b[0, ..., 0])
    erase, strength = beta, beta
    if name in ("gdn", "gated linear attention"):
        g = np.broadcast_to(g[..., :1], g.shape)
    if name == "deltanet":
        g = np.zeros_like(g)
    if name == "gated linear attention":
        erase, strength = np.zeros_like(beta), np.ones_like(beta)

    transitions = {
        "kda": lambda t, h: (
            (identity - beta[t, h] * np.outer(k[t, h], k[t, h])) @ np.diag(np.exp(g[t, h]))
        ),
        "gdn": lambda t, h: (
            np.exp(g[t, h, 0]) * (identity - beta[t, h] * np.outer(k[t, h], k[t, h]))
        ),
        "deltanet": lambda t, h: identity - beta[t, h] * np.outer(k[t, h], k[t, h]),
        "gated linear attention": lambda t, h: np.exp(g[t, h, 0]) * identity,
    }
    expected = linear_recurrence(q, k, v, transitions[name], strength)
    with jax.enable_x64(True):
        b = jnp.broadcast_to(erase[None, ..., None], inputs.b.shape)
        w = jnp.broadcast_to(strength[None, ..., None], inputs.w.shape)
        outputs, _ = compiled(implementation)(*inputs[:3], jnp.asarray(g[None]), b, w)
    np.testing.assert_allclose(outputs[0], expected, atol=1e-13)


def test_tied_gradient_is_the_sum_of_both_gates_gradients():
    """Paper eq. 48, against autodiff of Kimi Delta Attention in its own form."""
    inputs = operator_inputs(1, LENGTH, HEADS, KEY_DIM, VALUE_DIM, dtype="float64")
    cotangent = np.asarray(
        operator_inputs(1, LENGTH, HEADS, KEY_DIM, VALUE_DIM, dtype="float64", seed=1).v
    )
    q, k, v, g, b, _ = (x[0] for x in inputs[:6])

    def kda(beta):
        def step(state, token):
            q, k, v, g, beta = token
            decayed = jnp.exp(g)[..., None] * state
            error = v - jnp.einsum("hkv,hk->hv", decayed, k)
            state = decayed + jnp.einsum("h,hk,hv->hkv", beta, k, error)
            return state, jnp.einsum("hkv,hk->hv", state, q) / jnp.sqrt(KEY_DIM)

        start = jnp.zeros((HEADS, KEY_DIM, VALUE_DIM))
        return jnp.vdot(jax.lax.scan(step, start, (q, k, v, g, beta))[1], cotangent[0])

    def ours(b, w):
        outputs, _ = gated_delta_rule_2(*inputs[:4], b, w, implementation="xla")
        return jnp.vdot(outputs, cotangent)

    with jax.enable_x64(True):
        beta = b[..., 0]
        expected = jax.grad(kda)(beta)
        tied = (jnp.broadcast_to(beta[None, ..., None], x.shape) for x in (inputs.b, inputs.w))
        db, dw = map(np.asarray, jax.jit(jax.grad(ours, argnums=(0, 1)))(*tied))
    np.testing.assert_allclose(db[0].sum(-1) + dw[0].sum(-1), expected, atol=1e-12)
    assert np.abs(db).max() > 1e-3 and np.abs(dw).max() > 1e-3
