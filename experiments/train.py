r"""Trains a language model: a preset, and whatever of it you want otherwise.

    python experiments/train.py                                  # "tiny", minutes on two CPU cores
    python experiments/train.py --steps 1000 --model.num-layers 6
    python experiments/train.py --data my-texts/ notes.jsonl --run-dir runs/mine
    python experiments/train.py --mixer kda                      # the same size, another mixer
    python experiments/train.py swa_gdn2_1.3B --accumulation 32 --data fineweb/ \
        --data.tokenizer tokenizer.json                          # on one GPU of 80 GB

The first argument, if it is no option, is the preset: {presets}. --mixer takes the model of the same
scale with another mixer: gdn2, kda, gdn, deltanet, mamba2, mamba3, mamba3_mimo, attention and, where
no layer has it already, sliding_window_attention. --data is short for --data.paths.
A run that was stopped or killed continues when started again. Everything lands in --run-dir.
--mesh.fsdp, --mesh.tensor and --mesh.sequence split model, batch and sequences over all devices of all
processes, started by srun, mpirun or with JAX_NUM_PROCESSES, JAX_PROCESS_ID, JAX_COORDINATOR_ADDRESS.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro
from absl import flags

from gdn2_jax.data import path_options
from gdn2_jax.models import PRESETS as MODELS
from gdn2_jax.models import matched_preset
from gdn2_jax.parallel import join_processes
from gdn2_jax.training import (
    PRESETS,
    CheckpointError,
    DivergenceError,
    TrainingConfig,
    open_run,
    train,
)


def main(arguments: list[str]) -> int | str:
    """Returns the exit status, or a message for it to be 1."""
    # Before the first use of a GPU, of whose memory JAX would leave a quarter unused.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    # grain hands absl's flags to its workers, which absl allows only after parsing.
    flags.FLAGS.mark_as_parsed()
    try:
        config, directory = parse(arguments)
        join_processes()
        run = open_run(config, directory)
    except (ValueError, OSError, CheckpointError) as error:
        return f"train.py: {error}"
    try:
        train(run)
    except DivergenceError as error:
        return f"train.py: {error}"
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"train.py: process {jax.process_index()} failed, or one it waited for: {error}")
        print(
            "train.py: the job ends; started again, it goes on from its last checkpoint", flush=True
        )
        # An orderly exit would wait for the process that is gone.
        os._exit(1)
    return 0


def parse(arguments: list[str]) -> tuple[TrainingConfig, Path]:
    """Returns the configuration and the run's directory."""
    preset, options = "tiny", arguments
    if arguments and not arguments[0].startswith("-"):
        preset, *options = arguments
    if preset not in PRESETS:
        raise ValueError(f"expected a preset, one of {', '.join(PRESETS)}, got {preset!r}")
    config, name = PRESETS[preset], preset
    # The mixer decides what the other options override, so it comes before them.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--mixer")
    chosen, options = parser.parse_known_args(options)
    if chosen.mixer:
        config = dataclasses.replace(config, model=MODELS[matched_preset(preset, chosen.mixer)])
        name = f"{preset}-{chosen.mixer}"

    def command(
        config: Annotated[TrainingConfig, tyro.conf.arg(name="")] = config,
        run_dir: Path = Path("runs") / name,
    ):
        """Pairs what the command line gives.

        Args:
          config: of the run.
          run_dir: where checkpoints, metrics, plot and sample go.
        """
        return config, run_dir

    return tyro.cli(
        command,
        args=path_options(options),
        prog=f"train.py {preset}",
        description=__doc__.format(presets=", ".join(PRESETS)),
        config=(tyro.conf.FlagConversionOff,),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
