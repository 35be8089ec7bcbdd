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
    if options.get("write_gate") == "tied":
        w = np.repeat(b.mean(-1, keepdims=True), value_heads // heads, axis=1)
        w = np.broadcast_to(w, value_shape)
    else:
        w = gate("w_proj", value_shape, options.get("write_gate"))
    b = b * (2 if options.get("allow_negative_eigenvalues") else 1)
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
        {"write_gate": "tied", "allow_negative_eigenvalues": True, "num_value_heads": 4},
        {"decay_lower_bound": -5.0},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_layer_computes_the_equations_of_the_paper(make, apply, options):
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


@pytest.mark.parametrize("bound", [-5.0, -0.5])
def test_decay_lower_bound_keeps_the_log_decay_between_it_and_zero(make, advance, bound):
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


def test_without_short_convolutions_tokens_meet_only_in_the_state(make, apply):
    x = inputs(1, 6, WIDTH)
    layer, params = make(x, use_short_conv=False)
    assert not any("conv" in name for name in params)
    # A decay of zero empties the state before each token, after which every token is alone.
    params["f_proj_0"]["kernel"] *= 0
    params["dt_bias"] += 1e4
    alone = apply(layer, params, x.reshape(6, 1, WIDTH)).reshape(x.shape)
    np.testing.assert_allclose(apply(layer, params, x), alone, atol=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_state_in_bfloat16_is_rounded_between_calls(make, decode, rounding):
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


def test_stochastic_rounding_is_the_same_for_a_document_wherever_it_stands(make, decode):
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


def test_layer_maps_over_an_outer_axis(make, apply):
    x = inputs(3, 2, 5, WIDTH)
    layer, params = make(x[0])
    mapped = jax.jit(jax.vmap(lambda x: layer.apply({"params": params}, x)))(x)
    flat = apply(layer, params, x.reshape(6, 5, WIDTH))
    # Two compiled programs round apart; outputs reach 3, so the bound is the contract's, relative.
    np.testing.assert_allclose(mapped.reshape(flat.shape), flat, rtol=2e-5, atol=1e-6)
