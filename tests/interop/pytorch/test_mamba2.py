"""Mamba-2's layers and whole models: an independent forward in NumPy is the judge."""

import json

import jax
import numpy as np
import pytest

from gdn2_jax.interop.pytorch import (
    StoredTensor,
    convert_pretrained,
    layer_from_pytorch,
    layer_to_pytorch,
    load_pretrained,
    write_tensors,
)
from gdn2_jax.layers import Mamba2
from gdn2_jax.models import LanguageModel

WIDTH, HEADS, HEAD_DIM, INNER, TAPS, VOCAB = 8, 4, 4, 16, 4, 10


def shapes(groups, state_dim):
    channels = INNER + 2 * groups * state_dim
    return {
        "in_proj.weight": (INNER + channels + HEADS, WIDTH),
        "conv1d.weight": (channels, 1, TAPS),
        "conv1d.bias": (channels,),
        "A_log": (HEADS,),
        "D": (HEADS,),
        "dt_bias": (HEADS,),
        "norm.weight": (INNER,),
        "out_proj.weight": (WIDTH, INNER),
    }


def random_tensors(shapes):
    rng = np.random.default_rng(1)
    return {name: (0.5 * rng.normal(size=s)).astype(np.float32) for name, s in shapes.items()}


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def mamba2_layer(p, u, groups, state_dim, norm_groups):
    """Mamba-2 as mamba_ssm and transformers have it: z, x, B, C, dt, one head at a time."""
    steps, shared = len(u), groups * state_dim
    z, conv, dt = np.split(u @ p["in_proj.weight"].T, [INNER, 2 * INNER + 2 * shared], axis=-1)
    padded = np.pad(conv, ((TAPS - 1, 0), (0, 0)))
    taps = p["conv1d.weight"][:, 0]
    conv = np.stack([(padded[t : t + TAPS].T * taps).sum(-1) for t in range(steps)])
    x, b, c = np.split(silu(conv + p["conv1d.bias"]), [INNER, INNER + shared], axis=-1)
    dt = np.logaddexp(0, dt + p["dt_bias"])
    y = np.zeros((steps, INNER))
    for head in range(HEADS):
        group = head // (HEADS // groups) * state_dim
        channels = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        state = np.zeros((HEAD_DIM, state_dim))
        for t in range(steps):
            decay = np.exp(-np.exp(p["A_log"][head]) * dt[t, head])
            write = np.outer(dt[t, head] * x[t, channels], b[t, group : group + state_dim])
            state = decay * state + write
            y[t, channels] = state @ c[t, group : group + state_dim]
            y[t, channels] += p["D"][head] * x[t, channels]
    y = rms_norm((y * silu(z)).reshape(steps, norm_groups, -1))
    return y.reshape(steps, INNER) * p["norm.weight"] @ p["out_proj.weight"].T


@pytest.mark.parametrize(("norm_groups", "theirs"), [(None, 2), (1, 1)], ids=["mamba_ssm", "hf"])
def test_mamba2_computes_what_the_pytorch_layer_does_and_goes_back(norm_groups, theirs):
    tensors = random_tensors(shapes(groups=2, state_dim=3))
    x = np.random.default_rng(2).normal(size=(7, WIDTH)).astype(np.float32)
    options = {"num_heads": HEADS, "head_dim": HEAD_DIM, "state_dim": 3, "num_groups": 2}
    layer = Mamba2(**options, norm_groups=norm_groups, implementation="recurrent")
    prefix = "backbone.layers.0.mixer."
    params = layer_from_pytorch(
        layer, {prefix + name: tensor for name, tensor in tensors.items()}, prefix=prefix
    )
    actual = jax.jit(layer.apply)({"params": params}, x[None])[0]
    expected = mamba2_layer(tensors, x.astype(np.float64), 2, 3, theirs)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    back = layer_to_pytorch(layer, params)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


def model_tensors(embedding):
    own = shapes(groups=1, state_dim=4)
    return random_tensors(
        {
            f"backbone.{embedding}.weight": (VOCAB, WIDTH),
            **{f"backbone.layers.{i}.norm.weight": (WIDTH,) for i in range(2)},
            **{f"backbone.layers.{i}.mixer.{name}": own[name] for i in range(2) for name in own},
            "backbone.norm_f.weight": (WIDTH,),
            "lm_head.weight": (VOCAB, WIDTH),
        }
    )


