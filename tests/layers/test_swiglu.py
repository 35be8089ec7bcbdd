import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.layers import SwiGLU


def test_mlp_is_the_gated_product(random_params):
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    layer = SwiGLU(12)
    params = random_params(layer, x)
    gate, up, down = (params[f"{name}_proj"]["kernel"] for name in ("gate", "up", "down"))
    expected = (jax.nn.silu(x @ gate) * (x @ up)) @ down
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)
    assert {name: list(leaf) for name, leaf in params.items()} == {
        "gate_proj": ["kernel"],
        "up_proj": ["kernel"],
        "down_proj": ["kernel"],
    }


def test_bfloat16_mlp_has_float32_parameters_and_bfloat16_outputs():
    layer = SwiGLU(12, dtype=jnp.bfloat16)
    y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 3, 8)))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
