"""A tiny hybrid model of bytes, with weights whose outputs depend on what stands before."""

import jax.numpy as jnp
import pytest

from gdn2_jax.models import LanguageModel


@pytest.fixture(scope="session")
def hybrid(hybrid_config, random_params):
    """The configuration and the parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return hybrid_config, random_params(LanguageModel(hybrid_config), tokens)
