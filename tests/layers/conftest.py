import jax
import numpy as np
import pytest


@pytest.fixture
def random_params():
    """A function of a module and its input: parameters of unit gain, made without compiling."""

    def make(module, *inputs):
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            name = path[-1].key
            if name == "kernel":
                return rng.normal(size=leaf.shape, scale=leaf.shape[0] ** -0.5).astype(leaf.dtype)
            offset = {"scale": 1, "A_log": 1}.get(name, 0)
            return (offset + 0.5 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        return jax.tree.map_with_path(draw, shapes)

    return make
