"""Every mixer on a mesh of eight simulated devices computes what it does on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gdn2_jax.models import ModelConfig
from gdn2_jax.models.blocks import MIXERS
from gdn2_jax.models.config import SEQUENCE_PARALLEL_MIXERS
from gdn2_jax.parallel import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    param_shardings,
    partitioned,
)

SIZES = {
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_value_heads": 4,
    "head_dim": 8,
    "attention_heads": 2,
    "window_size": 20,
    "ssm_inner_dim": 16,
    "ssm_head_dim": 4,
    "ssm_state_dim": 8,
    "mlp_dim": 16,
    "dtype": "float32",
    "implementation": "recurrent",
}


@pytest.mark.parametrize("mixer", [*MIXERS, "mamba3_mimo"])
def test_outputs_and_gradients_on_a_mesh_are_those_of_one_device(mixer):
    """Spans of 8 tokens: the window reaches over two spans before its own."""
    name, form = (mixer, "siso") if mixer in MIXERS else ("mamba3", "mimo")
    config = ModelConfig(mixer=name, mamba3_form=form, **SIZES)
    sizes = {"sequence": 4} if name in SEQUENCE_PARALLEL_MIXERS else {"fsdp": 4}
    mesh = make_mesh(MeshConfig(tensor=2, **sizes))
    layer = MIXERS[name](config, False, "mixer")
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, 4, 32, 16)).astype(np.float32)
    segment_ids = np.cumsum(rng.random((4, 32)) < 0.1, axis=1).astype(np.int32)

    def init():
        return layer.init(jax.random.key(0), x[:1, :1])["params"]

    params = jax.jit(init)()

    def outputs_and_gradients(params, x, segment_ids, cotangent):
        def outputs(params, x):
            return layer.apply({"params": params}, x, segment_ids)

        y, transpose = jax.vjp(outputs, params, x)
        return y, *transpose(cotangent)

    expected = jax.jit(outputs_and_gradients)(params, x, segment_ids, cotangent)
    tokens, shardings = batch_sharding(mesh), param_shardings(init, mesh)
    with jax.set_mesh(mesh):
        activations = NamedSharding(mesh, P(*tokens.spec, None))
        run = jax.jit(
            outputs_and_gradients, in_shardings=(shardings, activations, tokens, activations)
        )
        actual = run(params, x, segment_ids, cotangent)

    def compare(path, x, y):
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < 1e-5, (jax.tree_util.keystr(path), error)

    # Not on the devices, where each small operation of each shape would be compiled.
    jax.tree_util.tree_map_with_path(compare, *jax.device_get((actual, expected)))


def test_named_initialisers_take_their_dtype_by_keyword_too():
    """As packages that patch linen's `param` pass it."""
    init = partitioned(jax.nn.initializers.ones, "heads")
    assert init(jax.random.key(0), (3,), dtype=jnp.bfloat16).dtype == jnp.bfloat16
