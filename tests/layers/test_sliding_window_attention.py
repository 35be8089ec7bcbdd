import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.layers import Attention, SlidingWindowAttention
from gdn2_jax.layers.softmax_attention import KVCache, after_cache, apply_rotary, local_attention

HEADS, WIDTH, WINDOW = 2, 16, 4


@pytest.fixture
def make(random_params):
    def build(x, **options):
        layer = SlidingWindowAttention(**{"num_heads": HEADS, "window_size": WINDOW} | options)
        return layer, random_params(layer, x)

    return build


def inputs(*shape):
    # NumPy's: jnp would compile each slice.
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def reference(params, x, window, theta, segment_ids):
    """One row, one query and one head at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    steps, width = x.shape
    q, k, v = ((x @ p[f"{name}_proj"]["kernel"]).reshape(steps, HEADS, -1).copy() for name in "qkv")
    half = q.shape[-1] // 2
    for t in range(steps):
        for i in range(half):
            c, s = np.cos(t * theta ** (-i / half)), np.sin(t * theta ** (-i / half))
            for u in (q, k):
                first, second = u[t, :, i].copy(), u[t, :, i + half].copy()
                u[t, :, i] = first * c - second * s
                u[t, :, i + half] = second * c + first * s
    o = np.zeros_like(v)
    for t in range(steps):
        seen = [s for s in range(max(0, t - window + 1), t + 1) if segment_ids[s] == segment_ids[t]]
        for h in range(HEADS):
            scores = k[seen, h] @ q[t, h] / np.sqrt(2 * half)
            weights = np.exp(scores - scores.max())
            o[t, h] = weights / weights.sum() @ v[seen, h]
    return o.reshape(steps, width) @ p["o_proj"]["kernel"]


@pytest.mark.parametrize(
    ("length", "documents"), [*((n, False) for n in (1, 3, 4, 5, 8, 11)), (5, True), (11, True)]
)
def test_layer_equals_attention_written_out(make, length, documents):
    x = inputs(1, length, WIDTH)
    layer, params = make(x, rope_theta=100.0)
    segment_ids = np.array([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3])[None, :length] * documents
    actual = jax.jit(layer.apply)({"params": params}, x, segment_ids if documents else None)
    expected = reference(params, np.asarray(x[0]), WINDOW, 100.0, segment_ids[0])
    np.testing.assert_allclose(actual[0], expected, atol=1e-5)


@pytest.mark.parametrize("length", [7, 8, 64])
def test_a_query_sees_exactly_the_keys_of_its_window(length):
    window = 7
    q, k, v = (inputs(1, length, 1, 4) for _ in range(3))
    attention = functools.partial(local_attention, window_size=window)
    seen = jax.jit(jax.jacobian(lambda v: attention(q, k, v).sum((0, 2, 3))))(v)
    seen = jnp.any(seen[:, 0, :, 0] != 0, axis=-1)
    distances = jnp.arange(length)[:, None] - jnp.arange(length)
    np.testing.assert_array_equal(seen, (distances >= 0) & (distances <= window - 1))


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = inputs(1, 1, 1, 8), inputs(1, 1, 1, 8)[..., ::-1]

    def score(position, distance):
        return jnp.vdot(
            apply_rotary(q, jnp.array([[position]]), 10.0),
            apply_rotary(k, jnp.array([[position - distance]]), 10.0),
        )

    np.testing.assert_allclose(score(3, 2), score(50, 2), rtol=1e-4)
    assert abs(score(3, 2) - score(3, 1)) > 1e-3


def test_gradients_through_blocks_equal_those_of_dense_attention():
    q, k, v = inputs(3, 2, 11, HEADS, 8)
    distances = jnp.arange(11)[:, None] - jnp.arange(11)
    mask = ((distances >= 0) & (distances < WINDOW))[None, None]

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    def loss(attention):
        return lambda *args: jnp.sum(jnp.square(attention(*args)))

    blocks = functools.partial(local_attention, window_size=WINDOW)
    actual = jax.jit(jax.grad(loss(blocks), argnums=(0, 1, 2)))(q, k, v)
    expected = jax.jit(jax.grad(loss(dense), argnums=(0, 1, 2)))(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), actual, expected)


@pytest.mark.parametrize("documents", [False, True])
def test_decoding_equals_the_full_forward(make, documents):
    x = inputs(2, 23, WIDTH)
    layer, params = make(x)
    segment_ids = None
    if documents:
        segment_ids = np.array([[1] * 5 + [2] * 18, [1] * 6 + [2] + [3] * 9 + [4] * 7])
    full = jax.jit(layer.apply)({"params": params}, x, segment_ids)
    decoder = layer.clone(decode=True)
    run = jax.jit(lambda *args: decoder.apply(*args, mutable=["cache"]))
    abstract = jax.eval_shape(decoder.init, jax.random.key(0), x[:, :1])["cache"]
    variables = {"params": params, "cache": jax.tree.map(jnp.zeros_like, abstract)}
    # Prefills shorter and longer than the window, steps that go round the ring.
    for start, stop in [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7), (7, 17), (17, 18), (18, 23)]:
        ids = None if segment_ids is None else segment_ids[:, start:stop]
        y, cache = run(variables, x[:, start:stop], ids)
        np.testing.assert_allclose(y, full[:, start:stop], atol=1e-5)
        variables = {"params": params, **cache}
    assert variables["cache"]["key"].shape == (2, WINDOW, HEADS, WIDTH // HEADS)
    np.testing.assert_array_equal(variables["cache"]["index"], [23, 23])


@pytest.mark.parametrize(
    ("layer_type", "size"), [(SlidingWindowAttention, "window_size"), (Attention, "context_length")]
)
def test_decoding_is_as_exact_after_any_number_of_tokens(random_params, layer_type, size):
    x = inputs(1, 12, WIDTH)
    # No power of two, so that the ring does not fit into 2^31 a whole number of times.
    layer = layer_type(num_heads=HEADS, decode=True, **{size: 6})
    params = random_params(layer, x)
    expected = jax.jit(layer.clone(decode=False).apply)({"params": params}, x[:, :6])
    run = jax.jit(lambda *args: layer.apply(*args, mutable=["cache"]))
    empty = jax.tree.map(jnp.zeros_like, jax.eval_shape(run, {"params": params}, x[:, :1])[1])

    def decode(index):
        cache = {"cache": empty["cache"] | {"index": jnp.full_like(empty["cache"]["index"], index)}}
        outputs = []
        for start, stop in [(0, 3), *((t, t + 1) for t in range(3, 12))]:
            # The empty ring counts as tokens of another document.
            ids = np.ones((1, stop - start), np.int32)
            y, cache = run({"params": params, **cache}, x[:, start:stop], ids)
            outputs.append(y)
        return np.concatenate(outputs, axis=1), int(cache["cache"]["index"][0])

    outputs, _ = decode(0)
    np.testing.assert_allclose(outputs[:, :6], expected, atol=1e-5)
    for index in (10**6, 10**7, 2**31 - 2):
        later, stop = decode(index)
        np.testing.assert_allclose(later, outputs, atol=2e-6)
        assert stop == index + 12 or 2**30 <= stop < 2**31


@pytest.mark.parametrize("theta", [10.0, 1e4, 5e5])
def test_angles_are_those_of_float64_at_any_position(theta):
    x = inputs(1, 4, 1, 16)
    positions = np.array([1, 2047, 65_536, 131_071])
    angles = positions[:, None] * theta ** (-np.arange(8) / 8)
    turned = apply_rotary(x, jnp.array(positions)[None], theta)
    expected = np.concatenate(
        [
            x[0, :, 0, :8] * np.cos(angles) - x[0, :, 0, 8:] * np.sin(angles),
            x[0, :, 0, 8:] * np.cos(angles) + x[0, :, 0, :8] * np.sin(angles),
        ],
        axis=-1,
    )
    error = np.abs(turned[0, :, 0] - expected).max(-1)
    assert np.all(error < np.abs(x).max() * (1e-6 + positions * 2 * np.pi * 2.0**-31))


@pytest.mark.parametrize("length", [1, 3, 6, 17])
def test_attention_that_knows_no_cache_gives_that_after_a_cache(length):
    held, size = np.array([0, 2, 6]), 6
    q, k, v = inputs(3, 3, length, HEADS, 8)
    slot = np.arange(size)[None]
    age = (np.array([[0], [5], [2]]) - 1 - slot) % size
    positions = np.where(age < held[:, None], -1 - age, -size - 1)
    kept = np.where((age < held[:, None])[..., None, None], inputs(2, 3, size, HEADS, 8), np.nan)
    ids = np.zeros((3, size), np.int32)
    attention = functools.partial(local_attention, window_size=size)
    actual = jax.jit(functools.partial(after_cache, attention))(
        q, k, v, KVCache(*kept, ids, positions)
    )
    expected = jax.jit(attention)(q, k, v, cache=KVCache(*np.nan_to_num(kept), ids, positions))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_pieces_through_the_call_of_cudnn_equal_the_full_forward(make, monkeypatch):
    attention, calls = jax.nn.dot_product_attention, []

    def by_xla(*arrays, implementation, **options):
        calls.append(arrays[0].shape[1] if implementation == "cudnn" else 0)
        return attention(*arrays, implementation="xla", **options)

    x = inputs(2, 23, WIDTH)
    layer, params = make(x, dtype=jnp.bfloat16)
    # The second row begins with padding.
    segment_ids = np.array([[1] * 23, [0] * 3 + [1] * 20])
    full = np.asarray(jax.jit(layer.apply)({"params": params}, x, segment_ids), np.float32)
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cuda, default: cuda(*arrays))
    decoder = jax.jit(functools.partial(layer.clone(decode=True).apply, mutable=["cache"]))
    variables = {"params": params}
    for start, stop in [(0, 5), (5, 6), (6, 8), (8, 23)]:
        ids = None if start else segment_ids[:, :stop]
        y, cache = decoder(variables, x[:, start:stop], ids)
        error = np.abs(np.asarray(y, np.float32) - full[:, start:stop])
        assert error.max() <= 2**-7 * np.abs(full).max()
        variables = {"params": params, **cache}
    assert [length for length in calls if length] == [WINDOW + 2, WINDOW + 15]


def test_what_was_before_the_last_document_does_not_reach_what_follows(make):
    x = inputs(1, 9, WIDTH)
    layer, params = make(x, window_size=16)
    advance = jax.jit(functools.partial(layer.clone(decode=True).apply, mutable=["cache"]))
    ids = np.array([[1, 2, 1]])
    _, cache = advance({"params": params}, x[:, :3] * [[[np.nan], [np.inf], [1]]], ids)
    y, _ = advance({"params": params, **cache}, x[:, 3:])
    # A document ends where another begins, though its number comes again.
    expected = jax.jit(layer.apply)({"params": params}, x[:, 2:])[:, 1:]
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_memory_grows_linearly_with_the_length():
    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        gradient = jax.grad(lambda q, k, v: local_attention(q, k, v, 64).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2.5 * temporary_bytes(2048)


@pytest.mark.parametrize(
    ("dtype", "documents", "expected"),
    [
        (jnp.bfloat16, False, 2),
        (jnp.float16, False, 2),
        (jnp.float32, False, 0),
        (jnp.bfloat16, True, 0),
    ],
)
def test_gpu_lowering_calls_cudnn_where_it_can(monkeypatch, dtype, documents, expected):
    # This host has no GPU, so that cuDNN's version has to be made up.
    name = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(name, lambda: 91000)
    x = jax.ShapeDtypeStruct((1, 512, 2, 64), dtype)
    segment_ids = jnp.zeros((1, 512), jnp.int32) if documents else None

    def loss(q, k, v):
        return local_attention(q, k, v, 128, segment_ids).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
    calls = re.findall(r"__cudnn\$fmha\w+", traced.lower(lowering_platforms=("cuda",)).as_text())
    assert len(calls) == expected  # forward and backward
    assert "__cudnn" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(
    ("length", "documents", "expected"), [(512, False, 1), (512, True, 0), (8, False, 0)]
)
def test_a_decoding_layer_calls_cudnn_on_long_pieces_of_one_document(
    monkeypatch, length, documents, expected
):
    name = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(name, lambda: 91000)
    layer = SlidingWindowAttention(
        num_heads=2, window_size=128, dtype=jnp.bfloat16, decode=True, param_dtype=jnp.bfloat16
    )
    x = jax.ShapeDtypeStruct((2, length, 128), jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32) if documents else None
    advance = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
    text = advance.trace(variables, x, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"__cudnn\$fmha\w+", text)) == expected


def test_a_head_width_that_cudnn_does_not_serve_lowers_for_gpus_all_the_same(monkeypatch):
    name = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(name, lambda: 91000)
    x = jax.ShapeDtypeStruct((1, 32, 2, 6), jnp.bfloat16)
    traced = jax.jit(functools.partial(local_attention, window_size=8)).trace(x, x, x)
    assert "__cudnn" not in traced.lower(lowering_platforms=("cuda",)).as_text()
