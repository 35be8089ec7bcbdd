import dataclasses
import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gdn2_jax.layers import GatedDeltaNet2, SlidingWindowAttention, SwiGLU
from gdn2_jax.models import PRESETS, DeltaRule, LanguageModel
from gdn2_jax.models.sizes import abstract_variables


def tokens(*shape):
    return jax.random.randint(jax.random.key(2), shape, 0, 31)


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, *args):
    return LanguageModel(config).apply({"params": params}, *args)


def loss(config, params, ids):
    return jnp.mean(jnp.square(LanguageModel(config).apply({"params": params}, ids)))


def test_model_is_its_blocks_in_order(small_model):
    config, params = small_model
    ids = tokens(2, 12)

    def norm(scale, x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * scale

    @jax.jit
    def by_hand(params, ids):
        gdn2 = GatedDeltaNet2(num_heads=2, head_dim=8, implementation="recurrent")
        attention = SlidingWindowAttention(num_heads=2, window_size=4)
        x = params["embed"]["embedding"][ids]
        for layer in range(4):
            hybrid = "attention_block" in params["layers"]
            name = "attention_block" if hybrid and layer % 2 else "block"
            index = layer // 2 if hybrid else layer
            p = jax.tree.map(operator.itemgetter(index), params["layers"][name])
            mixer = attention if name == "attention_block" else gdn2
            x += mixer.apply({"params": p["mixer"]}, norm(p["mixer_norm"]["scale"], x))
            x += SwiGLU(24).apply({"params": p["mlp"]}, norm(p["mlp_norm"]["scale"], x))
        return norm(params["final_norm"]["scale"], x) @ params["lm_head"]["kernel"]

    expected = by_hand(params, ids)
    np.testing.assert_allclose(apply(config, params, ids), expected, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "elementwise", "full"])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("decode", [False, True])
def test_parameter_tree_depends_neither_on_how_it_is_compiled_nor_on_decoding(
    hybrid_model, remat, unroll, decode
):
    config, params = hybrid_model
    config = dataclasses.replace(config, remat=remat, unroll=unroll)
    model = LanguageModel(config, decode=decode)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens(1, 3))["params"]
    assert jax.tree.map(lambda p: (p.shape, p.dtype), shapes) == jax.tree.map(
        lambda p: (p.shape, p.dtype), params
    )


@functools.cache
def plain_gradients(config):
    return jax.jit(jax.value_and_grad(functools.partial(loss, config)))


def assert_gradients_close(actual, expected):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())

    jax.tree.map(compare, *jax.device_get((actual, expected)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "unroll"),
    [
        ("intermediates", True),
        ("elementwise", False),
        ("mixer", True),
        ("full", False),
    ],
)
def test_gradients_are_the_same_whatever_is_recomputed(hybrid_model, remat, unroll):
    # In float64: the rounding of float32 is greater than some gradients.
    with jax.enable_x64(True):
        config = dataclasses.replace(hybrid_model[0], dtype="float64", param_dtype="float64")
        params = jax.tree.map_with_path(
            lambda path, x: x if path[-1].key in ("A_log", "dt_bias") else x.astype(np.float64),
            hybrid_model[1],
        )
        recomputing = dataclasses.replace(config, remat=remat, unroll=unroll)
        _, kept = plain_gradients(config)(params, tokens(4, 6))
        _, recomputed = plain_gradients(recomputing)(params, tokens(4, 6))
        for a, b in zip(jax.tree.leaves(recomputed), jax.tree.leaves(kept), strict=True):
            np.testing.assert_allclose(
                a, b, atol=(1e-12 if b.dtype == "float64" else 1e-6) * np.abs(b).max()
            )


