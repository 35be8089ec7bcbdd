r"""Trains a language model: a preset, and whatever of it you want otherwise.

    python experiments/train.py                                  # "tiny", minutes on two CPU cores
    python experiments/train.py --steps 1000 --model.num-layers 6
    python experiments/train.py --data my-texts/ notes.jsonl --run-dir runs/mine
    python experiments/train.py --mixer kda                      # the same size, another mixer
    python experiments/train.py --init-from runs/tiny --data notes.jsonl --optimizer.learning-rate 1e-3
    python experiments/train.py --run-dir runs/mine              # goes on, with the options it has
    python experiments/train.py swa_gdn2_1.3B --accumulation 32 --data fineweb/ \
        --data.tokenizer tokenizer.json                          # on one GPU of 80 GB

The first argument, if it is no option, is the preset: {presets}.
"swa_" makes a hybrid with sliding-window attention; "tiny" alone is swa_gdn2_tiny. --mixer takes the
preset of the same scale with another mixer. --data is short for --data.paths. The model's vocabulary
is the tokenizer's unless --model.vocab-size is given.
A run that was stopped or killed continues when started again; so does --run-dir alone, without the
preset. Everything lands in --run-dir. --init-from starts from the weights and the tokenizer of a run or a
PyTorch checkpoint, and without a preset with all options of that run.
--mesh.fsdp, --mesh.tensor and --mesh.sequence split model, batch and sequences over all devices of all
processes, started by srun, mpirun or with JAX_NUM_PROCESSES, JAX_PROCESS_ID, JAX_COORDINATOR_ADDRESS.
"""

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

from gdn2_jax.command import out_of_memory, read_options, run_command

import jax
import tyro

from gdn2_jax.data import load_tokenizer, path_options
from gdn2_jax.models import MIXERS, SCALES, matched_preset
from gdn2_jax.parallel import MeshConfig, join_processes
from gdn2_jax.training import (
    PRESETS,
    CheckpointError,
    DivergenceError,
    StoppedError,
    TrainingConfig,
    open_run,
    open_weights,
    run_files,
    train,
)
from gdn2_jax.training.config_file import load_config

NAMES = f"tiny, or [swa_]MIXER_SCALE of {', '.join(MIXERS)} and of {', '.join(SCALES)}"


def main(arguments: list[str]) -> int | str:
    """Returns the exit status, or a message for it to be 1."""
    try:
        config, directory, fit_vocabulary = parse(arguments)
        join_processes()
        if fit_vocabulary:
            config = with_vocabulary(config)
        run = open_run(config, directory)
    except (ValueError, OSError, CheckpointError) as error:
        return f"train.py: {error}"
    try:
        train(run)
    except StoppedError as stop:
        if jax.process_index() == 0:
            print(f"train.py: {stop}", flush=True)
        return 128 + stop.signal
    except DivergenceError as error:  # on all processes
        return f"train.py: {error}"
    except (jax.errors.JaxRuntimeError, CheckpointError, OSError, NotImplementedError) as error:
        if jax.process_count() == 1:
            if isinstance(error, jax.errors.JaxRuntimeError):
                return _too_little_memory(error)
            if isinstance(error, CheckpointError):
                print(f"train.py: {error}", file=sys.stderr, flush=True)
                # An orderly exit would show a traceback of every array that was not written.
                os._exit(1)
            return f"train.py: {error}"
        print(f"train.py: process {jax.process_index()} failed, or one it waited for: {error}")
        print(
            "train.py: the job ends; started again, it goes on from its last checkpoint", flush=True
        )
        # An orderly exit would wait for the process that is gone.
        os._exit(1)
    return 0


def with_vocabulary(config: TrainingConfig) -> TrainingConfig:
    """Returns the configuration with the model's vocabulary that of the tokenizer."""
    size, data = config.data.trained_vocab_size, config.data
    if size is None:
        size = load_tokenizer(data.tokenizer, data.end_of_document).vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _too_little_memory(error: jax.errors.JaxRuntimeError) -> str:
    line = out_of_memory(error)
    if line is None:
        raise error
    return (
        f"train.py: {line}: try a higher --accumulation, --model.remat mixer, a higher "
        "--model.loss-blocks or, with several devices, --mesh.fsdp"
    )


class Command(NamedTuple):
    """What the command line says.

    Attributes:
      config: of the run.
      run_dir: of the run.
      fit_vocabulary: give the model the vocabulary of the tokenizer.
    """

    config: TrainingConfig
    run_dir: Path
    fit_vocabulary: bool


def parse(arguments: list[str]) -> Command:
    """Reads the command line."""
    preset, options = None, arguments
    if arguments and not arguments[0].startswith("-"):
        preset, *options = arguments
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"expected a preset, {NAMES}, got {preset!r}")
    if any(re.match(r"--model\.mixer(\.kind)?(=|$)", option) for option in options):
        raise ValueError("model.mixer: expected no value; --mixer NAME keeps the model's size")
    # These decide what the other options override, so they come before them.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("mixer", "run-dir", "init-from", "model.vocab-size"):
        parser.add_argument(f"--{option}", f"--{option.replace('-', '_')}", dest=option)
    first = vars(parser.parse_known_args(options)[0])

    name = preset or "tiny"
    config, fit_vocabulary = PRESETS[name], first["model.vocab-size"] is None
    old = run_files(Path(first["run-dir"])).config if first["run-dir"] else None
    if first["mixer"]:
        config = PRESETS[matched_preset(name, first["mixer"])]
        name = f"{name}-{first['mixer']}"
    elif preset is None and old and old.is_file():
        config, fit_vocabulary = load_config(old), False
    elif first["init-from"]:
        weights = open_weights(first["init-from"])
        if preset is None and weights.training:
            config = weights.training
        tokens = {"tokenizer": weights.tokenizer, "end_of_document": weights.end_of_document}
        data = dataclasses.replace(config.data, **tokens)
        config = dataclasses.replace(config, model=weights.model, data=data)
        name, fit_vocabulary = f"{name}-from-{Path(first['init-from']).name}", False

    if any(option.startswith("--mesh.") for option in options):
        # A run that went on another mesh does not lend it.
        config = dataclasses.replace(config, mesh=MeshConfig())

    def command(
        config: Annotated[TrainingConfig, tyro.conf.arg(name="")] = config,
        run_dir: Path = Path("runs") / name,
        mixer: str = "",
    ):
        """Pairs what the command line gives.

        Args:
          config: of the run.
          run_dir: where checkpoints, metrics, plot and sample go.
          mixer: of the model, instead of the preset's: the preset of the same scale with it.
        """
        return Command(config, run_dir, fit_vocabulary)

    return read_options(
        command,
        path_options(options),
        prog=f"train.py {preset or 'tiny'}",
        description=__doc__.format(presets=NAMES),
    )


if __name__ == "__main__":
    sys.exit(
        run_command("train.py", lambda: main(sys.argv[1:]), keep_programs=True, gpu_memory=0.95)
    )