def model_logits(tensors, embedding, tokens):
    p = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = p[f"backbone.{embedding}.weight"][tokens]
    for i in range(2):
        prefix = f"backbone.layers.{i}."
        mixer = f"{prefix}mixer."
        own = {name.removeprefix(mixer): p[name] for name in p if name.startswith(mixer)}
        x = x + mamba2_layer(own, rms_norm(x) * p[f"{prefix}norm.weight"], 1, 4, 1)
    return rms_norm(x) * p["backbone.norm_f.weight"] @ p["lm_head.weight"].T


# As mamba_ssm publishes mamba2-130m to mamba2-2.7b: the vocabulary is padded to a multiple.
MAMBA_SSM = json.loads("""
{"d_model": 8, "d_intermediate": 0, "n_layer": 2, "vocab_size": 9,
 "ssm_cfg": {"layer": "Mamba2", "headdim": 4, "d_state": 4}, "attn_layer_idx": [], "attn_cfg": {},
 "rms_norm": true, "residual_in_fp32": true, "fused_add_norm": true,
 "pad_vocab_size_multiple": 2, "tie_embeddings": true}
""")
# As transformers 5 writes it.
TRANSFORMERS = json.loads("""
{"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "dtype": "float32",
 "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 4,
 "state_size": 4, "conv_kernel": 4, "expand": 2, "n_groups": 1, "hidden_act": "silu",
 "use_bias": false, "use_conv_bias": true, "chunk_size": 256, "layer_norm_epsilon": 1e-05,
 "time_step_limit": [0.0, {"__float__": "Infinity"}], "time_step_min": 0.001, "time_step_rank": 1}
""")


def write_checkpoint(path, tensors, content):
    stored = {n: StoredTensor(t.shape, t.dtype, lambda t=t: t) for n, t in tensors.items()}
    write_tensors(path, stored)
    (path / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("embedding", "content", "tied"),
    [
        ("embedding", MAMBA_SSM, True),
        ("embeddings", TRANSFORMERS | {"tie_word_embeddings": True}, True),
        ("embeddings", TRANSFORMERS | {"tie_word_embeddings": False}, False),
    ],
    ids=["mamba_ssm", "tied", "untied"],
)
def test_a_whole_mamba2_model_computes_the_logits_of_its_checkpoint(
    tmp_path, embedding, content, tied
):
    tensors = model_tensors(embedding)
    if tied:
        tensors["lm_head.weight"] = tensors[f"backbone.{embedding}.weight"]
    left_out = {"lm_head.weight"} if tied else set()
    write_checkpoint(tmp_path, {n: t for n, t in tensors.items() if n not in left_out}, content)
    config, params = load_pretrained(tmp_path)
    assert config.mlp_dim is None and config.mixer.state_dim == 4
    tokens = np.array([1, 5, 9, 3, 0, 2, 7])
    actual = jax.jit(LanguageModel(config).apply)({"params": params}, tokens[None])[0]
    expected = model_logits(tensors, embedding, tokens)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match="^mixer: expected one of gdn2, kda, gdn, .*'mamba2'"):
        convert_pretrained(tmp_path, tmp_path / "fla")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (TRANSFORMERS | {"n_groups": 8}, "n_groups: expected 1, got 8$"),
        (TRANSFORMERS | {"num_heads": 2}, "num_heads: expected 16 channels"),
        (TRANSFORMERS | {"time_step_limit": [0.0, 0.1]}, "time_step_limit: expected .*0.1]$"),
        (TRANSFORMERS | {"use_bias": True, "gate": 1}, "use_bias: .*; gate: expected no such key"),
        (TRANSFORMERS | {"head_dim": None}, "head_dim: expected a positive number, got None$"),
        (TRANSFORMERS | {"model_type": "mamba"}, "^model_type: mamba is not supported"),
        (MAMBA_SSM | {"attn_layer_idx": [1]}, r"attn_layer_idx: expected \[\], got \[1\]$"),
        (MAMBA_SSM | {"d_intermediate": 64, "rms_norm": False}, "d_intermediate: .*; rms_norm: "),
        (
            MAMBA_SSM | {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True, "ngroups": 2}},
            "norm_before_gate: expected False, got True$",
        ),
        (MAMBA_SSM | {"ssm_cfg": {"layer": "Mamba1"}}, "^model_type: mamba1 is not supported"),
    ],
)
def test_mamba2_models_that_are_not_here_are_refused_by_name(tmp_path, content, named):
    embedding = "embedding" if "ssm_cfg" in content else "embeddings"
    write_checkpoint(tmp_path, model_tensors(embedding), content)
    with pytest.raises(ValueError, match=named):
        load_pretrained(tmp_path)
