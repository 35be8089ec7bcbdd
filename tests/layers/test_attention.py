import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn2_jax.layers.softmax_attention as module
from gdn2_jax.layers import Attention, SlidingWindowAttention

HEADS, WIDTH = 2, 16


@pytest.fixture
def make(random_params):
    def build(x, **options):
        layer = Attention(**{"num_heads": HEADS, "context_length": 16} | options)
        return layer, random_params(layer, x)

    return build


@pytest.fixture(params=[4, 512])
def queries_at_once(request, monkeypatch):
    monkeypatch.setattr(module, "_QUERIES_AT_ONCE", request.param)


def inputs(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), shape, dtype)


def reference(params, x, segment_ids, theta=10000.0):
    """One row [T, D], all pairs of a query and a key at once."""
    steps, width = x.shape
    half = width // HEADS // 2
    t = np.arange(steps)
    same = segment_ids[:, None] == segment_ids

    def projected(name):
        y = x @ params[f"{name}_proj"]["kernel"]
        if f"{name}_conv1d" in params:
            taps = params[f"{name}_conv1d"]["kernel"][::-1]
            seen = [((t >= lag) & same[t, t - lag])[:, None] for lag in range(len(taps))]
            terms = (tap * y[t - lag] * seen[lag] for lag, tap in enumerate(taps))
            y = jax.nn.silu(sum(terms))
        return y.reshape(steps, HEADS, -1)

    def rotated(u):
        angles = (t[:, None] * theta ** (-np.arange(half) / half))[:, None]
        first, second = u[..., :half], u[..., half:]
        turned = (
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        )
        return jnp.concatenate(turned, -1)

    q, k, v = (projected(name) for name in "qkv")
    scores = jnp.einsum("thc,shc->hts", rotated(q), rotated(k)) / math.sqrt(2 * half)
    shares = jax.nn.softmax(jnp.where(same & (t[:, None] >= t), scores, -jnp.inf))
    return jnp.einsum("hts,shc->thc", shares, v).reshape(steps, width) @ params["o_proj"]["kernel"]


def value_and_gradients(function, *args):
    y, pull = jax.vjp(function, *args)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


@functools.partial(jax.jit, static_argnums=0)
def expected_results(segment_ids, params, x):
    return value_and_gradients(lambda p, x: reference(p, x, np.array(segment_ids)), params, x)


@pytest.mark.parametrize(
    ("documents", "conv_size", "dtype", "bound"),
    [(False, None, "float64", 1e-10), (True, 3, "float64", 1e-10), (True, 3, "float32", 2e-5)],
)
def test_outputs_and_gradients_are_those_of_the_equations(
    make, queries_at_once, documents, conv_size, dtype, bound
):
    segment_ids = np.array([0, 0, 1, 1, 1, 2, 3]) * documents
    with jax.enable_x64(True):
        x = inputs(7, WIDTH, dtype=dtype)
        layer, params = make(x[None], dtype=dtype, param_dtype=dtype, conv_size=conv_size)

        def run(params, x):
            ids = segment_ids[None] if documents else None
            return layer.apply({"params": params}, x[None], ids)[0]

        actual = jax.jit(lambda *args: value_and_gradients(run, *args))(params, x)
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))
        expected = expected_results(tuple(segment_ids.tolist()), *wide)

        def compare(a, e):
            assert np.linalg.norm(a - e) <= bound * np.linalg.norm(e)

        jax.tree.map(compare, actual, expected)


def test_outputs_are_those_of_a_window_as_long_as_the_sequence(make, queries_at_once):
    x = inputs(2, 11, WIDTH)
    layer, params = make(x)
    window = SlidingWindowAttention(num_heads=HEADS, window_size=11)
    np.testing.assert_allclose(
        jax.jit(layer.apply)({"params": params}, x),
        jax.jit(window.apply)({"params": params}, x),
        atol=1e-5,
    )


@pytest.mark.parametrize(("documents", "conv_size"), [(False, None), (True, 3)])
def test_decoding_equals_the_full_forward_while_the_cache_has_room(
    make, monkeypatch, documents, conv_size
):
    """In blocks; test_every_layer decodes in one."""
    monkeypatch.setattr(module, "_QUERIES_AT_ONCE", 4)
    x = inputs(2, 15, WIDTH)
    layer, params = make(x, conv_size=conv_size)
    segment_ids = None
    if documents:
        segment_ids = jnp.array([[1] * 5 + [2] * 10, [1] * 6 + [2] + [3] * 8])
    full = jax.jit(layer.apply)({"params": params}, x, segment_ids)
    decoder = layer.clone(decode=True)
    run = jax.jit(lambda *args: decoder.apply(*args, mutable=["cache"]))
    variables = {"params": params}
    for start, stop in [(0, 6), (6, 7), (7, 13), (13, 14), (14, 15)]:
        ids = None if segment_ids is None else segment_ids[:, start:stop]
        y, cache = run(variables, x[:, start:stop], ids)
        np.testing.assert_allclose(y, full[:, start:stop], atol=1e-5)
        variables = {"params": params, **cache}
    assert variables["cache"]["key"].shape == (2, 16, HEADS, WIDTH // HEADS)


def test_a_full_cache_forgets_the_oldest_token(make):
    x = inputs(1, 9, WIDTH)
    layer, params = make(x, context_length=4)
    window = SlidingWindowAttention(num_heads=HEADS, window_size=4)
    expected = jax.jit(window.apply)({"params": params}, x)
    variables = {"params": params}
    decoder = layer.clone(decode=True)
    step = jax.jit(lambda *args: decoder.apply(*args, mutable=["cache"]))
    for t in range(9):
        y, cache = step(variables, x[:, t : t + 1])
        np.testing.assert_allclose(y, expected[:, t : t + 1], atol=1e-5)
        variables = {"params": params, **cache}


def test_memory_grows_linearly_with_the_length():
    layer = Attention(num_heads=1)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, 8)))

    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        gradient = jax.grad(lambda x, params: layer.apply(params, x).sum())
        return jax.jit(gradient).lower(x, params).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2.5 * temporary_bytes(2048)


@pytest.mark.parametrize(("dtype", "calls"), [(jnp.bfloat16, 2), (jnp.float32, 0)])
def test_gpu_lowering_calls_cudnn_where_it_can(monkeypatch, dtype, calls):
    # This host has no GPU, so that cuDNN's version has to be made up.
    name = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(name, lambda: 91000)
    layer = Attention(num_heads=2, dtype=dtype)
    x = jax.ShapeDtypeStruct((1, 1024, 128), dtype)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda p, x: layer.apply(p, x).astype(jnp.float32).sum()))
    text = gradient.trace(params, x).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"__cudnn\$fmha\w+", text)) == calls  # forward and backward
