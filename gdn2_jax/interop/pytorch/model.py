"""Whole language models: from a PyTorch checkpoint, to one, and from style to style."""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Sharding

from gdn2_jax.files import write_text
from gdn2_jax.interop.pytorch.config import (
    check_model_type,
    check_style,
    config_from_description,
    config_from_shapes,
    describe,
    read_description,
)
from gdn2_jax.interop.pytorch.convert import (
    Leaf,
    check_params,
    leaf_shapes,
    leaves_of_params,
    leaves_of_tensors,
    params_of_leaves,
    tensors_of_leaves,
)
from gdn2_jax.interop.pytorch.files import (
    FileFormat,
    StoredTensor,
    names_a_file,
    open_tensors,
    unwrapped,
    write_tensors,
)
from gdn2_jax.interop.pytorch.layouts import Style, embedding_name, model_entries, style_of
from gdn2_jax.interop.pytorch.mamba2_config import is_tied
from gdn2_jax.models import ModelConfig
from gdn2_jax.models.sizes import abstract_variables

_EMBEDDING, _HEAD = "model.embeddings.weight", "lm_head.weight"


class Pretrained(NamedTuple):
    """A language model, for `LanguageModel(config).apply({"params": params}, tokens)`."""

    config: ModelConfig
    params: dict[str, Any]


def load_pretrained(
    path: str | Path,
    *,
    config: ModelConfig | None = None,
    sharding: Sharding | dict[str, Any] | None = None,
) -> Pretrained:
    """Loads a PyTorch checkpoint, one stacked parameter at a time.

    Of the paper's repository, of flash-linear-attention (GDN-2, KDA, Gated DeltaNet), or of Mamba-2 in
    mamba_ssm's, transformers' or flash-linear-attention's layout. Mamba-2 is only read.

    Args:
      path: a directory or file for `open_tensors`. All checkpoints but those of the paper's
        repository have their config.json beside them.
      config: of the model; if None, that of the config.json, or what the shapes of the paper's
        style tell (attention then has heads of width 128 and windows of 2048, as in the paper).
      sharding: of every parameter, or a tree of them as `gdn2_jax.parallel.param_shardings` gives;
        on the default device if None.

    Returns:
      The model, its parameters in the dtypes of the checkpoint.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or does not fit the model: missing, unexpected and misshapen
        tensors are all listed.
    """
    config, leaves = _open(Path(path), config)
    return Pretrained(config, params_of_leaves(leaves, sharding))


def pretrained_config(path: str | Path) -> ModelConfig:
    """Returns what `load_pretrained` of the path takes as the model, reading no weights."""
    return _open(Path(path), None)[0]


def save_pretrained(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    style: Style = "fla",
    **options: Any,
) -> list[Path]:
    """Saves a language model for PyTorch.

    Args:
      path: a directory, or a .safetensors, .pt, .pth or .bin file. Style "fla" leaves a config.json
        beside the weights.
      config: of the model.
      params: of the model.
      style: whose names the tensors get.
      **options: `file_format`, `shard_bytes` and `on_tensor` of `write_tensors`.

    Returns:
      The files written; none if one fails.

    Raises:
      FileExistsError: there are weights already.
      TypeError: the parameters are no tree of dicts.
      ValueError: the style has no such model, or the parameters do not fit the model; the message
        lists every missing, unexpected and misshapen one.
    """
    entries = model_entries(config, style)
    check_params(params, abstract_variables(config, 1)["params"])
    leaves = leaves_of_params(params, entries)
    return _save(Path(path), config, leaves, style, **options)


def convert_pretrained(
    source: str | Path,
    path: str | Path,
    *,
    config: ModelConfig | None = None,
    style: Style = "fla",
    **options: Any,
) -> list[Path]:
    """Converts a PyTorch checkpoint to the other style or another kind of file.

    Memory holds one file of the result at a time (one tensor if it is no safetensors). `source` and
    `config` are for `load_pretrained`; `path`, the result's `style` and options for `save_pretrained`.

    Returns:
      The files written.

    Raises:
      FileNotFoundError: a file is missing.
      FileExistsError: there are weights already.
      ValueError: as in `load_pretrained` and `save_pretrained`.
    """
    config, leaves = _open(Path(source), config)
    return _save(Path(path), config, leaves, style, **options)


def _open(path: Path, config: ModelConfig | None) -> tuple[ModelConfig, dict[Leaf, StoredTensor]]:
    description_file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        tensors = unwrapped(open_tensors(path))
        style = style_of(tensors)
    except ValueError:
        # Rather than names and dtypes of tensors, say what the model is.
        if config is None and description_file.is_file():
            check_model_type(read_description(description_file))
        raise
    embedding, described = tensors[embedding_name(style)], style != "paper"
    if described and (config is None or (_HEAD not in tensors and description_file.is_file())):
        description = read_description(description_file)
        if config is None:
            config = config_from_description(description, embedding.dtype)
        if is_tied(description):
            tensors.setdefault(_HEAD, embedding)
    elif config is None:
        config = config_from_shapes(tensors)
    entries = model_entries(config, style)
    shapes = leaf_shapes(abstract_variables(config, 1)["params"], entries)
    return config, leaves_of_tensors(tensors, entries, shapes)


def _save(
    path: Path,
    config: ModelConfig,
    leaves: dict[Leaf, StoredTensor],
    style: Style,
    file_format: FileFormat = "safetensors",
    shard_bytes: int = 5 * 2**30,
    on_tensor: Callable[[str, StoredTensor], None] = lambda name, tensor: None,
) -> list[Path]:
    tensors = tensors_of_leaves(leaves, model_entries(config, style))
    check_style(config, style)
    write = functools.partial(
        write_tensors, file_format=file_format, shard_bytes=shard_bytes, on_tensor=on_tensor
    )
    if style == "paper":
        return write(path, tensors, under="model")
    content = describe(config, tensors[_EMBEDDING].dtype)
    directory = path.parent if names_a_file(path) else path
    description = directory / "config.json"
    if description.exists():
        raise FileExistsError(f"{description} exists already")
    files = write(path, tensors)
    with contextlib.ExitStack() as undo:
        # Weights without it would be in the way of the next attempt.
        for file in files:
            undo.callback(file.unlink)
        write_text(description, json.dumps(content, indent=2) + "\n")
        undo.pop_all()
    return [*files, description]
