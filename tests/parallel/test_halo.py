import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gdn2_jax.parallel import MeshConfig, make_mesh
from gdn2_jax.parallel.halo import with_previous_tokens


@pytest.mark.parametrize("count", [0, 1, 2, 5, 16], ids="{} tokens".format)
def test_each_device_gets_the_tokens_before_its_span(count):
    """Spans of 2 tokens; also of more than one device, and of more than there are."""
    tokens = jnp.arange(1, 17).reshape(1, 16, 1)
    mesh = make_mesh(MeshConfig(sequence=8))
    spec = P(None, "sequence")
    run = jax.shard_map(
        lambda x: with_previous_tokens(x, count), mesh=mesh, in_specs=spec, out_specs=spec
    )
    padded = np.pad(np.arange(1, 17), (count, 0))
    expected = np.concatenate([padded[i : i + count + 2] for i in range(0, 16, 2)])
    np.testing.assert_array_equal(jax.jit(run)(tokens)[0, :, 0], expected)
