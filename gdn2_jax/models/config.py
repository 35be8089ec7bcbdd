"""The one description of a language model."""

import dataclasses
from typing import Literal, get_args

from gdn2_jax.layers.inputs import check_wide_dtypes
from gdn2_jax.ops import Implementation

Mixer = Literal[
    "gdn2", "kda", "gdn", "deltanet", "mamba2", "mamba3", "attention", "sliding_window_attention"
]

SEQUENCE_PARALLEL_MIXERS = ("gdn2", "kda", "gdn", "deltanet", "sliding_window_attention")
"""Mixers that run on sequences of which every device holds a span."""

_POSITIVE = (
    *("vocab_size", "d_model", "num_layers", "num_heads", "head_dim", "expand_v", "conv_size"),
    *("ssm_inner_dim", "ssm_head_dim", "ssm_state_dim", "mimo_rank", "context_length"),
    *("attention_heads", "window_size", "mlp_dim", "norm_epsilon", "rope_theta", "loss_blocks"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options of a recurrent or hybrid language model, or of a Transformer.

    A mixer ignores the fields of the others.

    Attributes:
      vocab_size: number of token ids.
      d_model: width of the residual stream.
      num_layers: blocks of a mixer and an MLP.
      mixer: token mixer, a key of `gdn2_jax.models.blocks.MIXERS`.
      hybrid: `mixer` on even layers, sliding-window attention on odd ones.
      num_heads: key heads of the delta-rule mixers: gdn2, kda, gdn and deltanet.
      head_dim: key channels of each.
      num_value_heads: value heads, a multiple of `num_heads`; as many if None.
      expand_v: value channels per head, as a multiple of `head_dim`.
      conv_size: tokens seen by the short convolutions.
      allow_negative_eigenvalues: erase gate in [0, 2] instead of [0, 1].
      decay_lower_bound: None or a lower bound in [-5, 0) on the log-decay of gdn2 and kda.
      erase_gate: a gate per channel of gdn2, or its mean per head.
      write_gate: a gate per channel of gdn2, or its mean per head.
      output_gate: "silu" or "sigmoid"; None is the mixer's own, sigmoid in kda, SiLU in the others.
      ssm_inner_dim: value channels of mamba2 and mamba3, over all heads.
      ssm_head_dim: value channels of each of their heads.
      ssm_state_dim: key channels of their state.
      mamba3_form: one input and output a head ("siso") or `mimo_rank` of each ("mimo").
      mimo_rank: rank of the state's update in the latter form.
      attention_heads: heads of both attentions, which divide `d_model`.
      window_size: keys a query of sliding-window attention sees, its own included.
      context_length: tokens that full attention's cache holds in decoding; `generate` sets it.
      mlp_dim: hidden width of the SwiGLU MLP.
      norm_epsilon: epsilon of every RMSNorm.
      rope_theta: base of the rotary frequencies.
      dtype: dtype of the matrix products.
      param_dtype: dtype of the parameters (A_log and dt_bias are always float32).
      remat: what the backward recomputes instead of keeping it from the forward. "none": nothing.
        "intermediates": what lies inside norms, convolutions and gates; operands and results of
        matrix products and operators are kept. "elementwise": those operands too; results of matrix
        products and operators are kept. "mixer": all but the operators and the mixers' outputs.
        "full": all but the inputs of blocks.
      unroll: compile the layers one after another, not as a loop. Takes longer to compile; running,
        the backward reads what the forward kept where it lies, while a loop copies it into stacks.
        Parameters are the same.
      loss_blocks: parts in which the loss takes each sequence, see `models.loss.cross_entropy`.
      implementation: of the operator, see `gdn2_jax.gated_delta_rule_2`.

    Raises:
      ValueError: a field has a value that no model can have; the message names the field.
    """

    vocab_size: int = 32000
    d_model: int
    num_layers: int
    mixer: Mixer = "gdn2"
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
    output_gate: Literal["silu", "sigmoid"] | None = None
    ssm_inner_dim: int = 4096
    ssm_head_dim: int = 64
    ssm_state_dim: int = 64
    mamba3_form: Literal["siso", "mimo"] = "siso"
    mimo_rank: int = 4
    attention_heads: int = 18
    window_size: int = 2048
    context_length: int = 4096
    mlp_dim: int
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    param_dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    remat: Literal["none", "intermediates", "elementwise", "mixer", "full"] = "none"
    unroll: bool = False
    loss_blocks: int = 4
    implementation: Implementation | None = None

    def __post_init__(self):
        for name in _POSITIVE:
            self._require(name, getattr(self, name) > 0, "a positive number")
        for name, choices in (
            ("mixer", get_args(Mixer)),
            ("erase_gate", ("channel", "scalar")),
            ("write_gate", ("channel", "scalar")),
            ("output_gate", ("silu", "sigmoid", None)),
            ("mamba3_form", ("siso", "mimo")),
            ("dtype", ("bfloat16", "float16", "float32", "float64")),
            ("param_dtype", ("bfloat16", "float32", "float64")),
            ("remat", ("none", "intermediates", "elementwise", "mixer", "full")),
            ("implementation", (None, "pallas", "xla", "recurrent")),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {choices}")
        check_wide_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
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
        if self.mixer in ("mamba2", "mamba3"):
            self._require(
                "ssm_inner_dim",
                self.ssm_inner_dim % self.ssm_head_dim == 0,
                f"a multiple of ssm_head_dim {self.ssm_head_dim}",
            )
            self._require("ssm_state_dim", self.ssm_state_dim % 4 == 0, "a multiple of 4")
        if self.hybrid or self.mixer in ("attention", "sliding_window_attention"):
            self._require(
                "attention_heads",
                self.d_model % (2 * self.attention_heads) == 0,
                f"a number that divides d_model {self.d_model} into heads of even width",
            )

    def _require(self, name: str, fulfilled: bool, expected: str) -> None:
        if not fulfilled:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


def tensor_axes(config: ModelConfig) -> dict[str, int]:
    """What a mesh axis "tensor" splits in such a model, by name."""
    axes = {"mlp_dim": config.mlp_dim}
    if config.mixer in ("gdn2", "kda", "gdn", "deltanet"):
        axes["num_heads"] = config.num_heads
    if config.mixer in ("mamba2", "mamba3"):
        axes["ssm_inner_dim / ssm_head_dim"] = config.ssm_inner_dim // config.ssm_head_dim
    if config.hybrid or config.mixer in ("attention", "sliding_window_attention"):
        axes["attention_heads"] = config.attention_heads
    return axes
