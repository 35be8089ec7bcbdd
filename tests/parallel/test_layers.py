"""Every mixer on a mesh of eight simulated devices computes what it does on one."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gdn2_jax import GatedDeltaNet2
from gdn2_jax.models import (
    MIXERS,
    DeltaRule,
    ModelConfig,
    SoftmaxAttention,
    StateSpace,
    named_mixer,
)
from gdn2_jax.parallel import MeshConfig, batch_sharding, make_mesh, param_shardings, partitioned

SIZES = {
    "d_model": 16,
    "num_layers": 1,
    "mlp_dim": 16,
    "dtype": "float32",
    "implementation": "recurrent",
}

MIXER_SIZES = {
    DeltaRule: {"num_heads": 2, "num_value_heads": 4, "head_dim": 8},
    StateSpace: {"inner_dim": 16, "head_dim": 4, "state_dim": 8},
    SoftmaxAttention: {"num_heads": 2, "window_size": 20},
}


def layer_of(mixer):
    mixer = named_mixer(mixer, MIXER_SIZES)
    return mixer.layer(ModelConfig(mixer=mixer, **SIZES), False, "mixer")


# GDN without decay and Mamba-3 with one rank are cases of other mixers' layers.
@pytest.mark.parametrize("mixer", [m for m in MIXERS if m not in ("deltanet", "mamba3")])
def test_outputs_and_gradients_on_a_mesh_are_those_of_one_device(mixer, random_params):
    """Spans of 8 tokens: the window reaches over two spans before its own."""
    sizes = {"sequence": 4} if MIXERS[mixer].splits_sequences else {"fsdp": 4}
    mesh = make_mesh(MeshConfig(tensor=2, **sizes))
    layer = layer_of(mixer)
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, 4, 32, 16)).astype(np.float32)
    segment_ids = np.cumsum(rng.random((4, 32)) < 0.1, axis=1).astype(np.int32)

    params = random_params(layer, x[:1, :1])

    def outputs_and_gradients(params, x, segment_ids, cotangent):
        def outputs(params, x):
            return layer.apply({"params": params}, x, segment_ids)

        y, transpose = jax.vjp(outputs, params, x)
        return y, *transpose(cotangent)

    expected = jax.jit(outputs_and_gradients)(params, x, segment_ids, cotangent)
    tokens, shardings = (
        batch_sharding(mesh),
        param_shardings(lambda: layer.init(jax.random.key(0), x[:1, :1])["params"], mesh),
    )
    with jax.set_mesh(mesh):
        activations = NamedSharding(mesh, P(*tokens.spec, None))
        run = jax.jit(
            outputs_and_gradients, in_shardings=(shardings, activations, tokens, activations)
        )
        actual = run(params, x, segment_ids, cotangent)

    def compare(path, x, y):
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < 1e-5, (jax.tree_util.keystr(path), error)

    # Not on the devices, where each small operation of each shape would be compiled.
    jax.tree_util.tree_map_with_path(compare, *jax.device_get((actual, expected)))


def on_explicit_axes(path, leaf, mesh):
    """Matrices over both axes, as FSDP and tensor parallelism split them; the rest whole."""
    name = jax.tree_util.keystr(path)
    if leaf.ndim != 2 or "proj" not in name:
        return NamedSharding(mesh, P())
    names = ("rows", "columns")
    if "o_proj" in name or "out_proj" in name:
        names = names[::-1]
    divided = [n if size % mesh.shape[n] == 0 else None for n, size in zip(names, leaf.shape)]
    return NamedSharding(mesh, P(*divided))


@pytest.mark.parametrize("mixer", ["gdn2", "mamba2", "sliding_window_attention"])
def test_layers_run_on_the_mesh_that_jax_makes_by_default(mixer, random_params):
    """Of Explicit axes with anyone's names: rows and heads stay split, nothing needs Auto."""
    layer = layer_of(mixer)
    mesh = jax.make_mesh((4, 2), ("rows", "columns"))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, 16)).astype(np.float32)
    segment_ids = np.cumsum(rng.random((4, 6)) < 0.2, axis=1).astype(np.int32)
    params = {"params": random_params(layer, x)}

    def loss(params, x, segment_ids):
        y = layer.apply(params, x, segment_ids)
        return jnp.sum(jnp.square(y)), y

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    expected = step(params, x, segment_ids)
    shardings = jax.tree.map_with_path(lambda k, p: on_explicit_axes(k, p, mesh), params)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("rows"))
        actual = step(*jax.device_put((params, x, segment_ids), (shardings, rows, rows)))
    (_, y), (gradients, _) = actual
    assert jax.typeof(y).sharding.spec == P("rows", None, None)
    kernel = "in_proj" if mixer == "mamba2" else "q_proj"
    kernel = gradients["params"][kernel]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == kernel.shape[0] // 4
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5 * np.abs(e).max()),
        *jax.device_get((actual, expected)),
    )


