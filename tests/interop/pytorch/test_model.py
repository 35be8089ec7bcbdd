"""Whole models in the styles of the paper's repository and of flash-linear-attention."""

import dataclasses
import json
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gdn2_jax.interop.pytorch import (
    StoredTensor,
    convert_pretrained,
    load_pretrained,
    open_tensors,
    save_pretrained,
    write_tensors,
)
from gdn2_jax.interop.pytorch.convert import leaves_of_params, tensors_of_leaves
from gdn2_jax.interop.pytorch.layouts import model_entries
from gdn2_jax.models import PRESETS, DeltaRule, LanguageModel, ModelConfig, SoftmaxAttention
from gdn2_jax.models.sizes import abstract_variables

TOKENS = jnp.zeros((1, 1), jnp.int32)


# Heads of width 128, as the paper's style cannot tell.
ATTENTION = SoftmaxAttention(num_heads=2)


def config_of(hybrid=False, **mixer):
    return ModelConfig(
        vocab_size=11,
        d_model=256,
        num_layers=4,
        mixer=DeltaRule(**{"num_heads": 2, "head_dim": 8, "output_gate": "silu"} | mixer),
        hybrid=hybrid,
        attention=ATTENTION,
        mlp_dim=24,
        dtype="float32",
    )


def with_gate(config, gate):
    mixer = dataclasses.replace(config.mixer, output_gate=gate)
    return dataclasses.replace(config, mixer=mixer)


@pytest.fixture
def make(random_params):
    """A function of options: a configuration and parameters."""

    def build(dtype=None, **options):
        config = config_of(**options)
        params = random_params(LanguageModel(config), TOKENS)
        if dtype is not None:
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return config, params

    return build


def tensors_of(config, params, style):
    entries = model_entries(config, style)
    return tensors_of_leaves(leaves_of_params(params, entries), entries)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("preset", ["gdn2_1.3B", "swa_gdn2_1.3B"])
def test_the_papers_models_have_the_tensors_of_its_repository(preset):
    config = PRESETS[preset]
    params = abstract_variables(config, 1)["params"]
    shapes = {name: t.shape for name, t in tensors_of(config, params, "paper").items()}
    assert len(shapes) == {"gdn2_1.3B": 399, "swa_gdn2_1.3B": 264}[preset]
    total = sum(np.prod(shape) for shape in shapes.values())
    assert total == {"gdn2_1.3B": 1_450_096_416, "swa_gdn2_1.3B": 1_447_772_688}[preset]
    width, mlp = 2304, {"gdn2_1.3B": 6208, "swa_gdn2_1.3B": 6784}[preset]
    expected = {
        "lm_head.weight": (32000, width),
        "transformer.wte.weight": (32000, width),
        "transformer.ln_f.weight": (width,),
        "transformer.h.16.norm_1.weight": (width,),
        "transformer.h.17.norm_2.weight": (width,),
        "transformer.h.16.attn.A_log": (16,),
        "transformer.h.16.attn.dt_bias": (2048,),
        "transformer.h.16.attn.q_conv1d.weight": (2048, 1, 4),
        "transformer.h.16.attn.f_proj.0.weight": (128, width),
        "transformer.h.16.attn.g_proj.1.bias": (2048,),
        "transformer.h.16.attn.o_proj.weight": (width, 2048),
        "transformer.h.3.mlp.swiglu.w1.weight": (mlp, width),
        "transformer.h.3.mlp.swiglu.w3.weight": (width, mlp),
    }
    if preset == "swa_gdn2_1.3B":
        expected |= {
            "transformer.h.3.attn.attn.weight": (6912, width),
            "transformer.h.3.attn.proj.weight": (width, width),
        }
    assert {name: shapes.get(name) for name in expected} == expected


