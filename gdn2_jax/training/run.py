"""The directory of a run, and the checks that come before anything is compiled or overwritten."""

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from gdn2_jax.data import Corpus, Tokenizer, load_tokenizer, prepare
from gdn2_jax.fields import require
from gdn2_jax.parallel import (
    batch_reader,
    batch_shards,
    greatest_of_processes,
    make_mesh,
)
from gdn2_jax.training.checkpoint import (
    CheckpointError,
    check_name,
    close_checkpoints,
    open_checkpoints,
    read_checkpoints,
    restore_checkpoint,
    restore_params,
)
from gdn2_jax.training.config import TrainingConfig
from gdn2_jax.training.config_file import compare_configs, load_config
from gdn2_jax.training.lock import lock_directory
from gdn2_jax.training.step import TrainState, abstract_state


class RunFiles(NamedTuple):
    """Where a run keeps its files.

    Attributes:
      config: the `TrainingConfig` as JSON.
      tokenizer: for `gdn2_jax.data.load_tokenizer`.
      checkpoints: of orbax.
      metrics: one JSON object for each logged step.
      tensorboard: the same for TensorBoard.
      plot: of the losses; a .pdf lies beside it.
      summary: the results as JSON, written last.
    """

    config: Path
    tokenizer: Path
    checkpoints: Path
    metrics: Path
    tensorboard: Path
    plot: Path
    sample: Path
    summary: Path


class Progress(NamedTuple):
    """How far a run has read its data; saved with its checkpoints.

    Attributes:
      corpus: digest of the corpus.
      position: number of sequences that were trained on.
      readers: processes that read parts of a batch, and workers of each; `iterator` fits no others.
      start_sequence: where `iterator` began.
      iterator: grain's state of the iterator.
      losses: of the steps since the last line of metrics.
    """

    corpus: str
    position: int = 0
    readers: list[int] | None = None
    start_sequence: int = 0
    iterator: Any = None
    losses: Sequence[float] = ()


class Run(NamedTuple):
    """A run that has passed all checks, ready to start or to go on. No other process can open it.

    Attributes:
      mesh: the devices.
      corpus: the data.
      state: restored from the latest checkpoint; None if there is none.
      progress: saved with that checkpoint, or that of the beginning.
    """

    config: TrainingConfig
    files: RunFiles
    mesh: Mesh
    corpus: Corpus
    checkpoints: ocp.CheckpointManager
    state: TrainState | None
    progress: Progress
    lock: TextIO | None

    def close(self) -> None:
        """Ends what runs in the background and lets others open the run."""
        close_checkpoints(self.checkpoints)
        if self.lock:
            self.lock.close()


def run_files(directory: Path) -> RunFiles:
    """Returns the paths of a run's files."""
    return RunFiles(
        config=directory / "config.json",
        tokenizer=directory / "tokenizer.json",
        checkpoints=directory / "checkpoints",
        metrics=directory / "metrics.jsonl",
        tensorboard=directory / "tensorboard",
        plot=directory / "loss.png",
        sample=directory / "sample.txt",
        summary=directory / "summary.json",
    )


def open_run(config: TrainingConfig, directory: Path) -> Run:
    """Prepares a run for `train`: the data, the directory, and the latest checkpoint.

    The directory is created if missing, and locked until the run is closed.

    Raises:
      ValueError: if the devices do not make up the mesh, the mesh does not divide the batch or the
        model, the corpus is empty, the tokenizer does not fit the model, or the directory's run has
        another configuration or corpus.
      FileNotFoundError: if the text or the tokenizer does not exist.
      BlockingIOError: if another process trains in the directory.
      OSError: if the directory cannot be written.
      CheckpointError: if the latest checkpoint is damaged.
    """
    mesh = make_mesh(config.mesh)
    check_mesh(config, mesh)
    files = run_files(directory)
    check_name(directory)
    for path in (*config.data.paths, *config.data.validation_paths):
        if Path(path).expanduser().resolve() == directory.resolve():
            raise ValueError(
                f"run_dir: expected a directory apart from the text's, got {directory}"
            )
    with contextlib.ExitStack() as undo:
        # A mistake in the data leaves no directory; one that is there may say no, and sooner.
        claim = None
        if greatest_of_processes(directory.exists()):
            claim = _claim(config, directory, undo)
        corpus = prepare(config.data)
        least, size = corpus.tokenizer.vocab_size, config.model.vocab_size
        require("model.vocab_size", size >= least, f"at least the tokenizer's {least}", size)
        _warn_of_loss(config, corpus.tokenizer)
        lock, checkpoints = claim or _claim(config, directory, undo)
        state, progress = None, Progress(corpus.digest)
        step = checkpoints.latest_step()
        if step is not None:
            state, saved = restore_checkpoint(checkpoints, step, abstract_state(config, mesh))
            progress = Progress(**saved)
            if progress.corpus != corpus.digest:
                raise ValueError(
                    f"data: {directory} was trained on another corpus: files were added, removed "
                    "or edited, or the default corpus is that of another Python. Use another "
                    "--run-dir"
                )
        undo.pop_all()
    return Run(config, files, mesh, corpus, checkpoints, state, progress, lock)


