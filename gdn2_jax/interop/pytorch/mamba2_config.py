"""The configuration of a whole Mamba-2 model, from a config.json of one of its three packages."""

from collections.abc import Mapping
from typing import Any

from gdn2_jax.models import ModelConfig, StateSpace

# Our names, and those of mamba_ssm and of transformers and flash-linear-attention.
_SIZES = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "d_model": ("d_model", "hidden_size"),
    "num_layers": ("n_layer", "num_hidden_layers"),
    "head_dim": ("headdim", "head_dim"),
    "state_dim": ("d_state", "state_size"),
    "conv_size": ("d_conv", "conv_kernel"),
    "expand": ("expand", "expand"),
    "groups": ("ngroups", "n_groups"),
}
# What mamba_ssm takes where its config.json, which has only what was given, says nothing.
_MAMBA_SSM = {
    "headdim": 64,
    "d_state": 128,
    "d_conv": 4,
    "expand": 2,
    "ngroups": 1,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
# Options that our model lacks, by the values that make no difference.
_ALLOWED = {
    "D_has_hdim": (False,),
    "attn_layer_idx": ([], None),
    "bias": (False,),
    "conv_bias": (True,),
    "d_intermediate": (0,),
    "d_ssm": (None,),
    "hidden_act": ("silu", "swish"),
    "norm_before_gate": (False,),
    "norm_epsilon": (1e-5,),  # the layers' own in mamba_ssm
    "rms_norm": (True,),
    "rmsnorm": (True,),
    "use_bias": (False,),
    "use_conv_bias": (True,),
}
_LIMITS = ("dt_limit", "time_step_limit")
_NO_LIMITS = (None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
_EPSILONS = ("layer_norm_epsilon", "norm_eps")
_TIED = ("tie_embeddings", "tie_word_embeddings")
# They initialise, or say how to compute. The stream is float32 here whatever residual_in_fp32 says.
_WITHOUT_EFFECT = {
    *("A_init_range", "attn_cfg", "chunk_size", "conv_init", "dt_init_floor", "dt_max", "dt_min"),
    *("fused_add_norm", "initializer_cfg", "layer", "num_heads", "pad_vocab_size_multiple"),
    *("rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_max"),
    *("time_step_min", "time_step_rank", "use_mem_eff_path"),
}


def mamba2_description(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json with the options of mamba_ssm's layers beside those of its models."""
    if "ssm_cfg" not in content:
        return dict(content)
    flat = _MAMBA_SSM | dict(content) | content["ssm_cfg"]
    del flat["ssm_cfg"]
    return flat


def is_tied(content: Mapping[str, Any]) -> bool:
    """Whether the head of the described model is its embedding."""
    return any(mamba2_description(content).get(name) for name in _TIED)


def mamba2_config(
    content: Mapping[str, Any], without_effect: set[str], dtypes: dict[str, Any]
) -> ModelConfig:
    """Returns the configuration that the config.json of a Mamba-2 checkpoint describes.

    Args:
      content: of the file.
      without_effect: keys that say nothing of the function in any model.
      dtypes: of the model.

    Raises:
      ValueError: it describes a model that `ModelConfig` cannot, or has unknown keys; all are named.
    """
    flat, column = mamba2_description(content), 0 if "ssm_cfg" in content else 1
    names = {ours: theirs[column] for ours, theirs in _SIZES.items()}
    known = {*names.values(), *_ALLOWED, *_LIMITS, *_EPSILONS, *_TIED}
    complaints = [
        f"{name}: expected {allowed[0]!r}, got {flat[name]!r}"
        for name, allowed in _ALLOWED.items()
        if flat.get(name, allowed[0]) not in allowed
    ]
    complaints += [
        f"{name}: expected [0.0, Infinity], got {flat[name]!r}"
        for name in _LIMITS
        if flat.get(name) not in _NO_LIMITS
    ]
    complaints += [
        f"{name}: expected no such key, got {value!r}"
        for name, value in sorted(flat.items())
        if value is not None and name not in known | _WITHOUT_EFFECT | without_effect
    ]
    sizes = {}
    for ours, theirs in names.items():
        value = flat.get(theirs)
        kinds = (int, float) if ours == "expand" else int
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            complaints.append(f"{theirs}: expected a positive number, got {value!r}")
        sizes[ours] = value
    epsilon = next((flat[name] for name in _EPSILONS if name in flat), 1e-5)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or epsilon <= 0:
        complaints.append(f"norm epsilon: expected a positive number, got {epsilon!r}")
    if not complaints:
        inner = int(sizes["expand"] * sizes["d_model"])
        heads = flat.get("num_heads") or inner // sizes["head_dim"]
        if heads * sizes["head_dim"] != inner:
            complaints.append(f"num_heads: expected {inner} channels, got {heads} heads")
        if sizes["groups"] != 1:
            complaints.append(f"{names['groups']}: expected 1, got {sizes['groups']}")
    if complaints:
        raise ValueError(f"config.json describes no model of ours: {'; '.join(complaints)}")
    # Only mamba_ssm pads beyond what its config.json says.
    multiple = flat["pad_vocab_size_multiple"] if column == 0 else 1
    return ModelConfig(
        vocab_size=-(-sizes["vocab_size"] // multiple) * multiple,
        d_model=sizes["d_model"],
        num_layers=sizes["num_layers"],
        mixer=StateSpace(
            inner_dim=inner,
            **{name: sizes[name] for name in ("head_dim", "state_dim", "conv_size")},
        ),
        mlp_dim=None,
        norm_epsilon=epsilon,
        **dtypes,
    )
