"""The token mixers of a language model: for each kind its sizes, its layer and what it costs.

All that the rest of a model or a script needs to know about a mixer is asked of these classes.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import flax.linen as nn
from jax.nn.initializers import Initializer

from gdn2_jax import fields
from gdn2_jax.layers import (
    Attention,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    Mamba2,
    Mamba3,
    SlidingWindowAttention,
)
from gdn2_jax.layers.delta_rule_layer import StateRounding
from gdn2_jax.layers.initializers import fan_in_uniform

if TYPE_CHECKING:
    from gdn2_jax.models.config import ModelConfig


def require(config: Any, name: str, fulfilled: bool, expected: str) -> None:
    """Raises a ValueError that names the field unless its value is valid."""
    fields.require(name, fulfilled, expected, getattr(config, name))


def check_fields(config: Any, signed: tuple[str, ...] = ()) -> None:
    """Raises a ValueError that names the first field with an impossible value.

    A field must be of its annotated type, or one of its literals; numbers must be positive.

    Args:
      config: a dataclass.
      signed: numbers that may be negative.
    """
    fields.check_types(config)
    for name, value in vars(config).items():
        if type(value) in (int, float) and name not in signed:
            require(config, name, value > 0, "a positive number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaRule:
    """The mixers that run on the Gated Delta Rule-2.

    Attributes:
      kind: Gated DeltaNet-2, Kimi Delta Attention, Gated DeltaNet, DeltaNet, or Gated DeltaProduct.
      num_heads: key heads.
      head_dim: key channels of each.
      num_value_heads: value heads, a multiple of `num_heads`; as many if None.
      expand_v: value channels per head, as a multiple of `head_dim`.
      conv_size: tokens seen by the short convolutions.
      allow_negative_eigenvalues: erase gate in [0, 2] instead of [0, 1].
      decay_lower_bound: None or a lower bound in [-5, 0) on the log-decay of gdn2 and kda.
      erase_gate: a gate per channel of gdn2, or its mean per head.
      write_gate: the same, or "tied" for the mean of the erase gate.
      num_householder: steps of gated_deltaproduct for each token; the others take one.
      output_gate: None is the layer's own, sigmoid in kda, SiLU in the others.
      state_rounding: None for a decoding state in float32, or how one in bfloat16 is rounded.

    Raises:
      ValueError: a field has a value that no model can have; the message names the field.
    """

    kind: Literal["gdn2", "kda", "gdn", "deltanet", "gated_deltaproduct"] = "gdn2"
    num_heads: int = 16
    head_dim: int = 128
    num_value_heads: int | None = None
    expand_v: float = 1.0
    conv_size: int = 4
    allow_negative_eigenvalues: bool = False
    decay_lower_bound: float | None = None
    erase_gate: Literal["channel", "scalar"] = "channel"
    write_gate: Literal["channel", "scalar", "tied"] = "channel"
    num_householder: int = 2
    output_gate: Literal["silu", "sigmoid"] | None = None
    state_rounding: StateRounding | None = None

    splits_sequences: ClassVar[bool] = True
    cache_grows: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self, signed=("decay_lower_bound",))
        groups, bound = self.num_value_heads, self.decay_lower_bound
        require(
            self,
            "num_value_heads",
            groups is None or groups % self.num_heads == 0,
            f"None or a multiple of num_heads {self.num_heads}",
        )
        require(
            self,
            "expand_v",
            float(self.head_dim * self.expand_v).is_integer(),
            f"a number that times head_dim {self.head_dim} is whole",
        )
        bounded = bound is None or -5 <= bound < 0
        require(self, "decay_lower_bound", bounded, "None or in [-5, 0)")

    def layer(self, config: "ModelConfig", decode: bool, name: str | None) -> nn.Module:
        """The layer of a model."""
        names = ("num_heads", "head_dim", "num_value_heads", "expand_v", "conv_size")
        shared = _recurrent(config, decode, name) | {n: getattr(self, n) for n in names}
        shared["allow_negative_eigenvalues"] = self.allow_negative_eigenvalues
        shared["state_rounding"] = self.state_rounding
        if self.output_gate is not None:
            shared["output_gate"] = self.output_gate
        if self.kind in ("gdn", "deltanet", "gated_deltaproduct"):
            decays = self.kind != "deltanet"
            return GatedDeltaNet(**shared, use_decay=decays, num_householder=self._steps)
        shared["decay_lower_bound"] = self.decay_lower_bound
        if self.kind == "kda":
            return KimiDeltaAttention(**shared)
        return GatedDeltaNet2(**shared, erase_gate=self.erase_gate, write_gate=self.write_gate)

    def flops(self, d_model: int, sequence_length: int) -> float:
        """FLOPs of the recurrence for one token: 2 d_k d_v a head for each read and write.

        Each step reads at its key and writes; the query reads once.
        """
        heads = self.num_value_heads or self.num_heads
        return 2 * (2 * self._steps + 1) * heads * self.head_dim**2 * self.expand_v

    @property
    def _steps(self) -> int:
        return self.num_householder if self.kind == "gated_deltaproduct" else 1

    @property
    def tensor_axes(self) -> dict[str, int]:
        """What a mesh axis "tensor" splits, by name."""
        return {"num_heads": self.num_heads}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpace:
    """Mamba-2 and Mamba-3.

    Attributes:
      kind: which of the two.
      inner_dim: value channels, over all heads.
      head_dim: value channels of each.
      state_dim: key channels of the state.
      conv_size: tokens seen by mamba2's convolution.
      mimo_rank: inputs and outputs of each head of mamba3; None for one, without rank weights.

    Raises:
      ValueError: a field has a value that no model can have; the message names the field.
    """

    kind: Literal["mamba2", "mamba3"] = "mamba2"
    inner_dim: int = 4096
    head_dim: int = 64
    state_dim: int = 64
    conv_size: int = 4
    mimo_rank: int | None = None

    splits_sequences: ClassVar[bool] = False
    cache_grows: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        whole = self.inner_dim % self.head_dim == 0
        require(self, "inner_dim", whole, f"a multiple of head_dim {self.head_dim}")
        require(self, "state_dim", self.state_dim % 4 == 0, "a multiple of 4")
        ranked = self.mimo_rank is None or self.kind == "mamba3"
        require(self, "mimo_rank", ranked, f"None with {self.kind}")

    def layer(self, config: "ModelConfig", decode: bool, name: str | None) -> nn.Module:
        """The layer of a model."""
        shared = _recurrent(config, decode, name) | {
            "num_heads": self.inner_dim // self.head_dim,
            "head_dim": self.head_dim,
            "state_dim": self.state_dim,
            "out_kernel_init": depth_scaled(config),
        }
        if self.kind == "mamba2":
            return Mamba2(**shared, conv_size=self.conv_size)
        return Mamba3(**shared, mimo_rank=self.mimo_rank)

    def flops(self, d_model: int, sequence_length: int) -> float:
        """FLOPs of the recurrence for one token: 4 d_k d_v a head and rank, to write and to read."""
        return 4 * (self.mimo_rank or 1) * self.inner_dim * self.state_dim

    @property
    def tensor_axes(self) -> dict[str, int]:
        """What a mesh axis "tensor" splits, by name."""
        return {"inner_dim / head_dim": self.inner_dim // self.head_dim}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxAttention:
    """Softmax attention to all earlier tokens or to a window of them, with rotary.

    Attributes:
      kind: which of the two.
      num_heads: heads, which divide the model's width.
      window_size: keys that a query of sliding-window attention sees, its own included.
      rope_theta: base of the rotary frequencies.
      conv_size: tokens seen by a short convolution of queries, keys and values; none if None.

    Raises:
      ValueError: a field has a value that no model can have; the message names the field.
    """

    kind: Literal["attention", "sliding_window_attention"] = "sliding_window_attention"
    num_heads: int = 18
    window_size: int = 2048
    rope_theta: float = 10000.0
    conv_size: int | None = None

    def __post_init__(self):
        check_fields(self)

    def layer(self, config: "ModelConfig", decode: bool, name: str | None) -> nn.Module:
        """The layer of a model."""
        shared = _shared(config, decode, name) | {
            "num_heads": self.num_heads,
            "rope_theta": self.rope_theta,
            "conv_size": self.conv_size,
            "out_kernel_init": depth_scaled(config),
        }
        if self.cache_grows:
            return Attention(**shared, context_length=config.context_length)
        return SlidingWindowAttention(**shared, window_size=self.window_size)

    def flops(self, d_model: int, sequence_length: int) -> float:
        """FLOPs for one token: 4 d_model for each key that its query sees."""
        window = sequence_length if self.cache_grows else min(self.window_size, sequence_length)
        # The first `window` queries see 1, 2, ..., the others `window` keys.
        keys = window - window * (window - 1) / (2 * sequence_length)
        return 4 * d_model * keys

    @property
    def splits_sequences(self) -> bool:
        """Whether it runs on sequences that are split over devices."""
        return not self.cache_grows

    @property
    def cache_grows(self) -> bool:
        """Whether its cache in decoding grows with the text."""
        return self.kind == "attention"

    @property
    def tensor_axes(self) -> dict[str, int]:
        """What a mesh axis "tensor" splits, by name."""
        return {"num_heads": self.num_heads}


Mixer = DeltaRule | StateSpace | SoftmaxAttention

MIXERS: dict[str, Mixer] = {
    "gdn2": DeltaRule(kind="gdn2"),
    "kda": DeltaRule(kind="kda"),
    "gdn": DeltaRule(kind="gdn"),
    "deltanet": DeltaRule(kind="deltanet"),
    "gated_deltaproduct": DeltaRule(kind="gated_deltaproduct"),
    "mamba2": StateSpace(kind="mamba2"),
    "mamba3": StateSpace(kind="mamba3"),
    "mamba3_mimo": StateSpace(kind="mamba3", mimo_rank=4),
    "attention": SoftmaxAttention(kind="attention"),
    "sliding_window_attention": SoftmaxAttention(kind="sliding_window_attention"),
}
"""Every mixer by its name in presets and on command lines, with the sizes of the 1.3B models."""


def named_mixer(name: str, sizes: dict[type, dict[str, Any]]) -> Mixer:
    """The mixer of that name with other sizes, which `sizes` has by the mixer's class."""
    mixer = MIXERS[name]
    return dataclasses.replace(mixer, **sizes.get(type(mixer), {}))


def depth_scaled(config: "ModelConfig") -> Initializer:
    """Of the projections back to the stream: narrower, the more layers add to it."""
    branches = 1 if config.mlp_dim is None else 2
    return fan_in_uniform(math.sqrt(branches * config.num_layers))


def _shared(config: "ModelConfig", decode: bool, name: str | None) -> dict[str, Any]:
    """The attributes of every mixer's layer."""
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return dtypes | {"decode": decode, "name": name}


def _recurrent(config: "ModelConfig", decode: bool, name: str | None) -> dict[str, Any]:
    """The attributes of every recurrent mixer's layer."""
    own = {"norm_epsilon": config.norm_epsilon, "implementation": config.implementation}
    return _shared(config, decode, name) | own