@pytest.mark.slow
def test_remat_keeps_less_between_the_passes(hybrid_model):
    config, params = hybrid_model

    def temporary_bytes(remat):
        gradient = jax.grad(functools.partial(loss, dataclasses.replace(config, remat=remat)))
        compiled = jax.jit(gradient).lower(params, tokens(4, 128)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < 0.8 * temporary_bytes("none")


def kept_for_the_backward(config, ids):
    """Shapes and dtypes that a layer of the forward hands to the backward, and the computation."""
    params = abstract_variables(config, config.context_length)["params"]
    jaxpr = jax.make_jaxpr(jax.value_and_grad(functools.partial(loss, config)))(params, ids)
    pairs = config.num_layers // 2
    forward = next(
        equation
        for equation in jaxpr.eqns
        if equation.primitive.name == "scan" and equation.params["length"] == pairs
    )
    stacked = [x.aval for x in forward.outvars if x.aval.shape[:1] == (pairs,)]
    return [(x.shape[1:], x.dtype) for x in stacked], jaxpr


def count_kernels(jaxpr, name):
    return sum(
        (equation.params.get("name") == name)
        + sum(
            count_kernels(inner, name)
            for inner in jax.extend.core.jaxprs_in_params(equation.params)
        )
        for equation in jaxpr.eqns
    )


@pytest.mark.slow
def test_each_remat_policy_keeps_less_than_the_one_before_and_reruns_no_operator_but_full(
    hybrid_model,
):
    sizes = {"d_model": 96, "num_layers": 10, "mlp_dim": 200}
    sizes["mixer"] = DeltaRule(num_heads=1, head_dim=128)
    kernels = {"dtype": "bfloat16", "implementation": "pallas"}
    config = dataclasses.replace(hybrid_model[0], **sizes, **kernels)
    ids = tokens(2, 64)
    wide, narrow, hidden = (2, 64, 96), jnp.dtype("bfloat16"), (2, 64, 200)
    kept_bytes = []
    for remat in ("none", "intermediates", "elementwise", "mixer", "full"):
        kept, jaxpr = kept_for_the_backward(dataclasses.replace(config, remat=remat), ids)
        kept_bytes.append(sum(math.prod(shape) * dtype.itemsize for shape, dtype in kept))
        runs = count_kernels(jaxpr, "intra_chunk_forward_kernel")
        assert runs == (2 if remat == "full" else 1)
        if remat == "intermediates":
            # Of both blocks: gate, up, and their product; the stream alone is float32.
            assert kept.count((hidden, narrow)) == 6
            assert kept.count((wide, jnp.dtype("float32"))) == 2
        if remat == "elementwise":
            assert kept.count((hidden, narrow)) == 4
        if remat in ("mixer", "full"):
            assert kept.count((hidden, narrow)) == 0
        if remat == "full":
            assert kept == [(wide, jnp.dtype("float32"))] * 2
    assert all(more > 1.2 * less for more, less in itertools.pairwise(kept_bytes))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_model_keeps_parameters_stream_and_logits_in_float32(hybrid_model, dtype):
    config, params = hybrid_model
    ids = tokens(2, 12)
    narrow = LanguageModel(dataclasses.replace(config, dtype=dtype))
    shapes = jax.eval_shape(narrow.init, jax.random.key(0), ids)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    run = jax.jit(
        functools.partial(narrow.apply, capture_intermediates=True, mutable="intermediates")
    )
    logits, kept = run({"params": params}, ids)
    kept = kept["intermediates"]
    layers = kept["layers"]
    assert logits.dtype == jnp.float32
    for block in ("block", "attention_block"):
        assert layers[block]["__call__"][0].dtype == jnp.float32
        assert layers[block]["mixer_norm"]["__call__"][0].dtype == dtype
        assert layers[block]["mixer"]["__call__"][0].dtype == dtype
        assert layers[block]["mlp"]["__call__"][0].dtype == dtype
    wide = apply(config, params, ids)
    np.testing.assert_allclose(logits, wide, atol=0.1 * jnp.abs(wide).max())


def test_segments_isolate_documents(hybrid_model):
    config, params = hybrid_model
    ids = tokens(1, 12)
    segment_ids = jnp.array([[1] * 5 + [2] * 7])
    with jax.enable_x64(True):
        config = dataclasses.replace(config, dtype="float64")
        packed = apply(config, params, ids, segment_ids)
        # What follows a document changes nothing.
        first, second = (apply(config, params, np.roll(ids, -start, axis=1)) for start in (0, 5))
        np.testing.assert_allclose(packed[:, :5], first[:, :5], atol=1e-10)
        np.testing.assert_allclose(packed[:, 5:], second[:, :7], atol=1e-10)


def test_model_is_causal(hybrid_model):
    config, params = hybrid_model
    ids = tokens(2, 12)
    changed = ids.at[:, 6].add(1) % 31
    before, after = apply(config, params, ids), apply(config, params, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert jnp.all(jnp.any(before[:, 6:] != after[:, 6:], axis=-1))


def test_decoding_equals_the_full_forward(hybrid_model):
    config, params = hybrid_model
    ids = tokens(2, 12)
    full = apply(config, params, ids)
    model = LanguageModel(config, decode=True)
    run = jax.jit(lambda variables, ids: model.apply(variables, ids, mutable=["cache"]))
    variables = {"params": params}
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 11), (11, 12)]:
        logits, cache = run(variables, ids[:, start:stop])
        np.testing.assert_allclose(logits, full[:, start:stop], atol=1e-5)
        variables = {"params": params, **cache}


def test_cache_does_not_grow_with_the_number_of_tokens(hybrid_model):
    config, params = hybrid_model
    model = LanguageModel(config, decode=True)

    def cache(length):
        _, variables = jax.eval_shape(
            lambda: model.apply({"params": params}, tokens(1, length), mutable=["cache"])
        )
        return jax.tree.map(lambda leaf: leaf.shape, variables)

    assert cache(3) == cache(300)


