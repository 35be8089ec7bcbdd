"""Which PyTorch tensor holds which of our parameters, and how its numbers lie in it."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np

from gdn2_jax.models import ModelConfig

Style = Literal["paper", "fla"]
# Those that are read but not written, too: of whole Mamba-2 models.
Naming = Style | Literal["transformers", "mamba_ssm"]
Path = tuple[str, ...]


class Layout(NamedTuple):
    """How parameters lie in a tensor.

    Attributes:
      split: of a tensor and the parameters' shapes, gives the parameters.
      join: of the parameters, gives the tensor.
    """

    split: Callable[..., tuple[np.ndarray, ...]]
    join: Callable[..., np.ndarray]


class Entry(NamedTuple):
    """A tensor and the parameters that it holds.

    Attributes:
      name: of the tensor in the state dict.
      paths: of the parameters in the tree; none where PyTorch's code never reads the tensor, which
        may be there or not.
      index: position along the parameters' leading axis, which stacks layers; None if they have
        none.
    """

    name: str
    paths: tuple[Path, ...]
    layout: Layout
    index: int | None = None


def _of_one(split, join) -> Layout:
    return Layout(lambda tensor, shapes: (split(tensor, shapes[0]),), join)


# A Linear's weight is [out, in], a depthwise Conv1d's [channels, 1, taps].
_LINEAR = _of_one(lambda tensor, shape: tensor.T, lambda kernel: kernel.T)
_CONVOLUTION = _of_one(lambda tensor, shape: tensor[:, 0].T, lambda kernel: kernel.T[:, None])
_VECTOR = _of_one(lambda tensor, shape: tensor.reshape(shape), lambda array: array.reshape(-1))
_SAME = _of_one(lambda tensor, shape: tensor, lambda array: array)


def _fused_attention(heads: int) -> Layout:
    """Rows of q, k and v a head in turn."""

    def split(tensor, shapes):
        width = tensor.shape[-1]
        q_k_v = np.moveaxis(tensor.reshape(heads, 3, -1, width), 1, 0)
        return tuple(rows.reshape(-1, width).T for rows in q_k_v)

    def join(*kernels):
        width = kernels[0].shape[0]
        rows = [kernel.T.reshape(heads, -1, width) for kernel in kernels]
        return np.stack(rows, axis=1).reshape(-1, width)

    return Layout(split, join)


def _linears(*names: str) -> list[Entry]:
    return [Entry(f"{name}.weight", ((name, "kernel"),), _LINEAR) for name in names]


def _low_rank(name: str) -> list[Entry]:
    """A Linear after a Linear, in an nn.Sequential."""
    return [Entry(f"{name}.{i}.weight", ((f"{name}_{i}", "kernel"),), _LINEAR) for i in range(2)]


_DELTA_RULE = [
    *_linears("q_proj", "k_proj", "v_proj", "b_proj", "o_proj"),
    *(
        Entry(f"{name}.weight", ((name, "kernel"),), _CONVOLUTION)
        for name in ("q_conv1d", "k_conv1d", "v_conv1d")
    ),
    Entry("A_log", (("A_log",),), _VECTOR),
    Entry("dt_bias", (("dt_bias",),), _VECTOR),
    Entry("o_norm.weight", (("o_norm", "scale"),), _VECTOR),
]
_KDA = [
    *_DELTA_RULE,
    *_low_rank("f_proj"),
    *_low_rank("g_proj"),
    Entry("g_proj.1.bias", (("g_proj_1", "bias"),), _VECTOR),
]
_LAYERS: dict[str, list[Entry]] = {
    "gdn2": [*_KDA, *_linears("w_proj")],
    "kda": _KDA,
    # Until February 2025 fla's layer had a D that it did not use.
    "gdn": [*_DELTA_RULE, *_linears("a_proj", "g_proj"), Entry("D", (), _VECTOR)],
    # mamba_ssm's, transformers' and fla's, which all have the same names.
    "mamba2": [
        *_linears("in_proj", "out_proj"),
        Entry("conv1d.weight", (("conv1d", "kernel"),), _CONVOLUTION),
        Entry("conv1d.bias", (("conv1d", "bias"),), _VECTOR),
        *(Entry(name, ((name,),), _VECTOR) for name in ("A_log", "D", "dt_bias")),
        Entry("norm.weight", (("norm", "scale"),), _VECTOR),
    ],
    "attention": _linears("q_proj", "k_proj", "v_proj", "o_proj"),
}
# The paper's repository publishes one recurrent mixer.
MIXERS: dict[Naming, tuple[str, ...]] = {
    "paper": ("gdn2",),
    "fla": ("gdn2", "kda", "gdn"),
    "transformers": ("mamba2",),
    "mamba_ssm": ("mamba2",),
}


def layer_entries(mixer: str) -> list[Entry]:
    """Returns the tensors of a layer, whose names all styles share.

    Args:
      mixer: one of "gdn2", "kda", "gdn", "mamba2" and "attention". A layer without short convolutions has
        no tensors for them.
    """
    return _LAYERS[mixer]


def model_entries(config: ModelConfig, style: Naming) -> list[Entry]:
    """Returns the tensors of a language model, in the order of its layers.

    Raises:
      ValueError: there is no such style, or it has no such model.
    """
    if style not in MIXERS:
        raise ValueError(f"style: expected one of {', '.join(get_args(Style))}, got {style!r}")
    if config.mixer.kind not in MIXERS[style]:
        raise ValueError(
            f"mixer: expected one of {', '.join(MIXERS[style])}, whose PyTorch names the {style} "
            f"style has, got {config.mixer.kind!r}"
        )
    if config.mixer.kind == "gdn2" and config.mixer.write_gate == "tied":
        raise ValueError(
            f"write_gate: expected 'channel', as the {style} style's gdn2 layer has no other, got 'tied'"
        )
    names = _NAMES[style]
    if (config.mlp_dim is None) != (not names.mlp):
        expected = "a number" if names.mlp else None
        raise ValueError(
            f"mlp_dim: expected {expected}, as in the {style} style, got {config.mlp_dim}"
        )
    entries = [Entry(names.embedding, (("embed", "embedding"),), _SAME)]
    for i in range(config.num_layers):
        attention = config.hybrid and i % 2 == 1
        block, index = ("attention_block", i // 2) if attention else ("block", i)
        if config.hybrid:
            index = i // 2
        for entry in _block_entries(config, style, attention):
            name = f"{names.layers}.{i}.{entry.name}"
            paths = tuple(("layers", block, *path) for path in entry.paths)
            entries.append(Entry(name, paths, entry.layout, index))
    return [
        *entries,
        Entry(names.final_norm, (("final_norm", "scale"),), _VECTOR),
        Entry("lm_head.weight", (("lm_head", "kernel"),), _LINEAR),
    ]


class _Names(NamedTuple):
    embedding: str
    layers: str
    mixer_norm: str
    mixer: str
    mlp_norm: str
    mlp: dict[str, str]
    final_norm: str


def _mamba2_names(embedding: str) -> _Names:
    mixer, final_norm = ("norm.weight", "mixer"), "backbone.norm_f.weight"
    return _Names(embedding, "backbone.layers", *mixer, "", {}, final_norm)


_NAMES: dict[Naming, _Names] = {
    "paper": _Names(
        "transformer.wte.weight",
        "transformer.h",
        "norm_1.weight",
        "attn",
        "norm_2.weight",
        {"gate_proj": "mlp.swiglu.w1", "up_proj": "mlp.swiglu.w2", "down_proj": "mlp.swiglu.w3"},
        "transformer.ln_f.weight",
    ),
    "fla": _Names(
        "model.embeddings.weight",
        "model.layers",
        "attn_norm.weight",
        "attn",
        "mlp_norm.weight",
        {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
        "model.norm.weight",
    ),
    # The former is flash-linear-attention's for Mamba-2, too.
    "transformers": _mamba2_names("backbone.embeddings.weight"),
    "mamba_ssm": _mamba2_names("backbone.embedding.weight"),
}


def embedding_name(style: Naming) -> str:
    """Returns the name of the embedding's tensor."""
    return _NAMES[style].embedding


