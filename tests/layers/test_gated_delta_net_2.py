import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import GatedDeltaNet2

WIDTH = 24


@pytest.fixture
def make(random_params):
    """A small layer and parameters for it, whose gates and norms leave their linear range."""

    def build(x, **options):
        small = {"num_heads": 2, "head_dim": 8, "implementation": "recurrent"}
        layer = GatedDeltaNet2(**small | options)
        return layer, random_params(layer, x)

    return build


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, x, segment_ids=None):
    return layer.apply({"params": params}, x, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def advance(decoder, variables, x, segment_ids=None):
    return decoder.apply(variables, x, segment_ids, mutable=["cache"])


def decode(layer, params, x, spans, segment_ids=None):
    """Outputs of calls on consecutive spans of `x`, joined, and the last cache."""
    run = functools.partial(advance, layer.clone(decode=True))
    variables, outputs = {"params": params}, []
    for start, stop in spans:
        ids = None if segment_ids is None else segment_ids[:, start:stop]
        y, cache = run(variables, x[:, start:stop], ids)
        outputs.append(y)
        variables = {"params": params, **cache}
    return jnp.concatenate(outputs, 1), variables["cache"]


def inputs(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(params, x, *, heads, value_heads, key_dim, value_dim, **options):
    """The equations of the paper for one row of inputs, channel by channel where it is simple."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    steps = x.shape[0]

    def project(name):
        return x @ p[name]["kernel"]

    def convolved(name):
        u, taps = project(f"{name}_proj"), p[f"{name}_conv1d"]["kernel"]
        y = np.zeros_like(u)
        for t in range(steps):
            for i in range(4):
                if t - 3 + i >= 0:
                    y[t] += taps[i] * u[t - 3 + i]
        return y * sigmoid(y)

    def gate(name, shape, structure):
        value = sigmoid(project(name)).reshape(shape)
        return (
            np.broadcast_to(value.mean(-1, keepdims=True), shape)
            if structure == "scalar"
            else value
        )

    key_shape, value_shape = (steps, heads, key_dim), (steps, value_heads, value_dim)
    q, k = (convolved(name).reshape(key_shape) for name in "qk")
    q, k = (u / np.sqrt(np.square(u).sum(-1, keepdims=True) + 1e-6) for u in (q, k))
    v = convolved("v").reshape(value_shape)
    f = (project("f_proj_0") @ p["f_proj_1"]["kernel"]).reshape(key_shape) + p["dt_bias"]
    rate = np.exp(p["A_log"])[:, None]
    bound = options.get("decay_lower_bound")
    g = -rate * np.logaddexp(0, f) if bound is None else bound * sigmoid(rate * f)
    b = gate("b_proj", key_shape, options.get("erase_gate"))
    b = b * (2 if options.get("allow_negative_eigenvalues") else 1)
    w = gate("w_proj", value_shape, options.get("write_gate"))
    z = project("g_proj_0") @ p["g_proj_1"]["kernel"] + p["g_proj_1"]["bias"]
    z = z.reshape(value_shape)
    activation = sigmoid(z) * (1 if options.get("output_gate") == "sigmoid" else z)

    o = np.zeros(value_shape)
    for i in range(value_heads):
        j = i // (value_heads // heads)
        state = np.zeros((key_dim, value_dim))
        for t in range(steps):
            state = np.exp(g[t, j])[:, None] * state
            read = state.T @ (b[t, j] * k[t, j])
            state += np.outer(k[t, j], w[t, i] * v[t, i] - read)
            o[t, i] = state.T @ q[t, j] / math.sqrt(key_dim)
    y = o / np.sqrt(np.square(o).mean(-1, keepdims=True) + 1e-5) * p["o_norm"]["scale"] * activation
    return y.reshape(steps, -1) @ p["o_proj"]["kernel"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allow_negative_eigenvalues": True, "decay_lower_bound": -0.5},
        {"num_value_heads": 6, "expand_v": 1.5},
        {"erase_gate": "scalar"},
        {"write_gate": "scalar", "output_gate": "sigmoid"},
        {"decay_lower_bound": -5.0},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_layer_computes_the_equations_of_the_paper(make, options):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (1, 9, WIDTH), jnp.float64)
        layer, params = make(x, dtype=jnp.float64, param_dtype=jnp.float64, **options)
        actual = apply(layer, params, x)[0]
    expected = reference(
        params,
        np.asarray(x[0]),
        heads=2,
        value_heads=options.get("num_value_heads", 2),
        key_dim=8,
        value_dim=round(8 * options.get("expand_v", 1)),
        **options,
    )
    np.testing.assert_allclose(actual, expected, atol=1e-7 * np.abs(expected).max())


def test_parameters_have_the_documented_names_shapes_and_dtypes():
    layer = GatedDeltaNet2(num_heads=4, head_dim=16, num_value_heads=8, expand_v=2.0)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 4, 48)))["params"]
    d, h, dv, key, value = 48, 4, 32, 4 * 16, 8 * 32
    expected = {
        **{f"{name}_proj": {"kernel": (d, key)} for name in "qkb"},
        **{f"{name}_proj": {"kernel": (d, value)} for name in "vw"},
        **{f"{name}_conv1d": {"kernel": (4, key)} for name in "qk"},
        "v_conv1d": {"kernel": (4, value)},
        "f_proj_0": {"kernel": (d, dv)},
        "f_proj_1": {"kernel": (dv, key)},
        "A_log": (h,),
        "dt_bias": (h, 16),
        "g_proj_0": {"kernel": (d, dv)},
        "g_proj_1": {"kernel": (dv, value), "bias": (value,)},
        "o_norm": {"scale": (dv,)},
        "o_proj": {"kernel": (value, d)},
    }
    assert jax.tree.map(lambda p: p.shape, params) == expected
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    low_rank = 2 * d * dv + dv * key + dv * value + value
    assert count == 3 * d * (key + value) + 4 * (2 * key + value) + low_rank + h + key + dv


def test_rates_and_bias_stay_float32_in_a_bfloat16_layer():
    layer = GatedDeltaNet2(num_heads=2, head_dim=8, param_dtype=jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 4, WIDTH)))["params"]
    dtypes = {name: {p.dtype.name for p in jax.tree.leaves(params[name])} for name in params}
    assert dtypes.pop("A_log") == dtypes.pop("dt_bias") == {"float32"}
    assert all(dtype == {"bfloat16"} for dtype in dtypes.values())


def test_initial_parameters_fill_their_documented_ranges():
    layer = GatedDeltaNet2(num_heads=64, head_dim=8, implementation="recurrent")
    params = jax.device_get(jax.jit(layer.init)(jax.random.key(0), np.zeros((1, 1, 96))))["params"]
    for name in (*(f"{part}_proj" for part in "qkvbwo"), "f_proj_0", "f_proj_1"):
        kernel = params[name]["kernel"]
        bound = 2**-2.5 * math.sqrt(6 / sum(kernel.shape))
        assert 0.98 * bound < np.abs(kernel).max() <= bound, name
    for name in "qkv":
        taps = params[f"{name}_conv1d"]["kernel"]
        assert 0.49 < np.abs(taps).max() <= 0.5
    assert np.all(params["g_proj_1"]["bias"] == 0) and np.all(params["o_norm"]["scale"] == 1)
    rates = np.exp(params["A_log"])
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert 7 < rates.mean() < 10
    time_steps = np.logaddexp(0, params["dt_bias"])
    assert 0.999e-3 <= time_steps.min() < 1.2e-3 and 0.08 < time_steps.max() <= 0.1001
    assert 0.007 < np.exp(np.log(time_steps).mean()) < 0.014


def test_a_bfloat16_layer_has_parameters_in_float32_and_computes_the_same(make):
    """The operator refuses a log-decay of lower precision than float32."""
    x = inputs(1, 5, WIDTH)
    layer, params = make(x, dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    y, wide = apply(layer, params, x), apply(layer.clone(dtype=jnp.float32), params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), wide, atol=0.05 * np.abs(wide).max())


@pytest.mark.parametrize("bound", [-5.0, -0.5])
def test_decay_lower_bound_keeps_the_log_decay_between_it_and_zero(make, bound):
    """A token that neither erases nor writes multiplies the cached state by its decays."""
    x = 10 * np.random.default_rng(0).normal(size=(32, 1, WIDTH)).astype(np.float32)
    x[..., 0] = 1
    layer, params = make(x, decay_lower_bound=bound)
    params["b_proj"]["kernel"][:] = np.where(np.arange(WIDTH) == 0, -1e4, 0)[:, None]
    params["v_proj"]["kernel"] *= 0
    _, cache = advance(layer.clone(decode=True), {"params": params}, x)
    state = {"cache": cache["cache"] | {"state": jnp.ones((32, 2, 8, 8))}}
    _, cache = advance(layer.clone(decode=True), {"params": params, **state}, x)
    g = np.log(cache["cache"]["state"])
    assert g.min() >= 1.0001 * bound and g.max() <= 0
    assert g.min() < 0.9 * bound and g.max() > 0.1 * bound


def test_without_short_convolutions_tokens_meet_only_in_the_state(make):
    x = inputs(1, 6, WIDTH)
    layer, params = make(x, use_short_conv=False)
    assert not any("conv" in name for name in params)
    # A decay of zero empties the state before each token, after which every token is alone.
    params["f_proj_0"]["kernel"] *= 0
    params["dt_bias"] += 1e4
    alone = apply(layer, params, x.reshape(6, 1, WIDTH)).reshape(x.shape)
    np.testing.assert_allclose(apply(layer, params, x), alone, atol=1e-6)


def test_prefill_steps_and_a_second_prefill_equal_the_full_forward(make):
    """By the chunkwise form; the recurrence decodes documents below."""
    x = inputs(2, 80, WIDTH)
    layer, params = make(x[:, :1], implementation="xla", num_value_heads=4)
    # The second prefill crosses a chunk's end.
    actual, cache = decode(layer, params, x, [(0, 5), (5, 6), (6, 7), (7, 79), (79, 80)])
    full = apply(layer.clone(implementation="recurrent"), params, x)
    np.testing.assert_allclose(actual, full, atol=2e-5 * jnp.abs(full).max())
    assert cache["state"].dtype == jnp.float32 and cache["state"].shape == (2, 4, 8, 8)


def test_token_by_token_decoding_equals_the_full_forward(make):
    x = inputs(2, 9, WIDTH)
    layer, params = make(x)
    full = apply(layer, params, x)
    actual, _ = decode(layer, params, x, [(t, t + 1) for t in range(9)])
    np.testing.assert_allclose(actual, full, atol=1e-5 * jnp.abs(full).max())


def test_init_leaves_a_cache_of_zeros_and_the_first_call_advances_it(make):
    x = inputs(1, 4, WIDTH)
    layer, _ = make(x)
    decoder = layer.clone(decode=True)
    variables = jax.jit(decoder.init)(jax.random.key(0), x)
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(variables["cache"]))
    first, cache = advance(decoder, variables, x)
    without, same = advance(decoder, {"params": variables["params"]}, x)
    np.testing.assert_array_equal(first, without)
    jax.tree.map(np.testing.assert_array_equal, cache, same)
    assert jnp.any(cache["cache"]["state"] != 0)


def test_segments_isolate_documents(make):
    x = inputs(1, 12, WIDTH)
    segment_ids = jnp.array([[0] * 5 + [1] * 1 + [4] * 6])
    layer, params = make(x)
    alone = [apply(layer, params, x[:, a:b]) for a, b in [(0, 5), (5, 6), (6, 12)]]
    packed = apply(layer, params, x, segment_ids)
    np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=1e-6)

    def last_document(x):
        return jnp.sum(jnp.square(layer.apply({"params": params}, x, segment_ids)[:, 6:]))

    gradient = jax.jit(jax.grad(last_document))(x)
    assert jnp.all(gradient[:, :6] == 0) and jnp.all(jnp.any(gradient[:, 6:] != 0, axis=-1))


def test_segments_in_decoding_continue_from_call_to_call(make):
    x = inputs(2, 12, WIDTH)
    segment_ids = jnp.array([[1] * 4 + [2] * 8, [1] * 6 + [2] * 1 + [3] * 5])
    layer, params = make(x)
    full = apply(layer, params, x, segment_ids)
    # Row 0 changes document between calls; row 1 inside one, at a step, and after it.
    spans = [(0, 4), (4, 6), (6, 7), (7, 12)]
    actual, cache = decode(layer, params, x, spans, segment_ids)
    np.testing.assert_allclose(actual, full, atol=1e-5 * jnp.abs(full).max())
    np.testing.assert_array_equal(cache["segment_id"], [2, 3])


def test_decoding_without_segments_continues_the_last_document(make):
    x = inputs(1, 6, WIDTH)
    segment_ids = jnp.array([[1, 1, 2, 2, 2, 2]])
    layer, params = make(x)
    full = apply(layer, params, x, segment_ids)
    run = functools.partial(advance, layer.clone(decode=True))
    _, cache = run({"params": params}, x[:, :3], segment_ids[:, :3])
    y, _ = run({"params": params, **cache}, x[:, 3:])
    np.testing.assert_allclose(y, full[:, 3:], atol=1e-5 * jnp.abs(full).max())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_state_in_bfloat16_is_rounded_between_calls(make, rounding):
    x = inputs(2, 9, WIDTH)
    segment_ids = jnp.array([[1] * 4 + [2] * 5, [1] * 7 + [2] * 2])
    layer, params = make(x, num_value_heads=4)
    spans = [(0, 3), *((t, t + 1) for t in range(3, 9))]
    expected, wide = decode(layer, params, x, spans, segment_ids)
    layer = layer.clone(state_rounding=rounding)
    actual, cache = decode(layer, params, x, spans, segment_ids)
    assert cache["state"].dtype == jnp.bfloat16 and (actual != expected).any()
    np.testing.assert_allclose(actual, expected, atol=2e-2 * jnp.abs(expected).max())
    np.testing.assert_allclose(cache.pop("state"), wide.pop("state"), atol=2e-2)
    if rounding == "stochastic":
        np.testing.assert_array_equal(cache.pop("position"), [5, 2])
    assert jax.tree.structure(cache) == jax.tree.structure(wide)


def test_stochastic_rounding_is_the_same_for_a_document_wherever_it_stands(make):
    x = inputs(1, 9, WIDTH)
    layer, params = make(x, state_rounding="stochastic")
    alone, expected = decode(layer, params, x[:, 4:], [(0, 3), (3, 4), (4, 5)])
    ids = jnp.array([[1] * 4 + [2] * 5] * 2)
    beside = jnp.concatenate([x, 2 * x])
    packed, cache = decode(layer, params, beside, [(0, 7), (7, 8), (8, 9)], ids)
    np.testing.assert_allclose(packed[:1, 4:], alone, atol=1e-5)
    np.testing.assert_array_equal(cache["position"], [5, 5])
    np.testing.assert_array_equal(cache["state"][:1], expected["state"])


def test_a_state_in_bfloat16_beside_float64_is_refused():
    with jax.enable_x64(True):
        layer = GatedDeltaNet2(
            num_heads=2, head_dim=8, dtype=jnp.float64, decode=True, state_rounding="nearest"
        )
        with pytest.raises(ValueError, match="^state_rounding: expected None .*got 'nearest'"):
            jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 4, WIDTH)))


def test_every_parameter_receives_a_finite_gradient(make):
    x = inputs(2, 6, WIDTH)
    layer, params = make(x, num_value_heads=4)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(layer.apply({"params": p}, x)))))
    for leaf in jax.tree.leaves(jax.device_get(gradient(params))):
        assert np.isfinite(leaf).all() and np.any(leaf != 0)


def test_layer_maps_over_an_outer_axis(make):
    x = inputs(3, 2, 5, WIDTH)
    layer, params = make(x[0])
    mapped = jax.jit(jax.vmap(lambda x: layer.apply({"params": params}, x)))(x)
    flat = apply(layer, params, x.reshape(6, 5, WIDTH))
    # Two compiled programs round apart; outputs reach 3, so the bound is the contract's, relative.
    np.testing.assert_allclose(mapped.reshape(flat.shape), flat, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"conv_size": 0}, "conv_size"),
        ({"num_value_heads": 3}, "num_value_heads"),
        ({"expand_v": 0.3}, "expand_v"),
        ({"erase_gate": "head"}, "erase_gate"),
        ({"write_gate": "head"}, "write_gate"),
        ({"decay_lower_bound": -6.0}, "decay_lower_bound"),
        ({"decay_lower_bound": 0.0}, "decay_lower_bound"),
        ({"output_gate": "swish"}, "output_gate"),
        ({"state_rounding": "up"}, "state_rounding"),
        ({"implementation": "cuda"}, "implementation"),
    ],
)
def test_malformed_attributes_are_named(options, named):
    layer = GatedDeltaNet2(**{"num_heads": 2, "head_dim": 8} | options)
    with pytest.raises(ValueError, match=f"^{named}: expected .*got"):
        jax.eval_shape(layer.init, jax.random.key(0), inputs(1, 4, WIDTH))


@pytest.mark.parametrize(
    ("x", "segment_ids", "named"),
    [
        (np.zeros((4, WIDTH), np.float32), None, "x"),
        (np.zeros((1, 0, WIDTH), np.float32), None, "x"),
        (np.zeros((1, 4, WIDTH), np.int32), None, "x"),
        (np.zeros((1, 4, WIDTH), np.float32), np.zeros((1, 3), np.int32), "segment_ids"),
        (np.zeros((1, 4, WIDTH), np.float32), np.zeros((1, 4), np.float32), "segment_ids"),
    ],
)
def test_malformed_inputs_are_named(x, segment_ids, named):
    with pytest.raises(ValueError, match=f"^{named}: expected .*got"):
        layer = GatedDeltaNet2(num_heads=2, head_dim=8)
        jax.eval_shape(layer.init, jax.random.key(0), x, segment_ids)
