"""Operators work where jnp refuses to add axes by itself; tracing shows it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SEGMENT_IDS = np.asarray([[0] * 9 + [1] * 31] * 2)


@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
def test_no_operator_relies_on_rank_promotion(operator, implementation):
    run, step, tokens, state = operator(2, 40)

    def loss(segment_ids, tokens, state):
        outputs, state = run(tokens, state, segment_ids, implementation)
        return sum(map(jnp.sum, jax.tree.leaves((outputs, state))))

    def step_loss(token, state):
        return sum(map(jnp.sum, jax.tree.leaves(step(state, token))))

    with jax.numpy_rank_promotion("raise"):
        for segment_ids in (None, SEGMENT_IDS):
            gradient = jax.grad(functools.partial(loss, segment_ids), (0, 1))
            jax.eval_shape(gradient, tokens, state)
        token = {name: x[:, 0] for name, x in tokens.items()}
        jax.eval_shape(jax.grad(step_loss, (0, 1)), token, state)
