"""KDA, GDN, DeltaNet and DeltaProduct: the Gated Delta Rule-2 with tied gates."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import GatedDeltaNet2
from gdn2_jax.layers import GatedDeltaNet, KimiDeltaAttention

WIDTH = 12

LAYERS = {
    "kda": KimiDeltaAttention,
    "gdn": GatedDeltaNet,
    "deltanet": functools.partial(GatedDeltaNet, use_decay=False),
}
PRODUCT = functools.partial(GatedDeltaNet, num_householder=3)
VARIANTS = {
    "kda": ("kda", {}),
    "kda-grouped-bounded": (
        "kda",
        {"num_value_heads": 4, "expand_v": 0.5, "decay_lower_bound": -5.0, "output_gate": "silu"},
    ),
    "gdn-grouped-negative": ("gdn", {"num_value_heads": 4, "allow_negative_eigenvalues": True}),
    "product-grouped": ("product", {"num_value_heads": 4, "allow_negative_eigenvalues": True}),
    "deltanet-grouped-sigmoid": ("deltanet", {"num_value_heads": 6, "output_gate": "sigmoid"}),
}


def build(name, **options):
    layer = PRODUCT if name == "product" else LAYERS[name]
    return layer(**{"num_heads": 2, "head_dim": 4, "implementation": "recurrent"} | options)


@pytest.fixture
def make(random_params):
    """A small layer and parameters for it, whose gates and norms leave their linear range."""

    def make_layer(name, x, **options):
        layer = build(name, **options)
        return layer, random_params(layer, x)

    return make_layer


def inputs(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), shape, dtype)


def reference(layer, params, x, segment_ids=None):
    """The equations of each layer, a token at a time, for one row of inputs [T, D]."""
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
    length, heads, key_dim = x.shape[0], layer.num_heads, layer.head_dim
    value_heads = layer.num_value_heads or heads
    value_dim = round(key_dim * layer.expand_v)
    steps = getattr(layer, "num_householder", 1)
    segment_ids = np.zeros(length, int) if segment_ids is None else segment_ids

    def project(*names):
        y = x
        for name in names:
            y = y @ params[name]["kernel"] + params[name].get("bias", 0)
        return y

    def convolved(name, heads):
        u, taps = project(f"{name}_proj"), params[f"{name}_conv1d"]["kernel"]
        t = np.arange(length)
        seen = [(t >= age) & (segment_ids == segment_ids[t - age]) for age in range(4)]
        terms = [taps[3 - age] * u[t - age] * seen[age][:, None] for age in range(4)]
        return jax.nn.silu(sum(terms)).reshape(length, heads, -1)

    def unit(u):
        return u / jnp.sqrt(jnp.sum(u**2, -1, keepdims=True) + 1e-6)

    group = value_heads // heads
    q, k = unit(convolved("q", heads)), unit(convolved("k", heads * steps))
    k, v = k.reshape(length, heads, steps, -1), convolved("v", value_heads * steps)
    q, k = (jnp.stack([u[:, i // group] for i in range(value_heads)], 1) for u in (q, k))
    v = v.reshape(length, value_heads, steps, -1)
    beta = jax.nn.sigmoid(project("b_proj")) * (2 if layer.allow_negative_eigenvalues else 1)
    beta = beta.reshape(length, value_heads, steps)

    if isinstance(layer, KimiDeltaAttention):
        f = project("f_proj_0", "f_proj_1").reshape(length, value_heads, key_dim)
        f, rate = f + params["dt_bias"], jnp.exp(params["A_log"])[:, None]
        bound = layer.decay_lower_bound
        alpha = -rate * jax.nn.softplus(f) if bound is None else bound * jax.nn.sigmoid(rate * f)
        z = project("g_proj_0", "g_proj_1")
    else:
        alpha = jnp.zeros((length, value_heads))
        if layer.use_decay:
            f = project("a_proj") + params["dt_bias"]
            alpha = -jnp.exp(params["A_log"]) * jax.nn.softplus(f)
        alpha = alpha[..., None] * jnp.ones(key_dim)
        z = project("g_proj")
    alpha = jnp.exp(alpha)

    def token(state, now):
        q, k, v, alpha, beta, starts = now
        state = alpha[:, :, None] * jnp.where(starts, 0, state)
        for i in range(steps):
            read = jnp.einsum("hkv,hk->hv", state, k[:, i])
            written = jnp.einsum("hk,hv->hkv", k[:, i], v[:, i] - read)
            state += beta[:, i, None, None] * written
        return state, jnp.einsum("hkv,hk->hv", state, q) / math.sqrt(key_dim)

    starts = np.concatenate([[True], segment_ids[1:] != segment_ids[:-1]])
    state = jnp.zeros((value_heads, key_dim, value_dim), x.dtype)
    _, o = jax.lax.scan(token, state, (q, k, v, alpha, beta, starts))
    o = o / jnp.sqrt(jnp.mean(o**2, -1, keepdims=True) + 1e-5) * params["o_norm"]["scale"]
    activation = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}[layer.output_gate]
    return (o.reshape(length, -1) * activation(z)) @ params["o_proj"]["kernel"]


def value_and_gradients(function, params, x):
    """Outputs, and the gradients of a sum of them with fixed weights in params and x."""

    @jax.jit
    def run(params, x):
        y, pull = jax.vjp(function, params, x)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    y, gradients = run(params, x)
    return {"y": y, "params": gradients[0], "x": gradients[1]}


def assert_close(actual, expected, bound):
    def compare(path, a, e):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        error = np.linalg.norm(a - e) / np.linalg.norm(e)
        assert error <= bound, f"{jax.tree_util.keystr(path)}: {error:.1e}"

    jax.tree.map_with_path(compare, actual, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_the_equations(make, variant):
    name, options = VARIANTS[variant]
    segment_ids = np.array([0] * 3 + [1] * 1 + [2] * 7)
    with jax.enable_x64(True):
        x = inputs(11, WIDTH, dtype=jnp.float64)
        layer, params = make(name, x[None], dtype=jnp.float64, param_dtype=jnp.float64, **options)

        def run(params, x):
            return layer.apply({"params": params}, x[None], segment_ids[None])[0]

        expected = value_and_gradients(
            lambda params, x: reference(layer, params, x, segment_ids), params, x
        )
        actual = value_and_gradients(run, params, x)
        # A_log and dt_bias are float32 in every layer, and so are their gradients.
        assert_close(actual["params"].pop("A_log", 1), expected["params"].pop("A_log", 1), 1e-6)
        assert_close(actual["params"].pop("dt_bias", 1), expected["params"].pop("dt_bias", 1), 1e-6)
        assert_close(actual, expected, 1e-10)


@pytest.mark.slow
def test_chunkwise_form_equals_the_recurrence_over_two_chunks(make):
    """Of KDA; the other layers hand other gates to the same operator, which tests/ops judges."""
    segment_ids = jnp.array([[0] * 30 + [1] * 40])
    with jax.enable_x64(True):
        x = inputs(1, 70, WIDTH)
        layer, params = make("kda", x, num_value_heads=4)

        def run(implementation, dtype):
            cast = layer.clone(dtype=dtype, param_dtype=dtype, implementation=implementation)
            return value_and_gradients(
                lambda params, x: cast.apply({"params": params}, x, segment_ids),
                jax.tree.map(lambda leaf: leaf.astype(dtype), params),
                x.astype(dtype),
            )

        # In float64 tests/ops compares the forms.
        assert_close(run("xla", jnp.float32), run("recurrent", jnp.float64), 2e-5)


@pytest.mark.parametrize(
    ("erase_gate", "write_gate"),
    [("channel", "channel"), ("scalar", "scalar"), ("channel", "tied"), ("scalar", "tied")],
)
def test_tied_gdn2_layer_is_a_kda_layer(make, apply, erase_gate, write_gate):
    # A GDN-2 layer whose gate projections repeat KDA's one column for every channel of its head.
    x = inputs(2, 9, WIDTH)
    kda, params = make("kda", x, output_gate="silu")
    gdn2 = GatedDeltaNet2(
        num_heads=2,
        head_dim=4,
        erase_gate=erase_gate,
        write_gate=write_gate,
        implementation="recurrent",
    )
    repeated = jnp.repeat(params["b_proj"]["kernel"], 4, axis=1)
    tied = params | {"b_proj": {"kernel": repeated}}
    if write_gate != "tied":
        tied["w_proj"] = {"kernel": repeated}
    np.testing.assert_allclose(apply(gdn2, tied, x), apply(kda, params, x), atol=1e-6)


def test_kda_with_one_decay_a_head_is_gdn_and_without_decay_deltanet(make, apply):
    x = inputs(2, 9, WIDTH)
    gdn, params = make("gdn", x, output_gate="sigmoid")
    kda, kda_params = make("kda", x)
    shared = {name: leaf for name, leaf in params.items() if name in kda_params}
    f = {
        "f_proj_0": {"kernel": jnp.zeros((WIDTH, 4)).at[:, :2].set(params["a_proj"]["kernel"])},
        "f_proj_1": {"kernel": jnp.zeros((4, 8)).at[0, :4].set(1).at[1, 4:].set(1)},
        "dt_bias": jnp.repeat(params["dt_bias"][:, None], 4, axis=1),
    }
    gate = {
        "g_proj_0": {"kernel": jnp.zeros((WIDTH, 4))},
        "g_proj_1": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)},
    }
    params["g_proj"]["kernel"] *= 0
    np.testing.assert_allclose(
        apply(kda, kda_params | shared | f | gate, x), apply(gdn, params, x), atol=1e-6
    )
    deltanet, without = make("deltanet", x, output_gate="sigmoid")
    assert set(params) - set(without) == {"a_proj", "A_log", "dt_bias"}
    still = params | {"dt_bias": jnp.full(2, -1e4)}
    assert not np.allclose(apply(gdn, still, x), apply(gdn, params, x), atol=1e-3)
    np.testing.assert_allclose(
        apply(deltanet, {name: params[name] for name in without}, x),
        apply(gdn, still, x),
        atol=1e-6,
    )


def test_a_half_precision_layer_and_its_gradient_run_on_the_gpu_kernels():
    """Lowering those takes long, and is tested with the kernels."""
    layer = GatedDeltaNet(1, num_value_heads=2, dtype=jnp.bfloat16, implementation="pallas")
    x = jax.ShapeDtypeStruct((1, 128, 64), jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda p, x: layer.apply(p, x).astype(jnp.float32).sum()))
    assert str(gradient.trace(params, x).jaxpr).count("kernel_name") >= 4


def test_one_step_a_token_is_gdn(make, apply):
    x = inputs(1, 5, WIDTH)
    gdn, params = make("gdn", x)
    np.testing.assert_array_equal(
        apply(PRODUCT(2, 4, num_householder=1, implementation="recurrent"), params, x),
        apply(gdn, params, x),
    )


@pytest.mark.parametrize(
    ("name", "width", "count"),
    [
        ("kda", 2048, 17_887_376),
        ("gdn", 2048, 21_061_792),
        ("deltanet", 2304, 23_691_424 - 2304 * 16 - 2 * 16),
    ],
)
def test_parameter_counts_of_the_paper_layers(name, width, count):
    layer = LAYERS[name](num_heads=16)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, width)))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_parameters_have_the_documented_names_and_shapes():
    def shapes(name):
        layer = LAYERS[name](num_heads=2, head_dim=8, num_value_heads=4, expand_v=2.0)
        params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, 24)))["params"]
        return jax.tree.map(lambda leaf: leaf.shape, params)

    deltanet = {
        **{f"{name}_proj": {"kernel": (24, 16)} for name in "qk"},
        **{f"{name}_proj": {"kernel": (24, 64)} for name in "vg"},
        **{f"{name}_conv1d": {"kernel": (4, 16)} for name in "qk"},
        "v_conv1d": {"kernel": (4, 64)},
        "b_proj": {"kernel": (24, 4)},
        "o_norm": {"scale": (16,)},
        "o_proj": {"kernel": (64, 24)},
    }
    assert shapes("deltanet") == deltanet
    gdn = {"a_proj": {"kernel": (24, 4)}, "A_log": (4,), "dt_bias": (4,)}
    assert shapes("gdn") == deltanet | gdn
    del deltanet["g_proj"]
    assert shapes("kda") == deltanet | {
        "f_proj_0": {"kernel": (24, 16)},
        "f_proj_1": {"kernel": (16, 32)},
        "g_proj_0": {"kernel": (24, 16)},
        "g_proj_1": {"kernel": (16, 64), "bias": (64,)},
        "A_log": (4,),
        "dt_bias": (4, 8),
    }


def test_initial_rates_fill_their_documented_ranges():
    def initial(layer):
        def rates(key):  # What draws the other parameters is not compiled.
            params = layer.init(key, np.zeros((1, 1, 8)))["params"]
            return params["A_log"], params["dt_bias"]

        return jax.device_get(jax.jit(rates)(jax.random.key(0)))

    sizes = {"num_heads": 256, "head_dim": 2, "implementation": "recurrent"}
    gdn, kda = initial(GatedDeltaNet(**sizes)), initial(KimiDeltaAttention(**sizes))
    for (a_log, dt_bias), low in ((gdn, 0.0), (kda, 1.0)):
        rates = np.exp(a_log)
        assert low < rates.min() < low + 0.5 and 15.5 < rates.max() <= 16
        steps = np.logaddexp(0, dt_bias)
        assert 0.99e-3 < steps.min() < 1.2e-3 and 0.08 < steps.max() < 0.101
    a_log, _ = initial(KimiDeltaAttention(**sizes, decay_lower_bound=-5.0))
    assert np.all(a_log == 0)


@pytest.mark.parametrize("layer", [GatedDeltaNet2, KimiDeltaAttention])
def test_gradients_of_the_projections_to_heads_meet_first_in_that_of_the_inputs(layer):
    """XLA then takes one all-reduce for their sum on a mesh that splits the heads."""
    module = layer(num_heads=3, head_dim=4, use_short_conv=False, implementation="recurrent")
    x = jax.ShapeDtypeStruct((1, 8, 8), "float32")
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    gradient = jax.make_jaxpr(jax.grad(lambda x, params: module.apply(params, x).sum()))(x, params)
    made_by = {str(out): eqn for eqn in gradient.jaxpr.eqns for out in eqn.outvars}

    def widths(name):
        """Of the projections whose gradients make up a sum, in the order of adding."""
        eqn = made_by[name]
        if eqn.primitive.name == "add_any":
            return [width for var in eqn.invars for width in widths(str(var))]
        if eqn.primitive.name == "dot_general":
            return [eqn.invars[0].aval.shape[-1]]
        return widths(str(eqn.invars[0]))

    added = widths(str(gradient.jaxpr.outvars[0]))
    assert len(added) > 5 and sorted(added[-2:]) == [4, 4] and 4 not in added[:-2]
