import functools

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax.models import DeltaRule, LanguageModel, ModelConfig, SoftmaxAttention


@functools.cache
def _build(**options):
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
    params = jax.jit(LanguageModel(config).init)(jax.random.key(0), jnp.zeros((1, 1), int))[
        "params"
    ]

    def widen(path, leaf):
        # Initial mixers are almost silent: let them speak, so that tests hear their mistakes.
        return 8 * leaf if any(part.key == "mixer" for part in path) and leaf.ndim == 3 else leaf

    # In NumPy: jnp would compile each small operation on each shape.
    return config, jax.device_put(jax.tree.map_with_path(widen, jax.device_get(params)))


@pytest.fixture(params=[False, True], ids=["recurrent", "hybrid"])
def small_model(request):
    """A configuration and parameters, recurrent and hybrid."""
    return _build(hybrid=request.param)


@pytest.fixture
def hybrid_model():
    return _build(hybrid=True)