def test_layers_heads_and_the_rows_of_the_fused_attention_are_where_they_belong(make):
    config, params = make(hybrid=True)
    tensors = {name: t.read() for name, t in tensors_of(config, params, "paper").items()}
    layers = params["layers"]
    attention = layers["attention_block"]["mixer"]
    fused = tensors["transformer.h.3.attn.attn.weight"]
    # For each head 128 rows of q, then k, then v.
    for head in range(2):
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = fused[384 * head + 128 * part :][:128]
            kernel = attention[name]["kernel"][1]
            np.testing.assert_array_equal(rows, kernel[:, 128 * head : 128 * (head + 1)].T)
    mixer = layers["block"]["mixer"]
    np.testing.assert_array_equal(
        tensors["transformer.h.2.attn.b_proj.weight"], mixer["b_proj"]["kernel"][1].T
    )
    np.testing.assert_array_equal(
        tensors["transformer.h.2.attn.dt_bias"], mixer["dt_bias"][1].reshape(-1)
    )
    theirs = {name: t.read() for name, t in tensors_of(config, params, "fla").items()}
    np.testing.assert_array_equal(
        theirs["model.layers.3.attn.k_proj.weight"], attention["k_proj"]["kernel"][1].T
    )
    for ours, name in (("gate_proj", "w1"), ("up_proj", "w2"), ("down_proj", "w3")):
        kernel = layers["attention_block"]["mlp"][ours]["kernel"][0]
        np.testing.assert_array_equal(
            tensors[f"transformer.h.1.mlp.swiglu.{name}.weight"], kernel.T
        )
        np.testing.assert_array_equal(theirs[f"model.layers.1.mlp.{ours}.weight"], kernel.T)


@pytest.mark.filterwarnings("ignore:the model gates its output")
@pytest.mark.parametrize("hybrid", [False, True], ids=["recurrent", "hybrid"])
@pytest.mark.parametrize(
    ("style", "name", "options"),
    [
        ("fla", "m", {"shard_bytes": 200_000}),
        ("fla", "m", {"file_format": "bin"}),
        ("fla", "m/model.safetensors", {}),
        ("fla", "gdn2_1.3B", {}),
        ("paper", "m.pth", {}),
        ("paper", "m.safetensors", {}),
    ],
)
def test_a_saved_model_is_loaded_as_it_was(tmp_path, make, hybrid, style, name, options):
    config, params = make(hybrid=hybrid)
    files = save_pretrained(tmp_path / name, config, params, style=style, **options)
    assert all(file.is_file() for file in files)
    loaded = load_pretrained(tmp_path / name)
    if style == "paper":
        assert dataclasses.replace(with_gate(loaded.config, "silu"), dtype="float32") == config
    elif hybrid:
        assert loaded.config == config
    else:  # No attention to describe.
        assert dataclasses.replace(loaded.config, attention=ATTENTION) == config
    assert_same(loaded.params, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_are_kept_and_the_model_computes_in_them(tmp_path, make, dtype):
    config, params = make(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16, kind="kda")
    params["layers"]["block"]["mixer"]["A_log"] = np.zeros((4, 2), np.float32)
    save_pretrained(tmp_path, with_gate(config, None), params)
    loaded = load_pretrained(tmp_path)
    assert_same(loaded.params, params)
    assert loaded.config.dtype == dtype and loaded.config.mixer.output_gate is None
    logits = jax.jit(LanguageModel(loaded.config).apply)({"params": loaded.params}, TOKENS)
    assert logits.shape == (1, 1, 11)


@pytest.mark.filterwarnings("ignore:the model gates its output")
def test_from_style_to_style_and_back_not_a_bit_changes(tmp_path, make):
    config, params = make(hybrid=True, num_value_heads=4, expand_v=0.5)
    save_pretrained(tmp_path / "a.pth", config, params, style="paper")
    convert_pretrained(tmp_path / "a.pth", tmp_path / "fla", config=config, shard_bytes=300_000)
    convert_pretrained(tmp_path / "fla", tmp_path / "b.pth", style="paper")
    before, after = open_tensors(tmp_path / "a.pth"), open_tensors(tmp_path / "b.pth")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].read().tobytes() == tensor.read().tobytes(), name
    assert len(list((tmp_path / "fla").glob("model-*-of-*.safetensors"))) > 2


