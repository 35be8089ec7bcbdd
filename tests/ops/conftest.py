import jax
import jax.numpy as jnp
import numpy as np
import pytest


def draw_log_decay(rng, shape, regime):
    """Log-decays as in training, or from 0 to -1000 mixed, or all strong."""
    if regime == "gentle":
        return -np.exp(rng.uniform(-6, 0, shape))
    if regime == "mixture":
        return rng.choice([0.0, -1e-4, -0.05, -5.0, -50.0, -1000.0], shape)
    return np.full(shape, float(regime))


@pytest.fixture
def log_decay():
    return draw_log_decay


def _outputs_and_gradients(fn, arguments):
    outputs, pullback = jax.vjp(fn, *arguments)
    rng = np.random.default_rng(7)
    cotangents = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), outputs)
    return {"outputs": outputs, "gradients": pullback(cotangents)}


@pytest.fixture
def assert_same():
    """A function that compares two functions' outputs and all gradients, tensor by tensor.

    `reference` runs in float64 on the values of `arguments`; errors are relative (Frobenius norm),
    absolute where the reference is zero.
    """

    def compare(fn, reference, arguments, bound):
        double = all(x.dtype == jnp.float64 for x in jax.tree.leaves(arguments))
        with jax.enable_x64(double):
            results = jax.jit(lambda a: _outputs_and_gradients(fn, a))(arguments)
        for result, x in zip(jax.tree.leaves(results["gradients"]), jax.tree.leaves(arguments)):
            assert result.dtype == x.dtype
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(np.float64)), arguments)
            expected = jax.jit(lambda a: _outputs_and_gradients(reference, a))(wide)
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(results), jax.tree.leaves(expected), strict=True
        )
        for (path, value), target in pairs:
            target = np.asarray(target)
            norm = np.linalg.norm(target) or 1.0
            error = np.linalg.norm(np.asarray(value).astype(np.float64) - target) / norm
            assert error <= bound, (jax.tree_util.keystr(path), error)

    return compare
