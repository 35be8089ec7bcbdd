"""The configuration of a run as a file of JSON, and what of it may change when the run goes on."""

import dataclasses
import json
from pathlib import Path

from flax.traverse_util import flatten_dict

from gdn2_jax.data import DataConfig
from gdn2_jax.files import write_text
from gdn2_jax.models import config_from_json
from gdn2_jax.parallel import MeshConfig
from gdn2_jax.training.checkpoint import CheckpointError
from gdn2_jax.training.config import OptimizerConfig, TrainingConfig

# What may differ when a run goes on: it changes no number, or (steps) is meant to be raised. The
# text itself may move: the corpus' digest is compared.
_MAY_DIFFER = {
    *("steps", "log_every", "validate_every", "validation_batches", "checkpoint_every"),
    *("checkpoints_kept", "sample_prompt", "sample_tokens"),
    *("data.paths", "data.validation_paths", "data.num_workers", "data.cache_directory"),
    "data.verify",
    *("model.remat", "model.unroll", "overlap", "model.loss_blocks", "model.implementation"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence"),
}


def save_config(config: TrainingConfig, path: Path) -> None:
    """Writes a configuration as JSON, as a whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_config(path: Path) -> TrainingConfig:
    """Reads what `save_config` wrote.

    Raises:
      CheckpointError: if the file is missing or damaged, or from another version of the code.
    """
    try:
        fields = json.loads(path.read_text())
        fields["data"] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields["data"].items()
        }
        fields["model"] = config_from_json(fields["model"])
        parts = {"data": DataConfig, "optimizer": OptimizerConfig, "mesh": MeshConfig}
        fields |= {name: part(**fields[name]) for name, part in parts.items()}
        return TrainingConfig(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} does not hold a configuration: {error}") from error


def compare_configs(old: TrainingConfig, new: TrainingConfig) -> list[str]:
    """Describes the fields that differ, so that the run cannot go on exactly."""
    there, here = (flatten_dict(dataclasses.asdict(config), sep=".") for config in (old, new))
    return [
        f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
        for name in there | here
        if there.get(name) != here.get(name) and name not in _MAY_DIFFER
    ]