def test_the_output_gate_follows_the_checkpoint(tmp_path, make):
    config, params = make()
    message = "output with silu, the fla style's own gdn2 .* sigmoid"
    with pytest.warns(UserWarning, match=message) as caught:
        save_pretrained(tmp_path / "ours", config, params)
    assert caught[0].filename == __file__
    assert load_pretrained(tmp_path / "ours").config.mixer.output_gate == "silu"
    # A checkpoint of fla itself has no such entry.
    description = tmp_path / "ours" / "config.json"
    content = json.loads(description.read_text())
    del content["output_gate_activation"]
    description.write_text(json.dumps(content))
    assert load_pretrained(tmp_path / "ours").config.mixer.output_gate == "sigmoid"
    sigmoid = with_gate(config, "sigmoid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(tmp_path / "sigmoid", sigmoid, params)
        save_pretrained(tmp_path / "silu.pth", config, params, style="paper")
    assert load_pretrained(tmp_path / "sigmoid").config.mixer.output_gate == "sigmoid"


def test_a_tied_head_is_the_embedding(tmp_path, make):
    config, params = make(output_gate="sigmoid")
    tensors = tensors_of(config, params, "fla")
    save_pretrained(tmp_path / "whole", config, params)
    content = json.loads((tmp_path / "whole" / "config.json").read_text())
    del tensors["lm_head.weight"]
    write_tensors(tmp_path / "tied", tensors)
    (tmp_path / "tied" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="missing: lm_head.weight$"):
        load_pretrained(tmp_path / "tied")
    (tmp_path / "tied" / "config.json").write_text(
        json.dumps(content | {"tie_word_embeddings": True})
    )
    for given in (None, config):
        loaded = load_pretrained(tmp_path / "tied", config=given).params
        np.testing.assert_array_equal(loaded["lm_head"]["kernel"].T, loaded["embed"]["embedding"])


def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path, make):
    config, params = make(hybrid=True)
    tensors = dict(tensors_of(config, params, "paper"))
    del tensors["transformer.h.3.norm_2.weight"], tensors["transformer.h.0.attn.f_proj.1.weight"]
    zeros = np.zeros((5, 256), np.float32)
    stored = StoredTensor(zeros.shape, zeros.dtype, lambda: zeros)
    tensors |= {
        "transformer.h.1.attn.attn.bias": stored,
        "transformer.h.1.attn.attn.weight": stored,
    }
    write_tensors(tmp_path / "m.pt", tensors)
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "m.pt")
    assert str(error.value) == (
        "tensors do not fit the model: "
        "missing: transformer.h.0.attn.f_proj.1.weight, transformer.h.3.norm_2.weight; "
        "not expected: transformer.h.1.attn.attn.bias; of a wrong shape: "
        "transformer.h.1.attn.attn.weight (expected (768, 256), got (5, 256))"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"model_type": "llama"},
            "^model_type: llama is not supported, .* one of gdn2, kda, gated_deltanet, mamba2$",
        ),
        (
            {"gate_everything": 0, "nothing": None, "norm_first": True},
            "norm_first: expected False, got True; gate_everything: expected no such key, got 0$",
        ),
        ({"lower_bound": -5.0}, "lower_bound: expected None as in fla's gdn2 layer, got -5.0"),
        ({"safe_gate": True}, "lower_bound: expected a number beside safe_gate, got None"),
        ({"allow_neg_eigval": "yes"}, "allow_neg_eigval: expected true or false, got 'yes'"),
        (
            {"output_gate_activation": "tanh"},
            "output_gate_activation: expected one of silu, swish, sigmoid, got 'tanh'",
        ),
        ({"output_gate": "silu"}, "output_gate_activation and output_gate: expected the same"),
        (
            {"attn": {"layers": [1, 3], "num_heads": 2, "window_size": 8, "sinks": 4}},
            "attn.sinks: expected no such key, got 4",
        ),
        ({"conv_bias": True, "hidden_act": "gelu"}, "conv_bias: .*; hidden_act: .*gelu"),
        ({"use_short_conv": False}, "use_short_conv: expected True, got False"),
        (
            {"attn": {"layers": [0], "num_heads": 2, "window_size": 8}},
            "attn.layers: expected .1, 3",
        ),
        (
            {"attn": {"layers": [1, 3], "num_heads": 2, "num_kv_heads": 1, "window_size": None}},
            "attn.num_kv_heads: expected 2, got 1; attn.window_size",
        ),
        ({"attn": {"layers": [1, 3]}}, "attn: expected layers, num_heads and window_size"),
        ({"head_dim": None}, "head_dim"),
        ({"model_type": ["gdn2"]}, "model_type: .* is not supported, expected one of"),
        (
            {"vocab_size": "32", "num_hidden_layers": 2.5, "norm_eps": None},
            "num_hidden_layers: expected an integer, got 2.5; .*norm_eps: expected a number, got",
        ),
        (
            {"attn": {"layers": [1, 3], "num_heads": "2", "window_size": 8}},
            "attn.num_heads: expected an integer, got '2'",
        ),
    ],
)
def test_configurations_of_models_that_are_not_here_are_refused(tmp_path, make, changes, named):
    config, params = make(output_gate="sigmoid")
    save_pretrained(tmp_path, config, params)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({n: v for n, v in content.items() if n != "head_dim" or v}))
    with pytest.raises(ValueError, match=named):
        load_pretrained(tmp_path)


