"""Mamba-2 and Mamba-3: the layers against their equations, decoding, documents, parameters."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.layers import Mamba2, Mamba3

WIDTH = 12

LAYERS = {"mamba2": Mamba2, "mamba3": Mamba3, "mamba3_mimo": functools.partial(Mamba3, mimo_rank=3)}
VARIANTS = {
    "mamba2": ("mamba2", {}),
    "mamba2-groups": ("mamba2", {"num_groups": 2, "conv_size": 3}),
    "mamba3": ("mamba3", {}),
    "mamba3-groups-heavy": (
        "mamba3",
        {"num_groups": 2, "decay_activation": "heavy_tail", "rotary_fraction": 1.0},
    ),
    "mamba3_mimo": ("mamba3_mimo", {}),
    "mamba3_mimo-groups": ("mamba3_mimo", {"num_groups": 2}),
}


def build(name, **options):
    small = {"num_heads": 4, "head_dim": 3, "state_dim": 8, "implementation": "recurrent"}
    return LAYERS[name](**small | options)


@pytest.fixture
def make(random_params):
    """A small layer and parameters for it, whose gates and norms leave their linear range."""

    def make_layer(name, x, **options):
        layer = build(name, **options)
        return layer, random_params(layer, x)

    return make_layer


def inputs(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), shape, dtype)


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def rms_norm(x, scale):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def mamba2_reference(layer, p, x):
    """The equations, a token and a head at a time, for one document [T, D]."""
    heads, groups, inner = layer.num_heads, layer.num_groups, layer.num_heads * layer.head_dim
    shared = groups * layer.state_dim
    z, vkq, s = np.split(x @ p["in_proj"]["kernel"], [inner, 2 * inner + 2 * shared], axis=1)
    taps, convolved = p["conv1d"]["kernel"], np.zeros_like(vkq)
    for t in range(len(x)):
        convolved[t] = p["conv1d"]["bias"]
        for age in range(min(t + 1, layer.conv_size)):
            convolved[t] += taps[layer.conv_size - 1 - age] * vkq[t - age]
    v, k, q = np.split(silu(convolved), [inner, inner + shared], axis=1)
    dt = softplus(s + p["dt_bias"])
    o = np.zeros((len(x), heads, layer.head_dim))
    for h in range(heads):
        state = np.zeros((layer.state_dim, layer.head_dim))
        group = slice(h // (heads // groups) * layer.state_dim, None)
        for t in range(len(x)):
            key, query = (u[t, group][: layer.state_dim] for u in (k, q))
            value = v[t].reshape(heads, -1)[h]
            state = np.exp(-np.exp(p["A_log"][h]) * dt[t, h]) * state
            state += np.outer(key, dt[t, h] * value)
            o[t, h] = state.T @ query + p["D"][h] * value
    gated = (o.reshape(z.shape) * silu(z)).reshape(len(x), groups, -1)
    return rms_norm(gated, p["norm"]["scale"]).reshape(z.shape) @ p["out_proj"]["kernel"]


def mamba3_reference(layer, p, x):
    """The recurrence on complex pairs, in the frame of the current token, for one document."""
    heads, groups, inner = layer.num_heads, layer.num_groups, layer.num_heads * layer.head_dim
    ranks, dim = layer.mimo_rank or 1, layer.state_dim
    angles = int(dim * layer.rotary_fraction) // 2
    shared = ranks * groups * dim
    sizes = [inner, inner, shared, shared, heads, heads, heads]
    z, v, k, q, s, a, share, ang = np.split(x @ p["in_proj"]["kernel"], np.cumsum(sizes), axis=1)
    k, q = (
        rms_norm(u.reshape(-1, ranks, groups, dim), p[name]["scale"])
        for u, name in ((k, "B_norm"), (q, "C_norm"))
    )
    dt, share = softplus(s + p["dt_bias"]), 1 / (1 + np.exp(-share))
    rate = softplus(a)
    if layer.decay_activation == "heavy_tail":
        rate = np.where(a >= 0, 1 + a, 1 / (1 + np.abs(a)))
    alpha = np.exp(-np.maximum(rate, 1e-4) * dt)
    ones = np.ones((heads, 1, layer.head_dim))
    up, gate, down = (p.get(name, ones) for name in ("mimo_x", "mimo_z", "mimo_o"))

    def pairs(u):
        return u[..., : dim // 2] + 1j * u[..., dim // 2 :]

    o = np.zeros((len(x), heads, layer.head_dim))
    for h in range(heads):
        state, before = np.zeros((dim // 2, layer.head_dim), complex), 0
        for t in range(len(x)):
            theta = np.zeros(dim // 2)
            theta[:angles] = np.pi * np.tanh(ang[t]) * dt[t, h]
            group = h // (heads // groups)
            key = pairs(k[t, :, group] + p["B_bias"][h])
            query = pairs(q[t, :, group] + p["C_bias"][h])
            values = v[t].reshape(heads, -1)[h] * up[h]
            write = key.T @ values
            state = (
                alpha[t, h]
                * np.exp(-1j * theta)[:, None]
                * (state + (1 - share[t, h]) * dt[t, h] * before)
            )
            state, before = state + share[t, h] * dt[t, h] * write, write
            read = np.real(query.conj() @ state) + p["D"][h] * values
            o[t, h] = (down[h] * read * silu(z[t].reshape(heads, -1)[h] * gate[h])).sum(0)
    return o.reshape(len(x), -1) @ p["out_proj"]["kernel"]


def reference(layer, params, x):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    equations = mamba2_reference if isinstance(layer, Mamba2) else mamba3_reference
    return equations(layer, params, np.asarray(x, np.float64))


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_equations(make, apply, variant, implementation):
    name, options = VARIANTS[variant]
    with jax.enable_x64(True):
        x = inputs(1, 19, WIDTH, dtype=jnp.float64)
        wide = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        layer, params = make(name, x, implementation=implementation, **wide, **options)
        actual = apply(layer, params, x)[0]
    np.testing.assert_allclose(actual, reference(layer, params, x[0]), rtol=1e-10, atol=1e-12)


def test_bfloat16_layers_keep_their_state_and_gates_in_float32(make, apply, decode):
    x = inputs(2, 40, WIDTH)
    for name in LAYERS:
        layer, params = make(name, x, implementation="xla")
        expected = apply(layer.clone(implementation="recurrent"), params, x)
        low = layer.clone(dtype=jnp.bfloat16)
        assert jax.eval_shape(low.apply, {"params": params}, x).dtype == jnp.bfloat16
        actual, cache = decode(low, params, x, [(0, 40)])
        error = jnp.linalg.norm(actual.astype(jnp.float32) - expected)
        assert error < 3e-2 * jnp.linalg.norm(expected), name
        assert cache["state"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "parameters", "extra_state"),
    [
        ("mamba2", {2048: 25_584_448, 2304: 28_779_328}, 12_672),
        ("mamba3", {2048: 25_862_400, 2304: 29_094_144}, 1_024 + 4_096 + 4_096),
        ("mamba3_mimo", {2048: 26_722_560, 2304: 30_052_608}, 1_024 + 16_384 + 4_096),
    ],
)
def test_matched_settings_have_the_documented_parameters_and_state(name, parameters, extra_state):
    options = {"mimo_rank": 4} if name == "mamba3_mimo" else {}
    layer = LAYERS[name](num_heads=64, decode=True, **options)
    for width, count in parameters.items():
        variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, width)))
        params, cache = variables["params"], variables["cache"]
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
        floats = sum(math.prod(x.shape) for x in jax.tree.leaves(cache) if x.dtype == jnp.float32)
        assert math.prod(cache["state"].shape) == 262_144 and floats == 262_144 + extra_state


def test_initial_parameters_fill_their_documented_ranges():
    layer = Mamba2(num_heads=64, head_dim=2, state_dim=8)
    params = jax.device_get(jax.jit(layer.init)(jax.random.key(0), np.zeros((1, 1, 96))))["params"]
    for name in ("in_proj", "out_proj"):
        kernel = params[name]["kernel"]
        bound = kernel.shape[0] ** -0.5
        assert 0.98 * bound < np.abs(kernel).max() <= bound, name
    for leaf in params["conv1d"].values():
        assert 0.48 < np.abs(leaf).max() <= 0.5
    rates, time_steps = np.exp(params["A_log"]), np.logaddexp(0, params["dt_bias"])
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert 0.999e-3 <= time_steps.min() < 1.2e-3 and 0.08 < time_steps.max() <= 0.1001
    assert np.all(params["D"] == 1) and np.all(params["norm"]["scale"] == 1)

    values = dict.fromkeys(("D", "B_bias", "C_bias", "mimo_z", "B_norm", "C_norm"), 1)
    values |= {"mimo_x": 0.25, "mimo_o": 0.25}

    @jax.jit
    def constants(key):  # What draws the other parameters is not compiled.
        params = Mamba3(num_heads=8, mimo_rank=4).init(key, np.zeros((1, 1, 96)))["params"]
        return {name: jax.tree.leaves(params[name]) for name in values}

    for name, leaves in constants(jax.random.key(0)).items():
        assert all(np.all(leaf == values[name]) for leaf in leaves), name
