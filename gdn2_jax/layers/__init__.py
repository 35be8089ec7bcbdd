"""Flax linen modules: token mixers and the other parts of a block."""

from gdn2_jax.layers.attention import Attention
from gdn2_jax.layers.gated_delta_net import GatedDeltaNet
from gdn2_jax.layers.gated_delta_net_2 import GatedDeltaNet2
from gdn2_jax.layers.kimi_delta_attention import KimiDeltaAttention
from gdn2_jax.layers.mamba2 import Mamba2
from gdn2_jax.layers.mamba3 import Mamba3
from gdn2_jax.layers.short_convolution import ShortConvolution
from gdn2_jax.layers.sliding_window_attention import SlidingWindowAttention
from gdn2_jax.layers.swiglu import SwiGLU

__all__ = [
    "Attention",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "KimiDeltaAttention",
    "Mamba2",
    "Mamba3",
    "ShortConvolution",
    "SlidingWindowAttention",
    "SwiGLU",
]
