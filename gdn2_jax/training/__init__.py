"""Training of language models: configuration, step, checkpoints, metrics and the loop."""

from gdn2_jax.training.checkpoint import CheckpointError
from gdn2_jax.training.config import PRESETS, OptimizerConfig, TrainingConfig
from gdn2_jax.training.programs import Programs, compile_programs, submit_programs, wait_for
from gdn2_jax.training.run import (
    TrainedModel,
    check_mesh,
    is_finished,
    load_trained,
    open_run,
    run_files,
)
from gdn2_jax.training.step import compile_train_step
from gdn2_jax.training.train import DivergenceError, StoppedError, train
from gdn2_jax.training.weights import Weights, open_weights

__all__ = [
    "PRESETS",
    "CheckpointError",
    "DivergenceError",
    "OptimizerConfig",
    "Programs",
    "StoppedError",
    "TrainedModel",
    "TrainingConfig",
    "Weights",
    "check_mesh",
    "compile_programs",
    "compile_train_step",
    "is_finished",
    "load_trained",
    "open_run",
    "open_weights",
    "run_files",
    "submit_programs",
    "train",
    "wait_for",
]
