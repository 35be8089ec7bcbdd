"""What holds for every layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import GatedDeltaNet2
from gdn2_jax.layers import (
    Attention,
    GatedDeltaNet,
    KimiDeltaAttention,
    Mamba2,
    Mamba3,
    SlidingWindowAttention,
)

ATTENTION = {
    "attention": functools.partial(Attention, context_length=16),
    "attention_conv": functools.partial(Attention, context_length=16, conv_size=3),
    "sliding_window_attention": functools.partial(SlidingWindowAttention, window_size=4),
}
RECURRENT = {
    "gdn2": functools.partial(GatedDeltaNet2, num_value_heads=4, head_dim=4),
    "kda": functools.partial(KimiDeltaAttention, num_value_heads=4, head_dim=4),
    "gdn": functools.partial(GatedDeltaNet, head_dim=4),
    "deltanet": functools.partial(GatedDeltaNet, head_dim=4, use_decay=False),
    "gated_deltaproduct": functools.partial(
        GatedDeltaNet, num_value_heads=4, head_dim=4, num_householder=3
    ),
    "mamba2": functools.partial(Mamba2, head_dim=4, state_dim=4),
    "mamba3": functools.partial(Mamba3, head_dim=4, state_dim=4),
    "mamba3_mimo": functools.partial(Mamba3, head_dim=4, state_dim=4, mimo_rank=2),
}
LAYERS = {
    **RECURRENT,
    "gdn2-bounded": functools.partial(
        GatedDeltaNet2, head_dim=4, decay_lower_bound=-5.0, use_short_conv=False
    ),
    **ATTENTION,
}
# One of each class; two of Mamba3, whose state has another form with several ranks.
CACHES = ("gdn2", "mamba2", "mamba3", "mamba3_mimo", "attention", "sliding_window_attention")

X = np.random.default_rng(1).normal(size=(2, 12, 8)).astype(np.float32)
# Row 0 changes document between calls of `SPANS` and inside one; row 1 inside one, at a step and after it.
IDS = np.array([[1] * 5 + [2] * 4 + [3] * 3, [1] * 3 + [2] * 3 + [3] * 1 + [4] * 5])
SPANS = [(0, 5), (5, 6), (6, 7), (7, 12)]


def build(name, **options):
    """A small layer; of the recurrence, which compiles fast, where there is a choice."""
    choice = {} if name in ATTENTION else {"implementation": "recurrent"}
    return LAYERS[name](**{"num_heads": 2} | choice | options)


@pytest.fixture
def make(random_params):
    """A small layer and parameters for it, whose gates and norms leave their linear range."""

    def make_layer(name, **options):
        layer = build(name, **options)
        return layer, random_params(layer, X)

    return make_layer


def assert_near(actual, expected, bound=1e-5):
    np.testing.assert_allclose(actual, expected, atol=bound * np.abs(expected).max())


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradient(layer, params, x, cotangent):
    y, pullback = jax.vjp(lambda x: layer.apply({"params": params}, x, IDS), x)
    return y, *pullback(cotangent)


@pytest.mark.parametrize("name", [*RECURRENT, *ATTENTION])
def test_documents_are_sequences_of_their_own_in_one_call_and_across_calls(
    make, apply, decode, name
):
    layer, params = make(name)
    full = apply(layer, params, X, IDS)
    # What follows changes nothing.
    alone = apply(layer, params, np.stack([np.roll(X[0], -5, axis=0), np.roll(X[1], -7, axis=0)]))
    assert_near(full[0, 5:9], alone[0, :4])
    assert_near(full[1, 7:], alone[1, :5])
    actual, cache = decode(layer, params, X, SPANS, IDS)
    assert_near(actual, full)
    if name in RECURRENT:
        np.testing.assert_array_equal(cache["segment_id"], [3, 4])

    cotangent = np.zeros_like(X)
    cotangent[1, 7:] = full[1, 7:]
    _, gradient = jax.device_get(outputs_and_gradient(layer, params, X, cotangent))
    assert np.all(gradient[0] == 0) and np.all(gradient[1, :7] == 0)
    assert np.all(np.any(gradient[1, 7:] != 0, axis=-1))


@pytest.mark.parametrize("name", [*RECURRENT, *ATTENTION])
def test_outputs_depend_on_no_later_token_and_on_no_other_row(make, apply, name):
    layer, params = make(name)
    changed = X.copy()
    changed[0, 5:6] += 1
    before, after = apply(layer, params, X), apply(layer, params, changed)
    np.testing.assert_array_equal(after[0, :5], before[0, :5])
    np.testing.assert_array_equal(after[1], before[1])
    seen = np.any(after[0, 5:] != before[0, 5:], axis=-1)
    assert np.all(seen[: 4 if name == "sliding_window_attention" else None])


@pytest.mark.parametrize("name", ["gdn2", "mamba2", "mamba3", "mamba3_mimo"])
def test_prefill_steps_and_a_second_prefill_equal_the_full_forward(make, apply, decode, name):
    """By the chunkwise form; the recurrence decodes documents above."""
    x = np.random.default_rng(1).normal(size=(2, 80, 8)).astype(np.float32)
    layer, params = make(name, implementation="xla")
    full = apply(layer.clone(implementation="recurrent"), params, x)
    # The second prefill crosses a chunk's end.
    actual, cache = decode(layer, params, x, [(0, 5), (5, 6), (6, 7), (7, 79), (79, 80)])
    assert_near(actual, full, 2e-5)
    assert cache["state"].dtype == jnp.float32
    assert cache["state"].shape == (2, 4 if name == "gdn2" else 2, 4, 4)


@pytest.mark.parametrize("name", CACHES)
def test_init_leaves_a_cache_of_zeros_and_the_first_token_advances_it(apply, advance, name):
    layer, decoder = build(name), build(name, decode=True)
    variables = jax.jit(decoder.init)(jax.random.key(0), X[:, :1])
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(variables["cache"]))
    first, cache = advance(decoder, variables, X[:, :1])
    without, same = advance(decoder, {"params": variables["params"]}, X[:, :1])
    np.testing.assert_array_equal(first, without)
    jax.tree.map(np.testing.assert_array_equal, cache, same)
    assert_near(first, apply(layer, variables["params"], X)[:, :1])
    assert np.any(cache["cache"]["key" if name in ATTENTION else "state"])


@pytest.mark.parametrize("name", CACHES)
def test_decoding_without_segments_continues_the_last_document(make, apply, advance, name):
    layer, params = make(name)
    ids = np.array([[1] * 12, [1] * 3 + [2] * 9])
    full, decoder = apply(layer, params, X, ids), layer.clone(decode=True)
    _, cache = advance(decoder, {"params": params}, X[:, :5], ids[:, :5])
    y, _ = advance(decoder, {"params": params, **cache}, X[:, 5:])
    assert_near(y, full[:, 5:])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bfloat16") for name in ("gdn2", "kda", "gdn", "deltanet", *ATTENTION)),
        ("sliding_window_attention", "float16"),
    ],
)
def test_a_half_precision_layer_has_float32_parameters_and_computes_the_same(
    make, apply, name, dtype
):
    """The operators refuse a log-decay of lower precision than float32."""
    layer, params = make(name, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    y, wide = apply(layer, params, X), apply(layer.clone(dtype="float32"), params, X)
    assert y.dtype == dtype
    assert_near(y.astype("float32"), wide, 0.05)


# Of deltanet, gdn does all.
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "deltanet"])
def test_no_layer_relies_on_rank_promotion(name):
    """The operators' chunkwise forms are traced in tests/ops."""
    x = jnp.ones((2, 6, 8))
    segment_ids = jnp.asarray([[0] * 4 + [1] * 2] * 2)

    def loss(layer, variables, x):
        return jnp.sum(layer.apply(variables, x, segment_ids))

    with jax.numpy_rank_promotion("raise"):
        decoder = build(name, decode=True)
        # With one token, as in decoding.
        variables = jax.eval_shape(decoder.init, jax.random.key(0), x[:, :1], segment_ids[:, :1])
        jax.eval_shape(functools.partial(decoder.apply, mutable="cache"), variables, x, segment_ids)
        params = {"params": variables["params"]}
        layer = build(name)
        jax.eval_shape(jax.grad(functools.partial(loss, layer), (0, 1)), params, x)