def test_parameters_go_where_they_are_sent(tmp_path, make):
    config, params = make(output_gate="sigmoid")
    save_pretrained(tmp_path, config, params)
    mesh = jax.make_mesh((2,), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    loaded = load_pretrained(tmp_path, sharding=replicated).params
    assert all(leaf.sharding == replicated for leaf in jax.tree.leaves(loaded))
    shardings = jax.tree.map(lambda leaf: replicated, params)
    shardings["embed"]["embedding"] = NamedSharding(mesh, PartitionSpec(None, "data"))
    loaded = load_pretrained(tmp_path, sharding=shardings).params
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings
    assert_same(loaded, params)


def test_a_kda_and_a_gdn_model_of_fla_are_loaded(tmp_path, make):
    kda, params = make(kind="kda", output_gate=None, decay_lower_bound=-5.0)
    save_pretrained(tmp_path / "kda", kda, params)
    loaded = load_pretrained(tmp_path / "kda")
    assert dataclasses.replace(loaded.config, attention=ATTENTION) == kda
    assert_same(loaded.params, params)
    gdn, params = make(kind="gdn", output_gate=None, expand_v=2.0)
    save_pretrained(tmp_path / "gdn", gdn, params)
    content = json.loads((tmp_path / "gdn" / "config.json").read_text())
    # As flash-linear-attention leaves them out or null where they are its defaults.
    assert content["model_type"] == "gated_deltanet"
    (tmp_path / "gdn" / "config.json").write_text(
        json.dumps(content | {"use_gate": True, "hidden_act": "silu", "intermediate_size": None})
    )
    with pytest.raises(
        ValueError, match=r"gate_proj.weight \(expected \(768, 256\), got \(24, 256"
    ):
        load_pretrained(tmp_path / "gdn")


@pytest.mark.parametrize(
    ("style", "options", "named"),
    [
        ("fla", {"kind": "deltanet"}, "mixer: expected one of gdn2, kda, gdn"),
        ("paper", {"kind": "kda"}, "mixer: expected one of gdn2, .*paper"),
        ("fla", {"erase_gate": "scalar"}, "erase_gate: expected 'channel'"),
        ("fla", {"write_gate": "tied"}, "write_gate: expected 'channel'"),
        ("fla", {"decay_lower_bound": -5.0}, "decay_lower_bound: expected None"),
        ("paper", {"allow_negative_eigenvalues": True}, "allow_negative_eigenvalues"),
    ],
)
def test_models_that_pytorch_has_not_are_refused(tmp_path, make, style, options, named):
    config, params = make(**options)
    with pytest.raises(ValueError, match=named):
        save_pretrained(tmp_path / "m.pt", config, params, style=style)
    assert not list(tmp_path.iterdir())


def test_a_hybrid_whose_attention_has_a_convolution_is_refused(tmp_path, random_params):
    attention = SoftmaxAttention(num_heads=2, window_size=8, conv_size=4)
    config = dataclasses.replace(config_of(hybrid=True), attention=attention)
    with pytest.raises(ValueError, match=r"attention.conv_size: expected None, .*got 4"):
        save_pretrained(tmp_path / "m.pt", config, random_params(LanguageModel(config), TOKENS))


@pytest.mark.parametrize("style", ["fla", "paper"])
def test_parameters_of_another_model_are_not_saved(tmp_path, make, style):
    config, params = make(output_gate="sigmoid")
    fewer = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    for changes, other, named in (
        ({"num_layers": 2}, params, r"q_proj/kernel \(expected \(2, 256, 16\), got \(4, 256, 16"),
        ({}, {"params": params}, "missing: embed/embedding, .*not expected: params/embed"),
        ({}, fewer | {"head": params["lm_head"]}, "missing: lm_head/kernel; .*: head/kernel"),
    ):
        with pytest.raises(ValueError, match=f"^params do not fit the model: .*{named}"):
            save_pretrained(
                tmp_path / "m.pt", dataclasses.replace(config, **changes), other, style=style
            )
    with pytest.raises(ValueError, match="^style: expected one of paper, fla, got 'torch'"):
        save_pretrained(tmp_path / "m.pt", config, params, style="torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:the model gates its output")
@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("transformer.h.0.attn.dt_bias", (1,), "h.0.attn.dt_bias: expected a multiple of 2, got 1"),
        ("transformer.h.x.norm", (1,), "expected transformer.h.NUMBER, got transformer.h.x.norm"),
    ],
)
def test_shapes_that_tell_no_model_are_named(tmp_path, make, name, shape, named):
    config, params = make()
    wrong = StoredTensor(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))
    write_tensors(tmp_path / "m.pt", dict(tensors_of(config, params, "paper")) | {name: wrong})
    with pytest.raises(ValueError, match=named):
        load_pretrained(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("content", "model_type"),
    [({"ssm_cfg": {}}, "mamba1"), ({"model_type": "qwen3_next"}, "qwen3_next")],
)
def test_a_model_that_is_not_here_is_named_before_its_tensors(tmp_path, content, model_type):
    zeros = np.zeros(2, np.float32)
    write_tensors(tmp_path, {"backbone.x": StoredTensor((2,), zeros.dtype, lambda: zeros)})
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^model_type: {model_type} is not supported, expected"):
        load_pretrained(tmp_path)


