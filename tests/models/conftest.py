import functools

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax.models import DeltaRule, LanguageModel, ModelConfig, SoftmaxAttention


@functools.cache
def _build(random_params, **options):
    config = ModelConfig(
        **{
            "vocab_size": 31,
            "d_model": 16,
            "num_layers": 4,
            "mixer": DeltaRule(num_heads=2, head_dim=8),
            "attention": SoftmaxAttention(num_heads=2, window_size=4),
            "mlp_dim": 24,
            "dtype": "float32",
            "implementation": "recurrent",
        }
        | options
    )
    return config, jax.device_put(random_params(LanguageModel(config), jnp.zeros((1, 1), int)))


@pytest.fixture(params=[False, True], ids=["recurrent", "hybrid"])
def small_model(request, random_params):
    """A configuration and parameters, recurrent and hybrid."""
    return _build(random_params, hybrid=request.param)


@pytest.fixture
def hybrid_model(random_params):
    return _build(random_params, hybrid=True)
