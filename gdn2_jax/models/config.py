"""The one description of a language model."""

import dataclasses
from typing import Any, Literal

from gdn2_jax import fields
from gdn2_jax.layers.delta_rule_layer import StateRounding
from gdn2_jax.layers.inputs import check_wide_dtypes
from gdn2_jax.models.mixers import (
    MIXERS,
    DeltaRule,
    Mixer,
    SoftmaxAttention,
    StateSpace,
    check_fields,
    require,
)
from gdn2_jax.ops import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options of a recurrent or hybrid language model, or of a Transformer.

    Attributes:
      vocab_size: number of token ids.
      d_model: width of the residual stream.
      num_layers: blocks of a mixer and an MLP.
      mixer: token mixer, one of `gdn2_jax.models.MIXERS` or another of their classes.
      hybrid: `mixer` on even layers, `attention` on odd ones.
      attention: of the odd layers of a hybrid.
      context_length: tokens that full attention's cache holds in decoding; `generate` sets it.
      mlp_dim: hidden width of the SwiGLU MLP; None for blocks without one, as in Mamba-2's models.
      norm_epsilon: epsilon of every RMSNorm.
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
    mixer: Mixer = dataclasses.field(default_factory=DeltaRule)
    hybrid: bool = False
    attention: SoftmaxAttention = dataclasses.field(default_factory=SoftmaxAttention)
    context_length: int = 4096
    mlp_dim: int | None
    norm_epsilon: float = 1e-5
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    param_dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    remat: Literal["none", "intermediates", "elementwise", "mixer", "full"] = "none"
    unroll: bool = False
    loss_blocks: int = 4
    implementation: Implementation | None = None

    def __post_init__(self):
        check_fields(self)
        check_wide_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        paired = not (self.hybrid and self.num_layers % 2)
        require(self, "num_layers", paired, "an even number when hybrid")
        for name, mixer in self.mixers.items():
            heads = mixer.num_heads if isinstance(mixer, SoftmaxAttention) else None
            divides = f"a number that divides d_model {self.d_model} into heads of even width"
            fulfilled = not heads or self.d_model % (2 * heads) == 0
            fields.require(f"{name}.num_heads", fulfilled, divides, heads)

    @property
    def mixers(self) -> dict[str, Mixer]:
        """The mixers of consecutive layers, by the names of their fields."""
        return {"mixer": self.mixer} | ({"attention": self.attention} if self.hybrid else {})

    @property
    def tensor_axes(self) -> dict[str, int]:
        """The sizes that a mesh axis "tensor" splits in the model, by name."""
        axes = {
            f"{field}.{name}": size
            for field, mixer in self.mixers.items()
            for name, size in mixer.tensor_axes.items()
        }
        return axes if self.mlp_dim is None else {"mlp_dim": self.mlp_dim} | axes


def with_state_rounding(config: ModelConfig, rounding: StateRounding | None) -> ModelConfig:
    """The model with this rounding of its decoding states; the same model for None.

    Raises:
      ValueError: its mixer is no delta rule.
    """
    if rounding is None:
        return config
    if not isinstance(config.mixer, DeltaRule):
        kind = config.mixer.kind
        raise ValueError(f"state_rounding: expected None with {kind}, got {rounding!r}")  # noqa: TRY004
    mixer = dataclasses.replace(config.mixer, state_rounding=rounding)
    return dataclasses.replace(config, mixer=mixer)


def config_from_json(fields: dict[str, Any]) -> ModelConfig:
    """The configuration with these fields, as `dataclasses.asdict` gives them.

    Those of runs before version 0.2.0 are read, too: they hold the fields of all mixers side by side.
    """
    if isinstance(fields["mixer"], str):
        fields = _nested(fields)
    mixers: dict[str, Any] = {
        name: dataclasses.replace(MIXERS[fields[name]["kind"]], **fields[name])
        for name in ("mixer", "attention")
    }
    return ModelConfig(**fields | mixers)


# Fields of mixers by their names before version 0.2.0.
_OLD_FIELDS = {
    DeltaRule: {
        **{name: name for name in ("num_heads", "head_dim", "num_value_heads", "expand_v")},
        **{name: name for name in ("conv_size", "allow_negative_eigenvalues", "output_gate")},
        **{name: name for name in ("decay_lower_bound", "erase_gate", "write_gate")},
    },
    StateSpace: {
        "ssm_inner_dim": "inner_dim",
        "ssm_head_dim": "head_dim",
        "ssm_state_dim": "state_dim",
        "conv_size": "conv_size",
        "mimo_rank": "mimo_rank",
    },
    SoftmaxAttention: {
        "attention_heads": "num_heads",
        "window_size": "window_size",
        "rope_theta": "rope_theta",
    },
}


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    """Sorts one flat dict of fields into fields of the mixer, of the attention and of the model."""
    kind = fields["mixer"]
    if kind != "mamba3" or fields.get("mamba3_form") != "mimo":
        fields = fields | {"mimo_rank": None}

    def part(kind: str) -> dict[str, Any]:
        names = _OLD_FIELDS[type(MIXERS[kind])]
        return {"kind": kind} | {names[old]: fields[old] for old in names.keys() & fields.keys()}

    old = {"mamba3_form"}.union(*_OLD_FIELDS.values())
    rest = {name: value for name, value in fields.items() if name not in old}
    return rest | {"mixer": part(kind), "attention": part("sliding_window_attention")}
