import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gdn2_jax.models import Batch, LanguageModel, next_token_loss
from gdn2_jax.models.loss import cross_entropy


def operands(batch, length, vocab, dtype, width=6):
    # NumPy's: jnp would compile each small operation.
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(batch, length, width)), 3 * rng.normal(size=(width, vocab))
    targets = rng.integers(0, vocab, (batch, length), np.int32)
    weights = rng.uniform(size=(batch, length))
    hidden, kernel, weights = (x.astype(jnp.dtype(dtype)) for x in (hidden, kernel, weights))
    return hidden, kernel, targets, weights


def by_optax(hidden, kernel, targets, weights):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, targets)
    return jnp.sum(losses * weights)


@functools.cache
def with_gradients(function):
    return jax.jit(jax.value_and_grad(lambda *a: 3 * function(*a), argnums=(0, 1, 3)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-13)])
@pytest.mark.parametrize("blocks", [1, 4, 16])
def test_loss_and_gradients_are_optaxs_whether_the_blocks_divide_the_length(
    dtype, tolerance, blocks
):
    with jax.enable_x64(dtype == "float64"):
        arguments = operands(2, 10, 31, dtype)
        actual = with_gradients(functools.partial(cross_entropy, blocks))(*arguments)
        expected = with_gradients(by_optax)(*arguments)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
        loss = jax.jit(functools.partial(cross_entropy, blocks))(*arguments)
        np.testing.assert_allclose(3 * loss, expected[0], rtol=tolerance)


def test_logits_of_narrow_inputs_are_not_rounded():
    hidden, kernel, targets, weights = operands(2, 32, 500, "bfloat16")
    actual = with_gradients(functools.partial(cross_entropy, 4))(hidden, kernel, targets, weights)
    with jax.enable_x64(True):
        exact = (x.astype(np.float64) for x in (hidden, kernel))
        exact = with_gradients(by_optax)(*exact, targets, weights.astype(np.float64))
    np.testing.assert_allclose(actual[0], exact[0], rtol=1e-6)
    for a, b, bound in zip(actual[1], exact[1], (4e-3, 4e-3, 4e-3), strict=True):
        assert a.dtype == jnp.bfloat16
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.linalg.norm(a - b) < bound * np.linalg.norm(b)


def test_gradient_of_wide_parameters_adds_up_in_float32():
    hidden, kernel, targets, weights = operands(8, 512, 7, "bfloat16")
    wide = kernel.astype(np.float32), targets, weights.astype(np.float32)
    gradient = jax.jit(jax.grad(functools.partial(cross_entropy, 64), argnums=1))(hidden, *wide)
    exact = np.asarray(jax.jit(jax.grad(by_optax, argnums=1))(hidden.astype(np.float32), *wide))
    assert gradient.dtype == jnp.float32
    # The rounding of d logits to bfloat16 averages out over tokens; that of sums would not.
    assert np.linalg.norm(gradient - exact) < 1e-3 * np.linalg.norm(exact)


def test_memory_is_that_of_a_block_of_logits():
    def temporary(function, *arguments):
        return with_gradients(function).lower(*arguments).compile().memory_analysis()

    arguments = operands(4, 256, 4000, "float32", width=8)
    logits = 4 * 256 * 4000 * 4
    plain = temporary(by_optax, *arguments).temp_size_in_bytes
    blocked = temporary(functools.partial(cross_entropy, 8), *arguments).temp_size_in_bytes
    assert plain > logits
    assert blocked < logits / 2


@pytest.mark.parametrize(
    ("axes", "rows", "columns"),
    [
        ({"data": 8}, PartitionSpec("data"), PartitionSpec()),
        ({"sequence": 8}, PartitionSpec(None, "sequence"), PartitionSpec()),
        ({"data": 2, "tensor": 4}, PartitionSpec("data"), PartitionSpec(None, "tensor")),
    ],
)
def test_split_arrays_stay_split(axes, rows, columns):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))
    arguments = operands(8, 64, 32, "float32")
    placed = [
        jax.device_put(x, NamedSharding(mesh, columns if x.shape == (6, 32) else rows))
        for x in arguments
    ]
    function = with_gradients(functools.partial(cross_entropy, 4))
    compiled = function.lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    assert "all-to-all" not in compiled.as_text()
    actual, expected = compiled(*placed), with_gradients(by_optax)(*arguments)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_loss_of_a_model_is_that_of_its_logits(hybrid_model):
    config, params = hybrid_model
    inputs, targets = jax.random.randint(jax.random.key(3), (2, 2, 9), 0, 31)
    segment_ids = jnp.array([[1] * 9, [1] * 4 + [2] * 5])
    weights = jnp.ones((2, 9)).at[1, 6:].set(0)
    batch = Batch(inputs, targets, weights, segment_ids)

    def plain(params):
        logits = LanguageModel(config).apply({"params": params}, inputs, segment_ids)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * weights)

    actual = jax.jit(jax.value_and_grad(functools.partial(next_token_loss, config)))(params, batch)
    expected = jax.jit(jax.value_and_grad(plain))(params)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_a_token_without_weight_may_be_nan():
    hidden, kernel, targets, weights = operands(2, 10, 31, "float32")
    weights[:, 3] = 0
    function = with_gradients(functools.partial(cross_entropy, 4))
    expected = function(hidden, kernel, targets, weights)
    poisoned = hidden.copy()
    poisoned[:, 3] = np.nan
    loss, (d_hidden, d_kernel, _) = function(poisoned, kernel, targets, weights)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    np.testing.assert_allclose(d_hidden, expected[1][0], atol=1e-6)
    np.testing.assert_allclose(d_kernel, expected[1][1], atol=1e-6)