def style_of(names) -> Naming:
    """Returns the style in which a whole model's tensors are named.

    Raises:
      ValueError: no style's embedding is among the names.
    """
    for style, known in _NAMES.items():
        if known.embedding in names:
            return style
    expected = " or ".join(known.embedding for known in _NAMES.values())
    raise ValueError(
        f"tensors: expected a language model with {expected}, got {', '.join(sorted(names)[:5])}...; "
        "layer_from_pytorch reads single layers"
    )


def _block_entries(config: ModelConfig, style: Naming, attention: bool) -> list[Entry]:
    names = _NAMES[style]
    if not attention:
        mixer = layer_entries(config.mixer.kind)
    elif style == "fla":
        mixer = layer_entries("attention")
    else:
        kernels = tuple((name, "kernel") for name in ("q_proj", "k_proj", "v_proj"))
        mixer = [
            Entry("attn.weight", kernels, _fused_attention(config.attention.num_heads)),
            Entry("proj.weight", (("o_proj", "kernel"),), _LINEAR),
        ]
    return [
        Entry(names.mixer_norm, (("mixer_norm", "scale"),), _VECTOR),
        *(
            Entry(
                f"{names.mixer}.{entry.name}",
                tuple(("mixer", *path) for path in entry.paths),
                entry.layout,
            )
            for entry in mixer
        ),
        *([Entry(names.mlp_norm, (("mlp_norm", "scale"),), _VECTOR)] if names.mlp else []),
        *(
            Entry(f"{theirs}.weight", (("mlp", ours, "kernel"),), _LINEAR)
            for ours, theirs in names.mlp.items()
        ),
    ]