def test_last_only_gives_the_last_logits(hybrid_model):
    config, params = hybrid_model
    ids = tokens(2, 12)
    run = jax.jit(functools.partial(LanguageModel(config).apply, last_only=True))
    last = run({"params": params}, ids)
    np.testing.assert_allclose(last, apply(config, params, ids)[:, -1:], atol=1e-5)


def test_initial_parameters_are_depth_scaled_where_they_should_be(hybrid_model):
    config, _ = hybrid_model
    config = dataclasses.replace(config, d_model=64, mlp_dim=96)
    params = jax.jit(LanguageModel(config).init)(jax.random.key(0), tokens(1, 1))
    params = jax.device_get(params)["params"]

    def bound(leaf):
        return float(np.abs(leaf).max())

    deep = math.sqrt(2 * 4)
    expected = {"lm_head": 1 / 8}
    actual = {"lm_head": bound(params["lm_head"]["kernel"])}
    for name, block in params["layers"].items():
        mlp, mixer = block["mlp"], block["mixer"]
        expected |= {f"{name}/up": 1 / 8, f"{name}/gate": 1 / 8}
        expected[f"{name}/down"] = 96**-0.5 / deep
        for part in ("up", "gate", "down"):
            actual[f"{name}/{part}"] = bound(mlp[f"{part}_proj"]["kernel"])
        fan_out = 2**-2.5 * math.sqrt(6 / (64 + 16))
        attention = name == "attention_block"
        expected[f"{name}/q"] = 1 / 8 if attention else fan_out
        expected[f"{name}/o"] = 1 / 8 / deep if attention else fan_out
        for part in "qo":
            actual[f"{name}/{part}"] = bound(mixer[f"{part}_proj"]["kernel"])
        # Layers are drawn apart from each other.
        assert not np.array_equal(mlp["up_proj"]["kernel"][0], mlp["up_proj"]["kernel"][1])
    for name, value in expected.items():
        assert 0.97 * value < actual[name] <= 1.0001 * value, name
    assert abs(params["embed"]["embedding"].std() - 0.02) < 1e-3


@pytest.mark.slow
def test_sharded_batches_give_the_logits_and_gradients_of_one_device(hybrid_model):
    config, params = hybrid_model
    ids = tokens(4, 6)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])
    spec = PartitionSpec("data")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec()
    )
    def sharded(params, ids):
        value, gradient = jax.value_and_grad(functools.partial(loss, config))(params, ids)
        return jax.lax.pmean(value, "data"), gradient

    value, gradient = sharded(params, ids)
    whole, expected = plain_gradients(config)(params, ids)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    # Inside shard_map the gradient of a replicated parameter is summed over the mesh.
    assert_gradients_close(jax.tree.map(lambda leaf: leaf / 2, jax.device_get(gradient)), expected)


@pytest.mark.slow
def test_the_mesh_that_jax_makes_by_default_gives_the_gradients_of_one_device(hybrid_model):
    """Of Explicit axes: rows, the projections' two axes and the width of the table are split."""
    config, params = hybrid_model
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), devices=jax.devices()[:4])

    def spec(path, leaf):
        name = jax.tree_util.keystr(path)
        if "proj" in name and leaf.ndim == 3:
            names = ("rows", "columns")
            return PartitionSpec(None, *(names[::-1] if "o_proj" in name else names))
        return PartitionSpec(None, "columns") if "embedding" in name else PartitionSpec()

    gradients = plain_gradients(config)
    whole, expected = gradients(params, tokens(4, 6))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, jax.tree.map_with_path(spec, params))
        value, gradient = gradients(placed, jax.device_put(tokens(4, 6), PartitionSpec("rows")))
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(jax.device_get(gradient)), jax.tree.leaves(expected)):
        assert np.linalg.norm(x - y) < 1e-4 * np.linalg.norm(y)


@pytest.mark.parametrize(("remat", "unroll"), [("full", False), ("intermediates", True)])
def test_a_large_model_lowers_for_gpus_on_this_host(remat, unroll):
    config = dataclasses.replace(PRESETS["swa_gdn2_1.3B"], remat=remat, unroll=unroll)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    params = abstract_variables(config, config.context_length)["params"]
    gradient = jax.jit(jax.grad(functools.partial(loss, config)))
    assert gradient.trace(params, ids).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "ids", [np.zeros(3, np.int32), np.zeros((1, 0), np.int32), np.zeros((1, 3), np.float32)]
)
def test_malformed_tokens_are_named(hybrid_model, ids):
    with pytest.raises(ValueError, match="^tokens: expected .*got"):
        jax.eval_shape(LanguageModel(hybrid_model[0]).init, jax.random.key(0), ids)


def test_malformed_segments_are_named(hybrid_model):
    config, params = hybrid_model
    with pytest.raises(ValueError, match="^segment_ids: expected .*got"):
        LanguageModel(config).apply({"params": params}, tokens(1, 4), tokens(1, 3))