def edit_config(path, **changes):
    content = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(content))


def test_options_of_fla_that_change_the_function_are_read(tmp_path, make):
    """Two checkpoints that computed another function, silently."""
    gdn, params = make(kind="gdn", output_gate=None)
    save_pretrained(tmp_path / "gdn", gdn, params)
    assert load_pretrained(tmp_path / "gdn").config.mixer.output_gate is None
    edit_config(tmp_path / "gdn", output_gate_activation="sigmoid")
    loaded = load_pretrained(tmp_path / "gdn")
    assert loaded.config.mixer.output_gate == "sigmoid"
    with pytest.warns(UserWarning, match="gates its output with sigmoid"):
        save_pretrained(tmp_path / "again", *loaded)
    assert load_pretrained(tmp_path / "again").config == loaded.config
    kda, params = make(kind="kda", output_gate=None, decay_lower_bound=-5.0)
    save_pretrained(tmp_path / "kda", kda, params)
    for safe in (True, False):
        edit_config(tmp_path / "kda", safe_gate=safe)
        assert load_pretrained(tmp_path / "kda").config.mixer.decay_lower_bound == -5.0


def test_tensors_of_compiled_models_old_layers_and_mixed_dtypes_are_loaded(tmp_path, make):
    config, params = make(kind="gdn", output_gate=None)
    save_pretrained(tmp_path / "plain", config, params)
    content = (tmp_path / "plain" / "config.json").read_text()
    tensors = {}
    for name, tensor in tensors_of(config, params, "fla").items():
        array = tensor.read()
        if name.startswith("model.layers.1.mlp."):
            array = array.astype(ml_dtypes.bfloat16)
        stored = StoredTensor(array.shape, array.dtype, lambda array=array: array)
        tensors[f"module._orig_mod.{name}"] = stored
    ones = np.ones(2, np.float32)
    for i in range(4):
        name = f"module._orig_mod.model.layers.{i}.attn.D"
        tensors[name] = StoredTensor(ones.shape, ones.dtype, lambda: ones)
    write_tensors(tmp_path / "wrapped", tensors)
    (tmp_path / "wrapped" / "config.json").write_text(content)
    loaded = load_pretrained(tmp_path / "wrapped").params

    def rounded(kernel):
        return kernel.at[1].set(kernel[1].astype(jnp.bfloat16).astype(kernel.dtype))

    mlp = params["layers"]["block"]["mlp"]
    params["layers"]["block"]["mlp"] = jax.tree.map(lambda x: rounded(jnp.asarray(x)), mlp)
    assert_same(loaded, params)