MALFORMED = {
    "gdn2": [
        *(("num_heads", 0), ("head_dim", 0), ("conv_size", 0), ("num_value_heads", 3)),
        *(("expand_v", 0.3), ("erase_gate", "head"), ("write_gate", "head")),
        *(("decay_lower_bound", -6.0), ("decay_lower_bound", 0.0), ("output_gate", "swish")),
        *(("state_rounding", "up"), ("implementation", "cuda")),
    ],
    "kda": [("num_value_heads", 3), ("decay_lower_bound", -6.0), ("output_gate", "swish")],
    "gdn": [("num_heads", 0), ("output_gate", "swish"), ("num_householder", 0)],
    "mamba2": [
        *(("num_heads", 0), ("state_dim", 0), ("conv_size", 0), ("num_groups", 3)),
        ("implementation", "cuda"),
    ],
    "mamba3": [
        *(("head_dim", 0), ("num_groups", 3), ("state_dim", 7), ("mimo_rank", 0)),
        *(("rotary_fraction", 0.1), ("rotary_fraction", 1.5), ("decay_activation", "relu")),
    ],
    "attention": [("num_heads", 3)],
    "sliding_window_attention": [("num_heads", 3), ("num_heads", 8), ("window_size", 0)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_malformed_arguments_and_attributes_are_named(name):
    def refused(field, x, segment_ids=None, expected="", **options):
        with pytest.raises(ValueError, match=f"^{field}: expected {expected}.*got"):
            jax.eval_shape(build(name, **options).init, jax.random.key(0), x, segment_ids)

    x = np.zeros((1, 4, 8), np.float32)
    for bad in (x[0], x[:, :0], x.astype(np.int32)):
        refused("x", bad)
    for bad in (np.zeros((1, 3), np.int32), np.zeros((1, 4), np.float32)):
        refused("segment_ids", x, bad)
    for field in ("dtype", "param_dtype"):
        refused(field, x, expected="64-bit mode", **{field: jnp.float64})
    for field, value in MALFORMED.get(name, ()):
        refused(field, x, **{field: value})


@pytest.mark.parametrize("name", ["gdn2", "mamba2", "attention", "sliding_window_attention"])
def test_a_nan_stays_in_its_document(make, name):
    layer, params = make(name)
    dirty = X.copy()
    dirty[0, 6] = np.nan
    others = (IDS != 2) | (np.arange(2) == 1)[:, None]
    ones = np.ones_like(X)
    results = (outputs_and_gradient(layer, params, x, ones) for x in (dirty, X))
    for result, expected in zip(*jax.device_get(tuple(results)), strict=True):
        np.testing.assert_array_equal(result[others], expected[others])
        assert np.isnan(result[0, 6]).all()


@pytest.mark.parametrize("name", CACHES)
def test_a_nan_is_forgotten_in_decoding_when_a_document_starts(make, decode, name):
    layer, params = make(name)
    dirty = X.copy()
    dirty[0, 6] = np.nan
    # At once the rest of the document and three tokens of the next; then one token.
    y = np.asarray(decode(layer, params, dirty, [*SPANS, (11, 12)], IDS)[0])
    assert np.isnan(y[0, 6:9]).all()
    assert np.isfinite(y[0, :6]).all() and np.isfinite(y[0, 9:]).all() and np.isfinite(y[1]).all()
