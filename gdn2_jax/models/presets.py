"""Named model configurations: GDN-2 at each scale, and every other mixer matched to it.

At one scale all models have the same depth and width; recurrent mixers have the same state, and MLP
widths make up for the mixers' parameters, to within 2 %. "mamba3" is SISO, "mamba3_mimo" has rank 4.
"""

from typing import Any

from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.mixers import DeltaRule, SoftmaxAttention, StateSpace, named_mixer

# Trains on bytes in minutes on two CPU cores.
_TINY = {"vocab_size": 257, "d_model": 128, "num_layers": 4, "dtype": "float32"}
_TINY_MIXERS = {
    DeltaRule: {"num_heads": 2, "head_dim": 64},
    StateSpace: {"inner_dim": 256, "state_dim": 32},
    SoftmaxAttention: {"num_heads": 2, "window_size": 128},
}
# Compares mixers on bytes within minutes on one data-centre GPU.
_30M = {"vocab_size": 257, "d_model": 512, "num_layers": 8}
_30M_MIXERS = {
    DeltaRule: {"num_heads": 4, "head_dim": 128},
    StateSpace: {"inner_dim": 1024, "state_dim": 64},
    SoftmaxAttention: {"num_heads": 4, "window_size": 512},
}
_100M = {"d_model": 768, "num_layers": 12}
_100M_MIXERS = {
    DeltaRule: {"num_heads": 12, "head_dim": 64},
    StateSpace: {"inner_dim": 1536, "state_dim": 32},
    SoftmaxAttention: {"num_heads": 12},
}
# The published hybrid has a third of the recurrent one's heads.
_100M_HYBRID_MIXERS = {
    DeltaRule: {"num_heads": 4, "head_dim": 64},
    StateSpace: {"inner_dim": 512, "state_dim": 32},
    SoftmaxAttention: {"num_heads": 12},
}
_305M = {"d_model": 1024, "num_layers": 12}
_305M_MIXERS = {
    DeltaRule: {"num_heads": 16, "head_dim": 64},
    StateSpace: {"inner_dim": 2048, "state_dim": 32},
    SoftmaxAttention: {"num_heads": 16},
}
# The paper's models; "1.3B" counts the blocks without embedding and head. Mixers have their defaults.
_PAPER = {"d_model": 2304, "num_layers": 18, "remat": "elementwise", "unroll": True}

