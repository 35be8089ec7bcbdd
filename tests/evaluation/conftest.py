"""A tiny hybrid model of bytes, with weights whose outputs depend on what stands before."""

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax.models import LanguageModel


@pytest.fixture(scope="session")
def hybrid(hybrid_config):
    """The configuration and the parameters."""
    model = LanguageModel(hybrid_config)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    # At first the mixer does almost nothing.
    return hybrid_config, jax.tree.map(lambda x: 2 * x, variables["params"])