@pytest.mark.parametrize("mixer", ["gdn2", "mamba2", "mamba3", "sliding_window_attention"])
def test_decoding_on_explicit_axes_keeps_rows_and_heads_split(mixer, random_params):
    """A prompt longer than the window, then one token after the other."""
    layer = layer_of(mixer)
    if mixer == "sliding_window_attention":
        layer = layer.clone(window_size=3)
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), devices=jax.devices()[:4])
    x = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    segment_ids = np.array([[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]])
    params = {"params": random_params(layer, x)}
    expected = jax.jit(layer.apply)(params, x, segment_ids)
    advance = jax.jit(lambda *args: layer.clone(decode=True).apply(*args, mutable=["cache"]))
    shardings = jax.tree.map_with_path(lambda k, p: on_explicit_axes(k, p, mesh), params)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("rows"))
        variables, *tokens = jax.device_put((params, x, segment_ids), (shardings, rows, rows))
        variables, outputs = dict(variables), []
        for start, stop in ((0, 4), (4, 5), (5, 6)):
            y, updated = advance(variables, *(array[:, start:stop] for array in tokens))
            variables |= updated
            outputs.append(y)
        state = updated["cache"].get("state", updated["cache"].get("key"))
        heads = {"gdn2": 1, "sliding_window_attention": 2}
        places = jax.typeof(state).sharding.spec
        assert places[0] == "rows"
        assert mixer not in heads or places[heads[mixer]] == "columns"
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(outputs, 1), expected, atol=1e-6 * scale)


def test_spans_of_tokens_on_explicit_axes_are_refused_in_one_line():
    mesh = jax.make_mesh((2,), ("columns",), devices=jax.devices()[:2])
    layer = layer_of("gdn2")
    with jax.set_mesh(mesh):
        spans = jax.device_put(np.ones((2, 4, 16), np.float32), P(None, "columns"))
        with pytest.raises(ValueError, match="^x: expected T in one piece on a mesh of Explicit"):
            jax.eval_shape(layer.init, jax.random.key(0), spans)


def test_named_initialisers_take_their_dtype_by_keyword_too():
    """As packages that patch linen's `param` pass it."""
    init = partitioned(jax.nn.initializers.ones, "heads")
    assert init(jax.random.key(0), (3,), dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("mixer", ["gdn2", "mamba2", "mamba3", "attention"])
def test_parameters_take_the_names_that_kernel_init_gives(mixer):
    """As flax's attention does in models that ask for names without rules in force, as lm1b."""
    named = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("width", "joined_kv"))
    layer = layer_of(mixer)
    layer = layer.clone(kernel_init=named)
    x = jax.ShapeDtypeStruct((1, 4, 16), jnp.float32)
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    specs = nn.get_partition_spec(boxed)
    into, out = {
        "gdn2": ("q_proj", "o_proj"),
        "attention": ("q_proj", "o_proj"),
        "mamba2": ("in_proj", "out_proj"),
        "mamba3": ("in_proj", "out_proj"),
    }[mixer]
    assert specs[into]["kernel"] == P("width", "joined_kv")
    assert specs[out]["kernel"] == P("joined_kv", "width")
    if mixer == "gdn2":
        assert specs["f_proj_0"]["kernel"] == P("width", None)
        assert specs["A_log"] == specs["g_proj_1"]["bias"] == P("joined_kv")
        assert specs["q_conv1d"]["kernel"] == P(None, "joined_kv")
    plain = jax.eval_shape(layer.clone(kernel_init=nn.initializers.ones).init, jax.random.key(0), x)
    assert jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed)) == jax.tree.map(
        lambda leaf: leaf.shape, plain["params"]
    )


def test_rules_without_any_name_of_ours_are_told_of():
    layer = GatedDeltaNet2(num_heads=2, head_dim=4)
    x = jax.ShapeDtypeStruct((1, 4, 16), jnp.float32)

    def init(layer):
        return jax.eval_shape(layer.init, jax.random.key(0), x)

    with nn.logical_axis_rules((("width", "tensor"), ("batch", "data"))):
        with pytest.warns(
            UserWarning, match="none of embed, heads, mlp: all parameters will be re"
        ):
            init(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            names = ("width", None)
            init(layer.clone(kernel_init=nn.with_logical_partitioning(nn.initializers.ones, names)))
    names = ("embed", "heads", "kv")
    of_attention = nn.with_logical_partitioning(nn.initializers.ones, names)
    with pytest.raises(ValueError, match="^kernel_init: expected names of two axes"):
        init(layer.clone(kernel_init=of_attention))
