"""The one description of a language model."""

import dataclasses
from typing import Literal

from gdn2_jax.ops import Implementation

_POSITIVE = (
    *("vocab_size", "d_model", "num_layers", "num_heads", "head_dim", "expand_v", "conv_size"),
    *("attention_heads", "window_size", "mlp_dim", "norm_epsilon", "rope_theta"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options of a recurrent or hybrid language model.

    Attributes:
      vocab_size: number of token ids.
      d_model: width of the residual stream.
      num_layers: blocks of a mixer and an MLP.
      mixer: token mixer, a key of `gdn2_jax.models.blocks.MIXERS`.
      hybrid: `mixer` on even layers, sliding-window attention on odd ones.
      num_heads: key heads of the recurrent mixer.
      head_dim: key channels of each.
      num_value_heads: value heads, a multiple of `num_heads`; as many if None.
      expand_v: value channels per head, as a multiple of `head_dim`.
      conv_size: tokens seen by the short convolutions.
      allow_negative_eigenvalues: erase gate in [0, 2] instead of [0, 1].
      decay_lower_bound: None or a lower bound in [-5, 0) on the log-decay.
      erase_gate: a gate per channel, or its mean per head.
      write_gate: a gate per channel, or its mean per head.
      output_gate: "silu" as in the paper, "sigmoid" as in flash-linear-attention.
      attention_heads: heads of sliding-window attention, which divide `d_model`.
      window_size: keys an attention query sees, its own included.
      mlp_dim: hidden width of the SwiGLU MLP.
      norm_epsilon: epsilon of every RMSNorm.
      rope_theta: base of the rotary frequencies.
      dtype: dtype of the matrix products.
      param_dtype: dtype of the parameters (A_log and dt_bias are always float32).
      remat: "full" recomputes each block in the backward, "none" keeps its activations.
      implementation: of the operator, see `gdn2_jax.gated_delta_rule_2`.

    Raises:
      ValueError: a field has a value that no model can have; the message names the field.
    """

    vocab_size: int = 32000
    d_model: int
    num_layers: int
    mixer: str = "gdn2"
    hybrid: bool = False
    num_heads: int = 16
    head_dim: int = 128
    num_value_heads: int | None = None
    expand_v: float = 1.0
    conv_size: int = 4
    allow_negative_eigenvalues: bool = False
    decay_lower_bound: float | None = None
    erase_gate: Literal["channel", "scalar"] = "channel"
    write_gate: Literal["channel", "scalar"] = "channel"
    output_gate: Literal["silu", "sigmoid"] = "silu"
    attention_heads: int = 18
    window_size: int = 2048
    mlp_dim: int
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    param_dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    remat: Literal["none", "full"] = "none"
    implementation: Implementation | None = None

    def __post_init__(self):
        for name in _POSITIVE:
            self._require(name, getattr(self, name) > 0, "a positive number")
        for name, choices in (
            ("mixer", ("gdn2", "sliding_window_attention")),
            ("erase_gate", ("channel", "scalar")),
            ("write_gate", ("channel", "scalar")),
            ("output_gate", ("silu", "sigmoid")),
            ("dtype", ("bfloat16", "float16", "float32", "float64")),
            ("param_dtype", ("bfloat16", "float32", "float64")),
            ("remat", ("none", "full")),
            ("implementation", (None, "pallas", "xla", "recurrent")),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {choices}")
        groups = self.num_value_heads
        self._require(
            "num_value_heads",
            groups is None or (groups > 0 and groups % self.num_heads == 0),
            f"None or a multiple of num_heads {self.num_heads}",
        )
        self._require(
            "expand_v",
            float(self.head_dim * self.expand_v).is_integer(),
            f"a number that times head_dim {self.head_dim} is whole",
        )
        bound = self.decay_lower_bound
        self._require("decay_lower_bound", bound is None or -5 <= bound < 0, "None or in [-5, 0)")
        self._require(
            "num_layers", not (self.hybrid and self.num_layers % 2), "an even number when hybrid"
        )
        if self.hybrid or self.mixer == "sliding_window_attention":
            self._require(
                "attention_heads",
                self.d_model % (2 * self.attention_heads) == 0,
                f"a number that divides d_model {self.d_model} into heads of even width",
            )

    def _require(self, name: str, fulfilled: bool, expected: str) -> None:
        if not fulfilled:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