_Sizes = dict[type, dict[str, Any]]
# Names are filled with the mixer. Each scale: the fields that all models share, sizes of the mixers,
# and MLP widths.
_SCALES: dict[str, tuple[dict[str, Any], _Sizes, dict[str, int]]] = {
    "{}_tiny": (
        _TINY,
        _TINY_MIXERS,
        {
            "gdn2": 168,
            "kda": 256,
            "gdn": 296,
            "deltanet": 296,
            "gated_deltaproduct": 208,
            "mamba2": 232,
            "mamba3": 232,
            "mamba3_mimo": 152,
            "attention": 344,
            "sliding_window_attention": 344,
        },
    ),
    "swa_{}_tiny": (
        _TINY | {"hybrid": True},
        _TINY_MIXERS,
        {
            "gdn2": 256,
            "kda": 296,
            "gdn": 320,
            "deltanet": 320,
            "gated_deltaproduct": 272,
            "mamba2": 288,
            "mamba3": 288,
            "mamba3_mimo": 248,
            "attention": 344,
        },
    ),
    "{}_30M": (
        _30M,
        _30M_MIXERS,
        {
            "gdn2": 1408,
            "kda": 1760,
            "gdn": 1760,
            "deltanet": 1760,
            "gated_deltaproduct": 1408,
            "mamba2": 1536,
            "mamba3": 1504,
            "mamba3_mimo": 1376,
            "attention": 1920,
            "sliding_window_attention": 1920,
        },
    ),
    "swa_{}_30M": (
        _30M | {"hybrid": True},
        _30M_MIXERS,
        {
            "gdn2": 1664,
            "kda": 1824,
            "gdn": 1824,
            "deltanet": 1824,
            "gated_deltaproduct": 1664,
            "mamba2": 1728,
            "mamba3": 1728,
            "mamba3_mimo": 1664,
            "attention": 1920,
        },
    ),
    "{}_100M": (
        _100M,
        _100M_MIXERS,
        {
            "gdn2": 2048,
            "kda": 2560,
            "gdn": 2368,
            "deltanet": 2368,
            "gated_deltaproduct": 1856,
            "mamba2": 2112,
            "mamba3": 2112,
            "mamba3_mimo": 1984,
            "attention": 2624,
            "sliding_window_attention": 2624,
        },
    ),
    "swa_{}_100M": (
        _100M | {"hybrid": True},
        _100M_HYBRID_MIXERS,
        {
            "gdn2": 2048,
            "kda": 2112,
            "gdn": 2112,
            "deltanet": 2112,
            "gated_deltaproduct": 2048,
            "mamba2": 2048,
            "mamba3": 2048,
            "mamba3_mimo": 2048,
            "attention": 1792,
        },
    ),
    "{}_305M": (
        _305M,
        _305M_MIXERS,
        {
            "gdn2": 4352,
            "kda": 5056,
            "gdn": 4800,
            "deltanet": 4800,
            "gated_deltaproduct": 4096,
            "mamba2": 4416,
            "mamba3": 4416,
            "mamba3_mimo": 4288,
            "attention": 5120,
            "sliding_window_attention": 5120,
        },
    ),
    "swa_{}_305M": (
        _305M | {"hybrid": True},
        _305M_MIXERS,
        {
            "gdn2": 4736,
            "kda": 5056,
            "gdn": 4928,
            "deltanet": 4928,
            "gated_deltaproduct": 4608,
            "mamba2": 4736,
            "mamba3": 4736,
            "mamba3_mimo": 4736,
            "attention": 5120,
        },
    ),
    "{}_1.3B": (
        _PAPER,
        {},
        {
            "gdn2": 6208,
            "kda": 7552,
            "gdn": 7040,
            "deltanet": 7040,
            "gated_deltaproduct": 5696,
            "mamba2": 6336,
            "mamba3": 6272,
            "mamba3_mimo": 6144,
            "attention": 7424,
            "sliding_window_attention": 7424,
        },
    ),
    "swa_{}_1.3B": (
        _PAPER | {"hybrid": True},
        {},
        {
            "gdn2": 6784,
            "kda": 7488,
            "gdn": 7232,
            "deltanet": 7232,
            "gated_deltaproduct": 6528,
            "mamba2": 6848,
            "mamba3": 6848,
            "mamba3_mimo": 6784,
            "attention": 7424,
        },
    ),
}


PRESETS: dict[str, ModelConfig] = {
    name.format(mixer): ModelConfig(
        **shared,
        mixer=named_mixer(mixer, sizes),
        attention=named_mixer("sliding_window_attention", sizes),
        mlp_dim=mlp_dim,
    )
    for name, (shared, sizes, mlp_dims) in _SCALES.items()
    for mixer, mlp_dim in mlp_dims.items()
}
PRESETS["tiny"] = PRESETS["swa_gdn2_tiny"]


def matched_preset(name: str, mixer: str) -> str:
    """Returns the name of the preset of the same scale as preset `name`, with another mixer.

    Raises:
      ValueError: there is no such preset, or none of its scale with that mixer.
    """
    for pattern, (*_, mlp_dims) in _SCALES.items():
        if PRESETS.get(name) in [PRESETS[pattern.format(other)] for other in mlp_dims]:
            if mixer not in mlp_dims:
                raise ValueError(f"mixer: expected one of {', '.join(mlp_dims)}, got {mixer!r}")
            return pattern.format(mixer)
    raise ValueError(f"name: expected a preset, one of {', '.join(PRESETS)}, got {name!r}")
