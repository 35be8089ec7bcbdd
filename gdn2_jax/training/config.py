"""The configuration of a training run, and presets."""

import dataclasses
from typing import Literal

from gdn2_jax.data import DataConfig
from gdn2_jax.fields import check_types, require, require_text
from gdn2_jax.models import PRESETS as MODELS
from gdn2_jax.models import ModelConfig
from gdn2_jax.parallel import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with clipping and a schedule with linear warm-up; the defaults are the paper's recipe.

    Raises:
      ValueError: if a field is out of its range (names the field).
    """

    learning_rate: float = 4e-4
    """Peak of the schedule."""

    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After warm-up: a cosine over the rest of the run; the peak; or the peak and then a line to the
    end. With the last two, more steps continue a run at the rate that it had."""

    decay: float = 0.2
    """Share of the run in which the learning rate of "wsd" falls."""

    final_learning_rate: float = 0.1
    """End of the schedules that fall, as a share of the peak."""

    warmup: float = 0.01
    """Share of the run in which the learning rate rises from 0 to its peak."""

    beta1: float = 0.9
    """Decay of the average of gradients."""

    beta2: float = 0.95
    """Decay of the average of squared gradients."""

    epsilon: float = 1e-8
    """Added to the root of the average of squared gradients."""

    weight_decay: float = 0.1
    """Decoupled weight decay; the learning rate multiplies it."""

    decay_mask: Literal["all", "exclude_A_log_dt_bias", "matrices_only"] = "all"
    """What decays: every parameter, as in the paper's released trainer; all but A_log and dt_bias,
    which that trainer marks but does not leave out; or projections and embeddings alone."""

    clip_norm: float = 1.0
    """Gradients of a greater global norm are scaled down to it."""

    mean_dtype: Literal["bfloat16", "float32"] | None = None
    """Of the average of gradients; None: the parameters'. The squares' is always theirs."""

    def __post_init__(self):
        check_types(self, "optimizer.")
        for name in ("learning_rate", "epsilon", "clip_norm"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "a positive number")
        for name in ("final_learning_rate", "weight_decay"):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "a number >= 0")
        for name in ("warmup", "decay", "beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        if self.schedule == "wsd":
            self._require("decay", self.decay <= 1 - self.warmup, f"at most 1 - {self.warmup}")

    def _require(self, name: str, fulfilled: bool, expected: str) -> None:
        require(f"optimizer.{name}", fulfilled, expected, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run.

    Raises:
      ValueError: if a field is out of its range (names the field).
    """

    model: ModelConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    init_from: str = ""
    """Weights to start from: a run's directory, one of its checkpoints (runs/tiny/checkpoints/100) or
    a PyTorch checkpoint. Empty: random ones."""

    steps: int
    """Optimizer steps. The schedule of the learning rate spans them."""

    global_batch_size: int
    """Sequences of an optimizer step, over all devices."""

    accumulation: int = 1
    """Microbatches into which each batch is split, to save memory; their gradients are averaged."""

    overlap: bool = True
    """On several GPUs: options of XLA that hide collectives behind computation."""

    seed: int = 0
    """Of the parameters' initial values."""

    log_every: int = 10
    """Steps between lines of metrics."""

    validate_every: int = 1000
    """Steps between evaluations of the validation split."""

    validation_batches: int | None = None
    """Microbatches of an evaluation, always the same. None: the whole validation split."""

    checkpoint_every: int = 1000
    """Steps between checkpoints."""

    checkpoints_kept: int = 2
    """The latest so many checkpoints are kept."""

    sample_prompt: str = ""
    """What the sample at the end of the run continues; empty: a new document."""

    sample_tokens: int = 256
    """Tokens of that sample, drawn at temperature 0.8. 0: no sample."""

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("seed", "sample_tokens") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{field.name}: expected at least {least}, got {value}")
        require_text("sample_prompt", self.sample_prompt)
        # JAX takes 32 bits of a seed: greater ones would repeat the numbers of smaller ones.
        require("seed", self.seed < 2**32, f"less than 2**32 = {2**32}", self.seed)
        size, count = self.global_batch_size, self.accumulation
        divisor = f"a divisor of global_batch_size {size}"
        require("accumulation", size % count == 0, divisor, count)

    @property
    def microbatch_size(self) -> int:
        """Sequences that run through the model at once, over all devices."""
        return self.global_batch_size // self.accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all devices."""
        return self.global_batch_size * self.data.sequence_length


def _tiny_recipe(model: ModelConfig) -> TrainingConfig:
    """0.5M bytes in batches of 2K, sequences of 256: minutes on two CPU cores."""
    return TrainingConfig(
        model=model,
        data=DataConfig(sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup=0.05),
        steps=240,
        global_batch_size=8,
        validate_every=100,
        validation_batches=16,
        checkpoint_every=100,
        sample_prompt="def ",
    )


def _byte_recipe(model: ModelConfig) -> TrainingConfig:
    """100M bytes in batches of 64K, sequences of 1024: minutes on one data-centre GPU."""
    return TrainingConfig(
        model=model,
        data=DataConfig(sequence_length=1024),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.05),
        steps=1600,
        global_batch_size=64,
        validate_every=200,
        validation_batches=32,
        checkpoint_every=400,
        sample_prompt="def ",
    )


def _paper_recipe(model: ModelConfig) -> TrainingConfig:
    """100B tokens in batches of 0.5M, sequences of 4096, AdamW as above."""
    return TrainingConfig(
        model=model,
        data=DataConfig(sequence_length=4096),
        steps=190_734,
        global_batch_size=128,
    )


_RECIPES = {"tiny": _tiny_recipe, "30M": _byte_recipe}

PRESETS: dict[str, TrainingConfig] = {
    name: _RECIPES.get(name.rpartition("_")[2], _paper_recipe)(model)
    for name, model in MODELS.items()
}
"""A run of every model preset, by its name; the scale, which ends the name, has the recipe."""
