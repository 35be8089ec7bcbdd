"""Named model configurations: GDN-2 at each scale, and every other mixer matched to it.

At one scale all models have the same depth and width; recurrent mixers have the same state, and MLP
widths make up for the mixers' parameters, to within 2 %. "mamba3" is SISO, "mamba3_mimo" has rank 4.
"""

from typing import Any

from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.mixers import MIXERS, DeltaRule, SoftmaxAttention, StateSpace, named_mixer

# Trains on bytes in minutes on two CPU cores.
_TINY = {"vocab_size": 257, "d_model": 128, "num_layers": 4, "dtype": "float32"}
_TINY_MIXERS = {
    DeltaRule: {"num_heads": 2, "head_dim": 64},
    StateSpace: {"inner_dim": 256, "state_dim": 32},
    SoftmaxAttention: {"num_heads": 2, "window_size": 128},
}
# Compares mixers on bytes within minutes on one data-centre GPU.
_30M = {"vocab_size": 257, "d_model": 512, "num_layers": 8, "unroll": True}
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
_PAPER = {"d_model": 2304, "num_layers": 18, "remat": "intermediates", "unroll": True}

_Sizes = dict[type, dict[str, Any]]
# Names are filled with the mixer; "swa_" makes a hybrid. Each scale: the fields that all models share,
# sizes of the mixers, and MLP widths in the order of MIXERS: gdn2, kda, gdn, deltanet,
# gated_deltaproduct, mamba2, mamba3, mamba3_mimo, attention and sliding_window_attention. The last
# two have no hybrids.
_SCALES: dict[str, tuple[dict[str, Any], _Sizes, tuple[int, ...]]] = {
    "{}_tiny": (_TINY, _TINY_MIXERS, (168, 256, 296, 296, 208, 232, 232, 152, 344, 344)),
    "swa_{}_tiny": (_TINY, _TINY_MIXERS, (256, 296, 320, 320, 272, 288, 288, 248, 344)),
    "{}_30M": (_30M, _30M_MIXERS, (1408, 1760, 1760, 1760, 1408, 1536, 1504, 1376, 1920, 1920)),
    "swa_{}_30M": (_30M, _30M_MIXERS, (1664, 1824, 1824, 1824, 1664, 1728, 1728, 1664, 1920)),
    "{}_100M": (_100M, _100M_MIXERS, (2048, 2560, 2368, 2368, 1856, 2112, 2112, 1984, 2624, 2624)),
    "swa_{}_100M": (
        _100M,
        _100M_HYBRID_MIXERS,
        (2048, 2112, 2112, 2112, 2048, 2048, 2048, 2048, 1792),
    ),
    "{}_305M": (_305M, _305M_MIXERS, (4352, 5056, 4800, 4800, 4096, 4416, 4416, 4288, 5120, 5120)),
    "swa_{}_305M": (_305M, _305M_MIXERS, (4736, 5056, 4928, 4928, 4608, 4736, 4736, 4736, 5120)),
    "{}_1.3B": (_PAPER, {}, (6208, 7552, 7040, 7040, 5696, 6336, 6272, 6144, 7424, 7424)),
    "swa_{}_1.3B": (_PAPER, {}, (6784, 7488, 7232, 7232, 6528, 6848, 6848, 6784, 7424)),
}


PRESETS: dict[str, ModelConfig] = {
    name.format(mixer): ModelConfig(
        **shared,
        mixer=named_mixer(mixer, sizes),
        hybrid=name.startswith("swa_"),
        attention=SoftmaxAttention(**sizes.get(SoftmaxAttention, {})),
        mlp_dim=mlp_dim,
    )
    for name, (shared, sizes, mlp_dims) in _SCALES.items()
    for mixer, mlp_dim in zip(MIXERS, mlp_dims)
}
SCALES = tuple(dict.fromkeys(name.rpartition("_")[2] for name in PRESETS))
"""What presets' names end with, smallest first."""

PRESETS["tiny"] = PRESETS["swa_gdn2_tiny"]


def matched_preset(name: str, mixer: str) -> str:
    """Returns the name of the preset of the same scale as preset `name`, with another mixer.

    Raises:
      ValueError: there is no such preset, or none of its scale with that mixer.
    """
    for pattern, (*_, mlp_dims) in _SCALES.items():
        mixers = [other for other, _ in zip(MIXERS, mlp_dims)]
        if PRESETS.get(name) in [PRESETS[pattern.format(other)] for other in mixers]:
            if mixer not in mixers:
                raise ValueError(f"mixer: expected one of {', '.join(mixers)}, got {mixer!r}")
            return pattern.format(mixer)
    raise ValueError(f"name: expected a preset, one of {', '.join(PRESETS)}, got {name!r}")
