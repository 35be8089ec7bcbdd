"""Weights that a run starts from: of another run, or of a PyTorch checkpoint."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gdn2_jax.models import ModelConfig
from gdn2_jax.training.config import TrainingConfig
from gdn2_jax.training.config_file import load_config
from gdn2_jax.training.run import load_trained, run_files
from gdn2_jax.training.step import abstract_state


class Weights(NamedTuple):
    """A trained model, read when asked for.

    `load` returns the parameters. `training` is None for a PyTorch checkpoint, `tokenizer` "bytes" for
    one without. Both names are those of `DataConfig`.
    """

    model: ModelConfig
    training: TrainingConfig | None
    tokenizer: str
    end_of_document: str
    load: Callable[[], Any]


def open_weights(path: str | Path) -> Weights:
    """Opens what `TrainingConfig.init_from` names.

    Args:
      path: the directory of a run, for its latest checkpoint; one of its checkpoints,
        such as runs/tiny/checkpoints/100; or a checkpoint for
        `gdn2_jax.interop.pytorch.load_pretrained`.

    Raises:
      FileNotFoundError: there is nothing like that.
      ValueError: a PyTorch checkpoint is damaged or of another model.
      CheckpointError: the configuration of the run is damaged.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        return _open_run(path, None)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return _open_run(path.parents[1], int(path.name))
    from gdn2_jax.interop.pytorch import load_pretrained, pretrained_config

    file = path / "tokenizer.json"
    tokenizer = str(file) if file.is_file() else "bytes"
    model = pretrained_config(path)
    return Weights(model, None, tokenizer, "", lambda: load_pretrained(path).params)


def place_weights(config: TrainingConfig, mesh: Mesh) -> Any:
    """Reads the parameters of `config.init_from`, in the run's dtypes and where the mesh has them.

    Raises:
      ValueError: they are of another model; the message names the first parameter that differs.
    """
    params = open_weights(config.init_from).load()
    abstract = abstract_state(config, mesh).params
    found, expected = (
        {jax.tree_util.keystr(key, simple=True, separator="/"): leaf.shape for key, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, abstract))
    )
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"init_from: expected the model of the run, with {name} {expected.get(name)}, "
                f"got {found.get(name)} in {config.init_from}"
            )
    # Through the host: the mesh may be of several processes.
    return jax.tree.map(
        lambda x, to: jax.device_put(jax.device_get(x).astype(to.dtype), to.sharding),
        params,
        abstract,
    )


def _open_run(directory: Path, step: int | None) -> Weights:
    files = run_files(directory)
    training = load_config(files.config)
    data = training.data
    tokenizer = "bytes" if data.tokenizer == "bytes" else str(files.tokenizer)
    load = functools.partial(_params, directory, step)
    return Weights(training.model, training, tokenizer, data.end_of_document, load)


def _params(directory: Path, step: int | None) -> Any:
    return load_trained(directory, step).params
