"""Memory of forward + backward, read off the compiled program; nothing is run."""

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax import gated_delta_rule_2


def sizes(length, heads=4, dim=128):
    """Bytes of the inputs and of the temporaries of forward + backward, B=1, bf16."""
    low = jax.ShapeDtypeStruct((1, length, heads, dim), jnp.bfloat16)
    g = jax.ShapeDtypeStruct(low.shape, jnp.float32)

    def fn(arrays, cotangent):
        outputs, pullback = jax.vjp(
            lambda *x: gated_delta_rule_2(*x, implementation="xla")[0], *arrays
        )
        return outputs, pullback(cotangent)

    inputs = (low, low, low, g, low, low)
    compiled = jax.jit(fn).lower(inputs, low).compile()
    bytes_in = sum(x.size * x.dtype.itemsize for x in inputs)
    return bytes_in, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_temporaries_of_forward_and_backward_are_a_few_times_the_inputs_and_linear_in_time():
    bytes_in, temporary = sizes(4096)
    assert temporary < 6 * bytes_in
    _, twice = sizes(8192)
    assert twice < 2.1 * temporary
