"""A tiny hybrid model of bytes, with weights whose outputs depend on what stands before."""

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax.models import DeltaRule, LanguageModel, ModelConfig, SoftmaxAttention

HYBRID = ModelConfig(
    vocab_size=257,
    d_model=16,
    num_layers=2,
    mixer=DeltaRule(num_heads=1, head_dim=16),
    hybrid=True,
    attention=SoftmaxAttention(num_heads=1, window_size=8),
    mlp_dim=32,
    dtype="float32",
    implementation="recurrent",
)


@pytest.fixture(scope="session")
def hybrid():
    """The configuration and the parameters."""
    model = LanguageModel(HYBRID)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    # At first the mixer does almost nothing.
    return HYBRID, jax.tree.map(lambda x: 2 * x, variables["params"])