def _claim(
    config: TrainingConfig, directory: Path, undo: contextlib.ExitStack
) -> tuple[TextIO | None, ocp.CheckpointManager]:
    """Locks a directory, and compares its run with the configuration."""
    files = run_files(directory)
    lock = lock_directory(directory)
    if lock:
        undo.callback(lock.close)
    for name, path in files._asdict().items():
        kind = "directory" if name in ("checkpoints", "tensorboard") else "file"
        if path.exists() and path.is_dir() != (kind == "directory"):
            raise ValueError(f"run_dir: expected {path} to be a {kind}, got another kind")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"run_dir: expected to write, got no permission for {path}")
    checkpoints = open_checkpoints(files.checkpoints, config.checkpoints_kept)
    undo.callback(close_checkpoints, checkpoints)
    if checkpoints.latest_step() is not None:
        differences = compare_configs(load_config(files.config), config)
        if differences:
            raise ValueError(
                f"{directory} holds a run of another configuration: {'; '.join(differences)}. "
                "Use its values to go on, or another --run-dir"
            )
    return lock, checkpoints


# Of what tokenizers alter: case, spaces, accents, scripts, lines.
_PROBE = "Ab  c\tD\n\n  é ß Ω 日本 \N{GRINNING FACE} don't 1,000"


def _warn_of_loss(config: TrainingConfig, tokenizer: Tokenizer) -> None:
    """Tells if text does not survive the tokenizer: the model cannot learn what is lost."""
    decoded = tokenizer.decode(tokenizer.encode(_PROBE))
    if decoded.removeprefix(" ") != _PROBE and jax.process_index() == 0:
        logging.getLogger(__name__).warning(
            "data.tokenizer: %s alters text: %r becomes %r",
            *(config.data.tokenizer, _PROBE, decoded),
        )


def summarized_step(files: RunFiles) -> int | None:
    """The step of the summary, which is written last; None without one."""
    try:
        return json.loads(files.summary.read_text())["step"]
    except (OSError, ValueError, KeyError):
        return None


def is_finished(config: TrainingConfig, directory: Path) -> bool:
    """Whether `directory` holds the finished run of exactly this configuration."""
    files = run_files(directory)
    try:
        return summarized_step(files) == config.steps and load_config(files.config) == config
    except CheckpointError:
        return False


class TrainedModel(NamedTuple):
    """What a run has learnt so far."""

    config: TrainingConfig
    params: Any
    tokenizer: Tokenizer
    step: int


def load_trained(directory: Path, step: int | None = None) -> TrainedModel:
    """Reads a run's tokenizer and the parameters of its checkpoint after `step`; None: the latest.

    Raises:
      FileNotFoundError: if the directory holds no run with such a checkpoint.
      CheckpointError: if something in it is damaged.
    """
    files = run_files(directory)
    if not files.checkpoints.is_dir():
        raise FileNotFoundError(f"{directory} is not the directory of a run")
    config = load_config(files.config)
    with contextlib.closing(read_checkpoints(files.checkpoints)) as checkpoints:
        steps = checkpoints.all_steps()
        if not steps:
            raise FileNotFoundError(f"{directory} has no checkpoint yet")
        step = max(steps) if step is None else step
        if step not in steps:
            raise FileNotFoundError(f"{directory} has no checkpoint of step {step}, but {steps}")
        device = SingleDeviceSharding(jax.devices()[0])
        params = restore_params(checkpoints, step, abstract_state(config, device).params)
    tokenizer = load_tokenizer(files.tokenizer, config.data.end_of_document)
    return TrainedModel(config, params, tokenizer, step)


def check_mesh(config: TrainingConfig, mesh: Mesh) -> None:
    """Raises a ValueError unless the mesh divides all that it splits."""
    batch_reader(mesh)
    model, rows = config.model, batch_shards(mesh)
    if config.microbatch_size % rows:
        raise ValueError(
            f"global_batch_size: expected a multiple of {rows * config.accumulation} "
            f"(data x fsdp = {rows} devices, accumulation {config.accumulation}), "
            f"got {config.global_batch_size}"
        )
    spans = mesh.shape["sequence"]
    expected = f"1 with {model.mixer.kind}, which does not split sequences"
    require("mesh.sequence", spans == 1 or model.mixer.splits_sequences, expected, spans)
    divisors = [("data.sequence_length", config.data.sequence_length, "sequence")]
    divisors.append(("model.d_model", model.d_model, "fsdp"))
    divisors += [(f"model.{name}", size, "tensor") for name, size in model.tensor_axes.items()]
    for name, size, axis in divisors:
        shards = mesh.shape[axis]
        require(name, size % shards == 0, f"a multiple of mesh.{axis} {shards}", size)
