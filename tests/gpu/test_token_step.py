"""A token of a whole model by kernels, on a Hopper GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.models import (
    DeltaRule,
    LanguageModel,
    ModelConfig,
    continue_session,
    start_session,
)
from gdn2_jax.ops.choice import hopper_attached

pytestmark = pytest.mark.skipif(not hopper_attached(), reason="needs a Hopper GPU")


@pytest.mark.parametrize("rounding", [None, "nearest", "stochastic"])
def test_kernels_are_as_near_to_float32_as_modules(rounding):
    config = ModelConfig(
        vocab_size=512,
        d_model=2304,
        num_layers=1,
        mlp_dim=6208,
        mixer=DeltaRule(state_rounding=rounding),
        unroll=True,
        dtype="bfloat16",
    )

    @jax.jit
    def draw():
        params = LanguageModel(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        return jax.tree.map(
            lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype),
            params["params"],
        )

    params = draw()

    def leaves(**fields):
        chosen = dataclasses.replace(config, **fields)
        session = start_session(chosen, params, [[1, 2]])
        # One token, which the same logits draw in all.
        session = session._replace(logits=jnp.zeros((1, 512)))
        _, session = continue_session(chosen, params, session, max_new_tokens=1, temperature=0)
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(session)]

    expected = leaves(dtype="float32", implementation="xla")
    for x, y, z in zip(
        leaves(implementation="pallas"), leaves(implementation="xla"), expected, strict=True
    ):
        assert np.linalg.norm(x - z) <= 1.5 * np.linalg.norm(y - z) + 1e-6 * np.linalg.norm(z)
