"""NumPy's arrays are taken as jnp takes them."""

import jax
import jax.numpy as jnp
import numpy as np

SEGMENT_IDS = np.asarray([[0, 1, 1]], np.int64)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_64_bit_numpy_arrays_become_32_bit_ones(operator):
    run, step, tokens, state = operator(1, 3)
    outputs, final_state = run(wide(tokens), wide(state), SEGMENT_IDS, "recurrent")
    token = {name: x[:, 0] for name, x in tokens.items()}
    next_state, output = step(wide(state), wide(token))
    for x in jax.tree.leaves((outputs, final_state, next_state, output)):
        assert x.dtype == jnp.float32
