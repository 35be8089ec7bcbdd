"""A layer's weights: an independent PyTorch-shaped forward in NumPy is the judge."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from gdn2_jax import GatedDeltaNet2
from gdn2_jax.interop import nnx as nnx_mixers
from gdn2_jax.interop.pytorch import layer_from_pytorch, layer_to_pytorch
from gdn2_jax.layers import Attention, GatedDeltaNet, KimiDeltaAttention, Mamba3

WIDTH, HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, TAPS = 12, 2, 4, 8, 4, 4
OPTIONS = {
    "num_heads": HEADS,
    "num_value_heads": VALUE_HEADS,
    "head_dim": KEY_DIM,
    "expand_v": VALUE_DIM / KEY_DIM,
    "implementation": "recurrent",
}
KEYS, VALUES = HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
# The tables of the paper's repository and of flash-linear-attention.
SHAPES = {
    "A_log": (HEADS,),
    "dt_bias": (KEYS,),
    **{f"{name}_proj.weight": (KEYS, WIDTH) for name in "qkb"},
    **{f"{name}_proj.weight": (VALUES, WIDTH) for name in "vw"},
    **{f"{name}_conv1d.weight": (KEYS, 1, TAPS) for name in "qk"},
    "v_conv1d.weight": (VALUES, 1, TAPS),
    "f_proj.0.weight": (VALUE_DIM, WIDTH),
    "f_proj.1.weight": (KEYS, VALUE_DIM),
    "g_proj.0.weight": (VALUE_DIM, WIDTH),
    "g_proj.1.weight": (VALUES, VALUE_DIM),
    "g_proj.1.bias": (VALUES,),
    "o_norm.weight": (VALUE_DIM,),
    "o_proj.weight": (WIDTH, VALUES),
}


def random_tensors(shapes, dtype=np.float32):
    rng = np.random.default_rng(1)
    return {name: (0.5 * rng.normal(size=s)).astype(dtype) for name, s in shapes.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pytorch_layer(p, x, output_gate):
    """The layer as its PyTorch code has it: x W^T, [channels, 1, taps], heads by repetition."""
    p = {name: array.astype(np.float64) for name, array in p.items()}
    steps = len(x)

    def linear(name):
        return x @ p[f"{name}.weight"].T

    def convolved(name):
        u = np.pad(linear(f"{name}_proj"), ((TAPS - 1, 0), (0, 0)))
        taps = p[f"{name}_conv1d.weight"][:, 0]
        y = np.stack([(u[t : t + TAPS].T * taps).sum(-1) for t in range(steps)])
        return y * sigmoid(y)

    q, k = (convolved(name).reshape(steps, HEADS, KEY_DIM) for name in "qk")
    q, k = (u / np.sqrt((u**2).sum(-1, keepdims=True) + 1e-6) for u in (q, k))
    v, w = convolved("v"), sigmoid(linear("w_proj"))
    v, w = (u.reshape(steps, VALUE_HEADS, VALUE_DIM) for u in (v, w))
    f = linear("f_proj.0") @ p["f_proj.1.weight"].T + p["dt_bias"]
    g = -np.exp(p["A_log"])[:, None] * np.logaddexp(0, f).reshape(steps, HEADS, KEY_DIM)
    b = sigmoid(linear("b_proj")).reshape(steps, HEADS, KEY_DIM)
    q, k, g, b = (np.repeat(u, VALUE_HEADS // HEADS, axis=1) for u in (q, k, g, b))
    state, o = np.zeros((VALUE_HEADS, KEY_DIM, VALUE_DIM)), np.zeros(v.shape)
    for t in range(steps):
        state = state * np.exp(g[t])[..., None]
        new = w[t] * v[t] - ((b[t] * k[t])[..., None] * state).sum(1)
        state = state + k[t][..., None] * new[:, None]
        o[t] = (q[t][..., None] * state).sum(1) / np.sqrt(KEY_DIM)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * p["o_norm.weight"]
    z = (linear("g_proj.0") @ p["g_proj.1.weight"].T + p["g_proj.1.bias"]).reshape(o.shape)
    o = o * sigmoid(z) * (z if output_gate == "silu" else 1)
    return o.reshape(steps, -1) @ p["o_proj.weight"].T


@pytest.mark.parametrize("output_gate", ["silu", "sigmoid"])
def test_layer_computes_what_the_pytorch_layer_does(output_gate):
    tensors = random_tensors(SHAPES)
    x = np.random.default_rng(2).normal(size=(7, WIDTH)).astype(np.float32)
    layer = GatedDeltaNet2(**OPTIONS, output_gate=output_gate)
    params = layer_from_pytorch(layer, tensors)
    actual = jax.jit(layer.apply)({"params": params}, x[None])[0]
    expected = pytorch_layer(tensors, x.astype(np.float64), output_gate)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_names_of_wrapped_modules_and_tensors_that_nothing_reads_are_understood(random_params):
    layer = GatedDeltaNet(**OPTIONS)
    params = random_params(layer, jnp.zeros((1, 3, WIDTH)))
    tensors = layer_to_pytorch(layer, params, prefix="module.model._orig_mod.attn.")
    # As flash-linear-attention's layer had it until February 2025.
    tensors["module.model._orig_mod.attn.D"] = np.ones(VALUE_HEADS, np.float32)
    for prefix in ("model.attn.", "module.model.attn."):
        back = layer_from_pytorch(layer, tensors, prefix=prefix)
        jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(
        ValueError, match="^tensors: expected one model.attn.D, got one more as mod"
    ):
        layer_from_pytorch(layer, {"model.attn.D": np.ones(2)} | tensors, prefix="model.attn.")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_round_trip_is_exact_and_keeps_dtypes(dtype):
    tensors = random_tensors(SHAPES, dtype)
    tensors["A_log"] = tensors["A_log"].astype(np.float32)
    layer = GatedDeltaNet2(**OPTIONS)
    params = layer_from_pytorch(
        layer, {f"h.0.attn.{n}": t for n, t in tensors.items()}, prefix="h.0.attn."
    )
    assert params["q_proj"]["kernel"].dtype == dtype and params["A_log"].dtype == jnp.float32
    back = layer_to_pytorch(layer, params, prefix="attn.")
    assert back.keys() == {f"attn.{name}" for name in SHAPES}
    for name, tensor in tensors.items():
        assert back[f"attn.{name}"].dtype == tensor.dtype
        assert back[f"attn.{name}"].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize(
    "layer",
    [
        GatedDeltaNet2(**OPTIONS, use_short_conv=False),
        KimiDeltaAttention(**OPTIONS),
        GatedDeltaNet(**OPTIONS),
        GatedDeltaNet(**OPTIONS, use_decay=False),
        Attention(num_heads=3),
    ],
    ids=["gdn2-without-convolutions", "kda", "gdn", "deltanet", "attention"],
)
def test_other_layers_lose_nothing_on_a_round_trip(layer, random_params):
    params = random_params(layer, jnp.zeros((1, 3, WIDTH)))
    tensors = layer_to_pytorch(layer, params)
    assert len(tensors) == len(jax.tree.leaves(params))
    back = layer_from_pytorch(layer, tensors)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_kda_and_gdn_tensors_have_the_shapes_of_flash_linear_attention(random_params):
    def shapes(layer):
        tensors = layer_to_pytorch(layer, random_params(layer, jnp.zeros((1, 3, WIDTH))))
        return {name: tensor.shape for name, tensor in tensors.items()}

    decays = VALUE_HEADS * KEY_DIM
    kda = SHAPES | {
        "b_proj.weight": (VALUE_HEADS, WIDTH),
        "f_proj.1.weight": (decays, VALUE_DIM),
        "A_log": (VALUE_HEADS,),
        "dt_bias": (decays,),
    }
    del kda["w_proj.weight"]
    assert shapes(KimiDeltaAttention(**OPTIONS)) == kda
    gdn = {name: shape for name, shape in kda.items() if name[:6] not in ("f_proj", "g_proj")}
    gdn |= {"a_proj.weight": (VALUE_HEADS, WIDTH), "dt_bias": (VALUE_HEADS,)}
    gdn |= {"g_proj.weight": (VALUES, WIDTH)}
    assert shapes(GatedDeltaNet(**OPTIONS)) == gdn


def test_one_error_lists_all_that_does_not_fit():
    tensors = random_tensors(SHAPES)
    del tensors["w_proj.weight"], tensors["A_log"]
    tensors["q_conv1d.bias"] = np.zeros(KEYS, np.float32)
    tensors["k_proj.weight"] = tensors["k_proj.weight"].T
    with pytest.raises(ValueError) as error:
        layer_from_pytorch(GatedDeltaNet2(**OPTIONS), tensors)
    assert str(error.value) == (
        "tensors do not fit the model: missing: A_log, w_proj.weight; "
        "not expected: q_conv1d.bias; "
        "of a wrong shape: k_proj.weight (expected (16, 12), got (12, 16))"
    )


def test_other_things_are_named():
    layer, tensors = GatedDeltaNet2(**OPTIONS), random_tensors(SHAPES)
    with pytest.raises(ValueError, match="^attn.o_proj.weight: expected a matrix, got none"):
        layer_from_pytorch(layer, tensors, prefix="attn.")
    with pytest.raises(ValueError, match="^o_proj.weight: expected a matrix, got shape"):
        layer_from_pytorch(layer, tensors | {"o_proj.weight": np.float32(1)})
    whole_numbers = tensors["q_proj.weight"].astype(np.int32)
    with pytest.raises(ValueError, match=r"not of floats: q_proj.weight \(int32\)$"):
        layer_from_pytorch(layer, tensors | {"q_proj.weight": whole_numbers})
    with pytest.raises(TypeError, match="expected a linen module, one of GatedDeltaNet2, .*Mamba3"):
        layer_from_pytorch(Mamba3(num_heads=2), tensors)
    with pytest.raises(TypeError, match="^layer: expected num_householder 1, got 2: "):
        layer_from_pytorch(GatedDeltaNet(num_heads=2, num_householder=2), tensors)
    with pytest.raises(TypeError, match="^layer: expected write_gate 'channel', .*got 'tied'"):
        layer_from_pytorch(GatedDeltaNet2(num_heads=2, write_gate="tied"), tensors)
    with pytest.raises(TypeError, match="^layer: expected erase_gate 'channel', .*got 'scalar'"):
        layer_to_pytorch(GatedDeltaNet2(num_heads=2, erase_gate="scalar"), {})
    module = nnx_mixers.GatedDeltaNet2(in_features=WIDTH, rngs=nnx.Rngs(0), **OPTIONS)
    with pytest.raises(TypeError, match="a linen module, .*got gdn2_jax.interop.nnx.GatedDelta"):
        layer_from_pytorch(module, tensors)
    with pytest.raises(TypeError, match="^params: expected dicts of arrays, as .*nnx.to_pure_dict"):
        layer_to_pytorch(layer, nnx.state(module, nnx.Param))


def test_parameters_of_another_layer_are_not_written(random_params):
    layer, x = GatedDeltaNet2(**OPTIONS), jnp.zeros((1, 3, WIDTH))
    params = random_params(layer, x)
    with pytest.raises(ValueError, match="^params: expected a layer's with o_proj, got params$"):
        layer_to_pytorch(layer, {"params": params})
    with pytest.raises(ValueError, match="^params do not fit the model: missing: w_proj/kernel; "):
        layer_to_pytorch(layer, random_params(KimiDeltaAttention(**OPTIONS), x))
    with pytest.raises(ValueError, match="not expected: w_proj/kernel; of a wrong shape: A_log"):
        layer_to_pytorch(KimiDeltaAttention(**OPTIONS), params)


def test_an_nnx_module_takes_and_gives_pytorch_tensors():
    module, other = (
        nnx_mixers.GatedDeltaNet2(in_features=WIDTH, rngs=nnx.Rngs(seed), **OPTIONS)
        for seed in (0, 1)
    )
    tensors = layer_to_pytorch(module.linen, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    nnx.update(other, layer_from_pytorch(other.linen, tensors))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(module))


def test_pytorch_tensors_are_taken_as_they_are():
    torch = pytest.importorskip("torch")
    tensors = random_tensors(SHAPES, ml_dtypes.bfloat16)
    theirs = {n: torch.tensor(t.astype(np.float32)).bfloat16() for n, t in tensors.items()}
    layer = GatedDeltaNet2(**OPTIONS)
    back = layer_to_pytorch(layer, layer_from_pytorch(layer, theirs))
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)
