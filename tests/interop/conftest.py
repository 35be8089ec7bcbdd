import jax
import numpy as np
import pytest


@pytest.fixture
def random_params():
    """A function of a module and its input: parameters of unit gain, made without compiling."""

    def make(module, *inputs):
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

        def draw(leaf):
            fan_in = leaf.shape[-2] if leaf.ndim > 1 else 1
            return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(leaf.dtype)

        return jax.tree.map(draw, shapes)

    return make
