"""Checkpoints: written in the background, whole or not at all, and checked when read."""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from gdn2_jax.training.step import TrainState


class CheckpointError(Exception):
    """A checkpoint is damaged, belongs to another configuration or cannot be written."""


def open_checkpoints(directory: Path, kept: int) -> ocp.CheckpointManager:
    """Returns a manager that saves asynchronously and keeps the latest `kept` checkpoints.

    What a killed save left behind does not count as a checkpoint, and is removed.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=kept, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def read_checkpoints(directory: Path) -> ocp.CheckpointManager:
    """Returns a manager that alters nothing, not even where a run is saving at the moment."""
    check_name(directory)
    options = ocp.CheckpointManagerOptions(create=False, cleanup_tmp_directories=False)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def check_name(directory: Path) -> None:
    """Raises a ValueError if tensorstore, to which names are UTF-8, would take another directory."""
    path = directory.absolute()
    try:
        same = os.fsencode(path) == str(path).encode()
    except UnicodeEncodeError:
        same = False
    if not same:
        raise ValueError(
            f"run_dir: expected a name in UTF-8, got {str(path)!r} "
            "(with PYTHONUTF8=1 names are read as UTF-8 in every locale)"
        )


def save_checkpoint(
    manager: ocp.CheckpointManager, state: TrainState, progress: dict[str, Any]
) -> None:
    """Starts to save `state`; it may be donated when this returns.

    Args:
      manager: from `open_checkpoints`, with no other save on its way.
      state: to be saved under its step.
      progress: JSON, saved beside the arrays.

    Raises:
      CheckpointError: the save has failed already; `check_saved` tells whether it fails later.
    """
    trees = _split(state)
    content = {"progress": progress, "checksums": _checksums(trees)}
    items: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
    items["content"] = ocp.args.JsonSave({**content, "sha256": _sha256(content)})
    step = int(state.step)
    try:
        manager.save(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise _unsaved(manager, step, error) from error


def check_saved(manager: ocp.CheckpointManager, step: int, *, wait: bool = False) -> None:
    """Notices that a save has failed in the background.

    Args:
      manager: from `open_checkpoints`.
      step: of the latest save.
      wait: until the save is complete. Else one that is on its way is no failure.

    Raises:
      CheckpointError: the save has failed.
    """
    if wait or not manager.is_saving_in_progress():
        try:
            manager.wait_until_finished()
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise _unsaved(manager, step, error) from error


def close_checkpoints(manager: ocp.CheckpointManager) -> None:
    """Ends what runs in the background. What fails then, `check_saved` has told before."""
    with contextlib.suppress(Exception):
        manager.close()


def restore_checkpoint(
    manager: ocp.CheckpointManager, step: int, abstract_state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Reads a checkpoint and compares every array with its checksum.

    Args:
      manager: from `open_checkpoints`.
      step: one of its steps.
      abstract_state: shapes, dtypes and shardings.

    Returns:
      The state, without the borders of its schedule, and `progress` as they were saved.

    Raises:
      CheckpointError: if the checkpoint is damaged, or does not fit `abstract_state`.
    """
    abstract_trees = _split(abstract_state)
    # Version 0.1 saved random numbers that nothing drew: they are not read, nor missed.
    abstract_trees["run"]["rng"] = ocp.PLACEHOLDER
    trees, progress = _restore(manager, step, abstract_trees)
    del trees["run"]["rng"]
    return TrainState(**trees["run"], params=trees["params"]), progress


def restore_params(manager: ocp.CheckpointManager, step: int, abstract_params: Any) -> Any:
    """Reads the parameters alone, as `restore_checkpoint` does the state.

    Raises:
      CheckpointError: if the checkpoint is damaged, or does not fit `abstract_params`.
    """
    return _restore(manager, step, {"params": abstract_params})[0]["params"]


def _unsaved(manager: ocp.CheckpointManager, step: int, error: Exception) -> CheckpointError:
    name_format = ocp.step.standard_name_format()
    saved = [other.step for other in name_format.find_all(manager.directory) if other.step != step]
    last = f"the last good one is that of step {max(saved)}" if saved else "there is no other"
    return CheckpointError(
        f"the checkpoint of step {step} cannot be saved in {manager.directory}, {last}: "
        f"{_reason(error)}"
    )


def _reason(error: Exception) -> str:
    """One line; tensorstore's holds the system's error among much else."""
    text = " ".join((str(error) or repr(error)).split())
    if system := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(system[1]))
    return text if len(text) < 300 else f"... {text[-250:]}"


def _split(state: TrainState) -> dict[str, Any]:
    """The checkpoint's items: parameters can be read without the rest."""
    run = state._asdict()
    del run["borders"]  # They follow from the configuration, which may get other steps.
    return {"params": run.pop("params"), "run": run}


def _restore(manager, step, abstract_trees):
    items: dict[str, Any] = {
        name: ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
        )
        for name, tree in abstract_trees.items()
    }
    items["content"] = ocp.args.JsonRestore()
    try:
        restored = dict(manager.restore(step, args=ocp.args.Composite(**items)).items())
        content = restored.pop("content")
        damaged = ["content"] if content.pop("sha256") != _sha256(content) else []
        checksums = content["checksums"]
        damaged += [
            name
            for name, value in _checksums(restored).items()
            if name not in checksums or checksums[name] != value
        ]
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise CheckpointError(f"{_advice(manager, step)}: {_reason(error)}") from error
    if damaged:
        raise CheckpointError(f"{_advice(manager, step)}: altered since it was saved: {damaged}")
    return restored, content["progress"]


def _advice(manager: ocp.CheckpointManager, step: int) -> str:
    earlier = [str(other) for other in sorted(manager.all_steps()) if other < step]
    remedy = f"go on from step {earlier[-1]}" if earlier else "start afresh"
    return (
        f"the checkpoint {manager.directory / str(step)} is damaged or of another model "
        f"(move it away to {remedy})"
    )


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksums(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of each array, by its path.

    Orbax's files have none of their data: a flipped byte there gives another number, not an error.
    Computed on the devices, wherever the shards lie: arrays need not come to the host for it, and
    the sum of integers is the same in any order. An array that differs in one element always has
    another checksum, one that differs in more with probability 1 - 2**-32.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf is not ocp.PLACEHOLDER
    }
    return {name: int(x) for name, x in jax.device_get(_checksum_arrays(leaves)).items()}


@jax.jit
def _checksum_arrays(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {name: _checksum(array) for name, array in arrays.items()}


@jax.jit  # parameters and both moments have the same shapes
def _checksum(x: Array) -> UInt32[Array, ""]:
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * size + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_scramble(words ^ _scramble(position)), dtype=jnp.uint32)


def _scramble(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's finalizer, a bijection in which every bit depends on every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