def test_other_checkpoints_are_named(tmp_path):
    zeros = np.zeros(2, np.float32)
    write_tensors(tmp_path, {"bert.x": StoredTensor((2,), zeros.dtype, lambda: zeros)})
    with pytest.raises(ValueError, match=re.escape("transformer.wte.weight or model.embeddings")):
        load_pretrained(tmp_path)


def test_memory_stays_near_one_shard(tmp_path):
    """256 MB from shards to shards of 16 MB: the peak is far from the whole."""
    code = f"""
import resource
import numpy as np
from gdn2_jax.interop.pytorch import StoredTensor, convert_pretrained, write_tensors
from gdn2_jax.interop.pytorch.config import describe
from gdn2_jax.interop.pytorch.convert import leaves_of_tensors
from gdn2_jax.interop.pytorch import model
from gdn2_jax.models import DeltaRule, ModelConfig, SoftmaxAttention
import json, pathlib

config = ModelConfig(vocab_size=64, d_model=512, num_layers=32,
    mixer=DeltaRule(num_heads=4, head_dim=64, output_gate="sigmoid"),
    attention=SoftmaxAttention(num_heads=4), mlp_dim=512, hybrid=True, dtype="float32")
entries = model.model_entries(config, "fla")
shapes = model.leaf_shapes(model.abstract_variables(config, 1)["params"], entries)
zeros = {{leaf: StoredTensor(s, np.dtype(np.float32), lambda s=s: np.ones(s, np.float32))
    for leaf, s in shapes.items()}}
tensors = model.tensors_of_leaves(zeros, entries)
shards = write_tensors({str(tmp_path / "a")!r}, tensors, shard_bytes=16_000_000)
description = json.dumps(describe(config, np.dtype("float32")))
pathlib.Path({str(tmp_path / "a")!r}, "config.json").write_text(description)
total = sum(t.bytes for t in tensors.values())
import warnings; warnings.simplefilter("ignore")
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for style, name in (("fla", "b"), ("paper", "c.pth")):
    convert_pretrained({str(tmp_path / "a")!r}, {str(tmp_path)!r} + "/" + name, style=style,
        shard_bytes=16_000_000)
print(len(shards), total, peak() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    shards, total, growth = map(int, result.stdout.split())
    assert shards > 12 and total > 2e8
    # Writing the first checkpoint already took one shard.
    assert growth < 40e6
