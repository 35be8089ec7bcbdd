"""The kernels of the short convolution on a CPU: in GPU interpret mode, and lowered for CUDA."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gdn2_jax.layers import Attention, GatedDeltaNet2, ShortConvolution
from gdn2_jax.ops import choice
from gdn2_jax.ops import short_convolution as operator
from gdn2_jax.ops.short_convolution import short_convolution_by_kernels
from gdn2_jax.pallas.mosaic import interpret_mode
from gdn2_jax.pallas.short_convolution import TOKENS, convolve, convolve_backward
from gdn2_jax.parallel import MeshConfig, make_mesh, on_mesh


def inputs(rows=1, length=2 * TOKENS, channels=128):
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = (jax.random.normal(key, (rows, length, channels), jnp.bfloat16) for key in keys[:2])
    kernel = jax.random.uniform(keys[2], (rows, 4, channels), minval=-0.5, maxval=0.5)
    return x, kernel, dy


def definition(x, kernel, *, unit):
    """In NumPy's order: a tap after the other, in the arrays' dtype."""
    length = x.shape[1]
    past = jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
    y = jax.nn.silu(sum(kernel[:, i, None] * past[:, i : i + length] for i in range(4)))
    heads = y.reshape(*x.shape[:2], -1, 128)
    lengths = jnp.sqrt(jnp.sum(heads**2, -1, keepdims=True) + 1e-6)
    return (heads / lengths).reshape(x.shape) if unit else y


def assert_close(actual, expected, tolerance):
    error = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    assert error <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("unit", [True, False])
def test_kernels_match_the_definition_with_all_gradients_and_without_races(unit):
    x, kernel, dy = inputs()
    with interpret_mode(detect_races=True):
        y = convolve(x, kernel, unit=unit)
        gradients = convolve_backward(x, kernel, dy, unit=unit)
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in (x, kernel, dy)]
        expected, pullback = jax.vjp(functools.partial(definition, unit=unit), *wide[:2])
        expected = [np.asarray(array) for array in (expected, *pullback(wide[2]))]
    # Of rounding once to bfloat16, and of float32.
    for actual, exact, tolerance in zip((y, *gradients), expected, (2e-3, 2e-3, 1e-6)):
        assert_close(actual, exact, tolerance)


def test_mapped_rows_are_rows_and_their_gradients():
    x, kernel, dy = inputs(rows=2, length=TOKENS, channels=128)

    def run(x, dy):
        y, pullback = jax.vjp(functools.partial(short_convolution_by_kernels, 128), x, kernel[0])
        return y, *pullback(dy)

    with interpret_mode():
        mapped = jax.vmap(run)(x[:, None], dy[:, None])
        expected = run(x, dy)
    for actual, row in zip(mapped[:2], expected):
        np.testing.assert_array_equal(actual[:, 0], row)
    np.testing.assert_allclose(mapped[2].sum(0), expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", [True, False])
def test_kernels_lower_for_cuda(unit):
    x, kernel, dy = inputs()
    for function, arrays in ((convolve, (x, kernel)), (convolve_backward, (x, kernel, dy))):
        lowered = function.trace(*arrays, unit=unit).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    "layer, kernels",
    [
        (ShortConvolution(), 1),
        (ShortConvolution(implementation="xla"), 0),
        (GatedDeltaNet2(num_heads=1, head_dim=128, dtype=jnp.bfloat16, implementation="xla"), 0),
        (Attention(num_heads=1, conv_size=4, context_length=TOKENS, dtype=jnp.bfloat16), 0),
    ],
)
def test_a_layer_beside_a_hopper_gpu_holds_no_kernel_where_it_names_another_form(
    layer, kernels, monkeypatch
):
    monkeypatch.setattr(choice, "hopper_attached", lambda: True)
    x = jnp.ones((1, TOKENS, 128), jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    lowered = jax.jit(layer.apply).trace(params, x).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == kernels


@pytest.mark.parametrize(("documents", "kernels"), [(False, 1), (True, 0)])
def test_a_decoding_layer_holds_a_kernel_for_pieces_of_one_document(
    documents, kernels, monkeypatch
):
    monkeypatch.setattr(choice, "hopper_attached", lambda: True)
    x = jax.ShapeDtypeStruct((2, TOKENS, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, TOKENS), jnp.int32) if documents else None
    layer = ShortConvolution(unit_dim=128, decode=True)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    advance = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
    lowered = advance.trace(variables, x, ids).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == kernels


def test_a_piece_by_the_kernel_goes_on_where_the_one_before_ended(monkeypatch):
    def kernels_alone(forms, *arrays):
        return forms["pallas"](*arrays)

    x, kernel, _ = inputs(rows=2, length=3 * TOKENS)
    layer = ShortConvolution(unit_dim=128)
    variables = {"params": {"kernel": kernel[0]}}
    # The first row's text begins in the middle of the first piece.
    ids = jnp.ones((2, TOKENS), int).at[0, : TOKENS - 2].set(0)
    following = jnp.concatenate([ids, jnp.ones((2, 2 * TOKENS), int)], axis=1)
    expected = layer.apply(variables, x, following)
    decoder = functools.partial(layer.clone(decode=True).apply, mutable=["cache"])
    outputs, cache = decoder(variables, x[:, :TOKENS], ids)
    outputs = [outputs]
    monkeypatch.setattr(operator, "fastest", kernels_alone)
    with interpret_mode():
        for start in (TOKENS, 2 * TOKENS):
            y, cache = decoder(variables | cache, x[:, start : start + TOKENS])
            outputs.append(y)
    difference = jnp.concatenate(outputs, axis=1).astype(float) - expected.astype(float)
    # Both are rounded to bfloat16.
    assert jnp.abs(difference).max() <= 2**-8 * jnp.abs(expected).max()


def test_on_a_mesh_each_device_runs_the_kernels_on_its_rows_and_heads(monkeypatch):
    monkeypatch.setattr(choice, "hopper_attached", lambda: True)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    x = jax.ShapeDtypeStruct(
        (2, TOKENS, 256),
        jnp.bfloat16,
        sharding=NamedSharding(mesh, PartitionSpec("data", None, "tensor")),
    )
    layer = ShortConvolution(unit_dim=128)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)

    def gradients(params, x):
        with on_mesh(mesh):
            return jax.value_and_grad(lambda *a: jnp.sum(layer.apply(*a)))(params, x)

    lowered = jax.jit(gradients).trace(params, x).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu") == 2
    assert "tensor<1x32x128xbf16>" in lowered


def test_gradients_on_a_mesh_are_those_of_one_device():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    layer = ShortConvolution(unit_dim=4)
    x, d = (jax.random.normal(jax.random.key(i), (2, 6, 8)) for i in range(2))
    params = layer.init(jax.random.key(2), x)

    def gradients(params, x):
        return jax.grad(lambda *a: jnp.sum(d * layer.apply(*a)), argnums=(0, 1))(params, x)

    expected = jax.jit(gradients)(params, x)
    on_devices = jax.device_put((params, x), NamedSharding(mesh, PartitionSpec()))
    with on_mesh(mesh):
        actual = jax.jit(gradients)(*on_devices)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
