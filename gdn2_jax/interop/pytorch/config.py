"""Model configurations of PyTorch checkpoints: a Hugging Face config.json, or the tensors' shapes."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gdn2_jax.interop.pytorch.files import StoredTensor
from gdn2_jax.interop.pytorch.layouts import Style
from gdn2_jax.interop.pytorch.mamba2_config import mamba2_config
from gdn2_jax.models import DeltaRule, ModelConfig, SoftmaxAttention

_Gate = Literal["silu", "sigmoid"]
# flash-linear-attention has no GDN-2 model yet, only the layer: "gdn2" follows its KDA model.
_MODEL_TYPES: dict[str, Literal["gdn2", "kda", "gdn"]] = {
    "gdn2": "gdn2",
    "kda": "kda",
    "gated_deltanet": "gdn",
}
_ARCHITECTURES = {
    "gdn2": "GDN2ForCausalLM",
    "kda": "KDAForCausalLM",
    "gdn": "GatedDeltaNetForCausalLM",
}
_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "num_v_heads",
    "head_dim",
    "conv_size",
    "intermediate_size",
    "window_size",
)
_NUMBERS = ("expand_v", "hidden_ratio", "lower_bound", "norm_eps", "rope_theta")
_BOOLEANS = ("allow_neg_eigval", "safe_gate", "tie_word_embeddings")
_NULLABLE = ("num_v_heads", "intermediate_size", "window_size", "hidden_ratio", "lower_bound")
_ATTENTION_HEAD_DIM = 128  # In the paper's models.
# The second is how our own checkpoints named it before.
_OUTPUT_GATES = ("output_gate_activation", "output_gate")
_ACTIVATIONS: dict[str, _Gate] = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}
# Options of fla's models that ours lack, by the values that make no difference.
_ALLOWED = {
    "use_short_conv": (True,),
    "use_gate": (True,),
    "conv_bias": (False,),
    "hidden_act": ("swish", "silu"),
    "attnres_block_size": (None,),
    "norm_first": (False,),
}
# Neither fla nor transformers computes another function of the weights by these.
_WITHOUT_EFFECT = {
    *(
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_mode",
    ),
    *("auto_map", "bos_token_id", "dtype", "eos_token_id", "finetuning_task", "fuse_cross_entropy"),
    *("fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu", "gradient_checkpointing"),
    *("id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id"),
    *("max_position_embeddings", "model_type", "num_labels", "output_attentions"),
    *(
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "task_specific_params",
    ),
    *("tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16"),
    *("use_cache", "use_l2warp"),
}
_OF_ATTENTION = {"window_size", "rope_theta"}
_READ = {*_INTEGERS, *_NUMBERS, *_BOOLEANS, *_OUTPUT_GATES, *_ALLOWED, "attn"} - _OF_ATTENTION


def read_description(path: Path) -> dict[str, Any]:
    """Reads a config.json.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a model's configuration.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if "ssm_cfg" in description:  # of mamba_ssm
            layer = description["ssm_cfg"].get("layer", "Mamba1")
            description.setdefault("model_type", layer.lower())
        description["model_type"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a model's configuration: {error!r}") from error
    return description


def check_model_type(content: Mapping[str, Any]) -> None:
    """Checks that the config.json of a checkpoint is of a model that is here.

    Raises:
      ValueError: it is of another.
    """
    model_type = content["model_type"]
    known = (*_MODEL_TYPES, "mamba2")
    if model_type not in known:
        raise ValueError(
            f"model_type: {model_type} is not supported, expected one of {', '.join(known)}"
        )


def config_from_description(content: Mapping[str, Any], dtype: np.dtype) -> ModelConfig:
    """Returns the configuration that the config.json of a checkpoint describes.

    The output gate of GDN-2 is the sigmoid of fla's layer where the file names none. The model
    computes in the dtype of the weights.

    Raises:
      ValueError: `ModelConfig` cannot describe the model, or a key may change the model in a way that
        is not known here; the message names all such keys.
    """
    check_model_type(content)
    if content["model_type"] == "mamba2":
        return mamba2_config(content, _WITHOUT_EFFECT, _dtypes(dtype))
    kind = _MODEL_TYPES[content["model_type"]]
    complaints = [
        f"{name}: expected {allowed[0]!r}, got {content[name]!r}"
        for name, allowed in _ALLOWED.items()
        if content.get(name, allowed[0]) not in allowed
    ]
    complaints += _mistyped(content)
    complaints += [
        f"{name}: expected no such key, got {value!r}"
        for name, value in sorted(content.items())
        if value is not None and name not in _READ | _WITHOUT_EFFECT
    ]
    bound = content.get("lower_bound")
    if bound is None and content.get("safe_gate"):
        complaints.append("lower_bound: expected a number beside safe_gate, got None")
    if bound is not None and kind != "kda":
        complaints.append(f"lower_bound: expected None as in fla's {kind} layer, got {bound!r}")
    output_gate = _output_gate(content, "sigmoid" if kind == "gdn2" else None, complaints)
    hybrid, attention = _attention(content, complaints)
    if complaints:
        raise ValueError(f"config.json describes no model of ours: {'; '.join(complaints)}")
    try:
        width = content["hidden_size"]
        return ModelConfig(
            vocab_size=content["vocab_size"],
            d_model=width,
            num_layers=content["num_hidden_layers"],
            mixer=DeltaRule(
                kind=kind,
                num_heads=content["num_heads"],
                head_dim=content["head_dim"],
                num_value_heads=content.get("num_v_heads"),
                expand_v=content.get("expand_v", 2.0 if kind == "gdn" else 1.0),
                conv_size=content.get("conv_size", 4),
                allow_negative_eigenvalues=content.get("allow_neg_eigval", False),
                # Applied whatever safe_gate says: that tells fla's kernel only to rely on it.
                decay_lower_bound=bound,
                output_gate=output_gate,
            ),
            hybrid=hybrid,
            attention=SoftmaxAttention(**attention),
            mlp_dim=content.get("intermediate_size") or _fla_mlp_dim(width, content),
            norm_epsilon=content.get("norm_eps", 1e-6),
            **_dtypes(dtype),
        )
    except KeyError as error:
        raise ValueError(f"config.json has no {error}") from error


def describe(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """Returns the config.json of a flash-linear-attention checkpoint with weights of this dtype.

    Raises:
      ValueError: the model has an option that fla's layer lacks.
    """
    mixer, attention = _delta_rule(config), config.attention
    content = {
        "architectures": [_ARCHITECTURES[mixer.kind]],
        "model_type": {kind: name for name, kind in _MODEL_TYPES.items()}[mixer.kind],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "num_v_heads": mixer.num_value_heads,
        "expand_v": mixer.expand_v,
        "use_short_conv": True,
        "conv_size": mixer.conv_size,
        "allow_neg_eigval": mixer.allow_negative_eigenvalues,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "swish",
        "norm_eps": config.norm_epsilon,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype),
        "attn": None,
    }
    if config.hybrid:
        content["attn"] = {
            "layers": list(range(1, config.num_layers, 2)),
            "num_heads": attention.num_heads,
            "num_kv_heads": attention.num_heads,
            "qkv_bias": False,
            "window_size": attention.window_size,
            "rope_theta": attention.rope_theta,
        }
    if mixer.kind == "gdn2" or mixer.output_gate is not None:
        content["output_gate_activation"] = mixer.output_gate or "silu"
    if mixer.kind == "kda" and mixer.decay_lower_bound is not None:
        content |= {"safe_gate": True, "lower_bound": mixer.decay_lower_bound}
    return content


def _delta_rule(config: ModelConfig) -> DeltaRule:
    if not isinstance(config.mixer, DeltaRule):
        raise ValueError(f"mixer: expected a delta rule, got {config.mixer.kind!r}")  # noqa: TRY004
    return config.mixer


def check_style(config: ModelConfig, style: Style) -> None:
    """Checks that the style's own PyTorch code computes the same function of the weights.

    Warns if it does so with another output gate, for which both have one name.

    Raises:
      ValueError: it lacks an option of the model.
    """
    mixer = _delta_rule(config)
    options: dict[str, Any] = {"erase_gate": "channel", "write_gate": "channel"}
    if mixer.kind != "kda":
        options["decay_lower_bound"] = None
    if style == "paper":
        options |= {"allow_negative_eigenvalues": False}
    for name, only in options.items():
        if getattr(mixer, name) != only:
            raise ValueError(
                f"{name}: expected {only!r}, as the {style} style's {mixer.kind} layer has no "
                f"other, got {getattr(mixer, name)!r}"
            )
    if config.hybrid and config.attention.conv_size is not None:
        raise ValueError(
            f"attention.conv_size: expected None, as the {style} style's attention has no "
            f"convolution, got {config.attention.conv_size}"
        )
    theirs = {"gdn2": {"paper": "silu", "fla": "sigmoid"}[style], "kda": "sigmoid", "gdn": "silu"}
    own = mixer.output_gate or {"gdn2": "silu", "kda": "sigmoid", "gdn": "silu"}[mixer.kind]
    if own != theirs[mixer.kind]:
        warnings.warn(
            f"the model gates its output with {own}, the {style} style's own {mixer.kind} layer "
            f"with {theirs[mixer.kind]}: the weights are the same, its outputs will differ",
            stacklevel=4,  # Of the public function's caller.
        )


def config_from_shapes(tensors: Mapping[str, StoredTensor]) -> ModelConfig:
    """Returns the configuration of a model of the paper's repository.

    What shapes do not tell is as in the paper: attention heads of width 128 and windows of 2048.

    Raises:
      ValueError: a tensor that tells something is missing or has a wrong shape.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = tensors[name].shape if name in tensors else None
        if found is None or len(found) != dimensions or 0 in found:
            raise ValueError(f"{name}: expected {dimensions} dimensions, got {found}")
        return found

    if strange := [
        name
        for name in tensors
        if name.startswith("transformer.h.") and not name.split(".")[2].isdecimal()
    ]:
        raise ValueError(f"tensors: expected transformer.h.NUMBER, got {', '.join(strange)}")
    layer = "transformer.h.0"
    vocab_size, width = shape("transformer.wte.weight", 2)
    (heads,) = shape(f"{layer}.attn.A_log", 1)
    (value_dim,) = shape(f"{layer}.attn.o_norm.weight", 1)
    (channels,) = shape(f"{layer}.attn.dt_bias", 1)
    if channels % heads:
        raise ValueError(f"{layer}.attn.dt_bias: expected a multiple of {heads}, got {channels}")
    head_dim = channels // heads
    value_heads = shape(f"{layer}.attn.v_proj.weight", 2)[0] // value_dim
    dtype = tensors["transformer.wte.weight"].dtype
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("transformer.h.")),
        hybrid="transformer.h.1.attn.attn.weight" in tensors,
        mixer=DeltaRule(
            num_heads=heads,
            head_dim=head_dim,
            num_value_heads=None if value_heads == heads else value_heads,
            expand_v=value_dim / head_dim,
            conv_size=shape(f"{layer}.attn.q_conv1d.weight", 3)[-1],
        ),
        attention=SoftmaxAttention(num_heads=max(width // _ATTENTION_HEAD_DIM, 1)),
        mlp_dim=shape(f"{layer}.mlp.swiglu.w1.weight", 2)[0],
        # float32 weights were trained in bfloat16 arithmetic.
        **{} if dtype == np.float32 else _dtypes(dtype),
    )


def _attention(content: Mapping[str, Any], complaints: list[str]) -> tuple[bool, dict[str, Any]]:
    given = content.get("attn")
    if given is None:
        return False, {}
    attention: Any = given[0] if isinstance(given, list) and len(given) == 1 else given
    layers = content.get("num_hidden_layers", 0)
    try:
        expected = {
            "layers": list(range(1, layers, 2)),
            "num_kv_heads": attention["num_heads"],
            "qkv_bias": False,
            "qk_norm": False,
        }
        window_size = attention["window_size"]
        complaints += [f"attn.{complaint}" for complaint in _mistyped(attention)]
        complaints += [
            f"attn.{name}: expected no such key, got {value!r}"
            for name, value in attention.items()
            if value is not None and name not in {*expected, "num_heads"} | _OF_ATTENTION
        ]
        complaints += [
            f"attn.{name}: expected {value!r}, got {attention[name]!r}"
            for name, value in expected.items()
            if attention.get(name, value) not in (value, None)
        ]
        if window_size is None:
            complaints.append("attn.window_size: expected a number, got None")
        return True, {
            "num_heads": attention["num_heads"],
            "window_size": window_size,
            "rope_theta": attention.get("rope_theta", 10000.0),
        }
    except (KeyError, TypeError, AttributeError) as error:
        complaints.append(f"attn: expected layers, num_heads and window_size, got {error!r}")
        return True, {}


def _output_gate(
    content: Mapping[str, Any], default: _Gate | None, complaints: list[str]
) -> _Gate | None:
    given = {name: content[name] for name in _OUTPUT_GATES if content.get(name) is not None}
    complaints += [
        f"{name}: expected one of {', '.join(_ACTIVATIONS)}, got {value!r}"
        for name, value in given.items()
        if value not in list(_ACTIVATIONS)
    ]
    gates: set[_Gate | None] = {_ACTIVATIONS.get(str(value)) for value in given.values()}
    if len(gates) > 1:
        complaints.append(f"{' and '.join(given)}: expected the same, got {given}")
    return gates.pop() if gates else default


def _mistyped(content: Mapping[str, Any]) -> list[str]:
    complaints = []
    for names, kinds, expected in (
        (_INTEGERS, int, "an integer"),
        (_NUMBERS, (int, float), "a number"),
    ):
        for name in names:
            value = content.get(name, 1)
            nothing = value is None and name in _NULLABLE
            if isinstance(value, bool) or not (isinstance(value, kinds) or nothing):
                complaints.append(f"{name}: expected {expected}, got {value!r}")
    for name in _BOOLEANS:
        if not isinstance(content.get(name, False), bool):
            complaints.append(f"{name}: expected true or false, got {content[name]!r}")
    return complaints


def _fla_mlp_dim(width: int, content: Mapping[str, Any]) -> int:
    """Two thirds of `hidden_ratio` widths, rounded up to 256, is the default of fla."""
    return -(-int(width * (content.get("hidden_ratio") or 4) * 2 / 3) // 256) * 256


def _dtypes(dtype: np.dtype) -> dict[str, Any]:
    # There are no float16 parameters to train; what is loaded keeps its dtype all the same.
    param_dtype = "float32" if dtype == np.float16 else str(dtype)
    return {"dtype": str(dtype), "param_dtype": param_dtype}
