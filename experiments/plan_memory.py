"""Predicts the memory of a training step on each device, for presets and meshes, without a GPU.

    python experiments/plan_memory.py                                   # gdn2 hybrids, 8 devices
    python experiments/plan_memory.py --models swa_gdn2_1.3B --devices 16 --length 4096 --rows 4
    python experiments/plan_memory.py --models tiny --devices 8 --check True

--check True compiles each step for simulated CPU devices, too, and shows the compiler's own count and
the share of it that was predicted.
"""

import dataclasses
import os
import sys
from typing import Literal

from gdn2_jax.command import require_positive, run_command

import jax

from gdn2_jax.data import DataConfig
from gdn2_jax.models import PRESETS
from gdn2_jax.parallel import MeshConfig, batch_shards, make_mesh
from gdn2_jax.rows import Column, format_header, format_row
from gdn2_jax.timing import peak_gib
from gdn2_jax.training import TrainingConfig, check_mesh
from gdn2_jax.training.memory import Memory, predict_memory
from gdn2_jax.training.step import compile_train_step

DEFAULT = ("swa_gdn2_tiny", "swa_gdn2_30M", "swa_gdn2_100M", "swa_gdn2_305M", "swa_gdn2_1.3B")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan.

    Attributes:
      models: names of presets.
      devices: of all processes.
      length: tokens of a sequence.
      rows: sequences for each data x fsdp device at once.
      check: compile, too, and compare.
    """

    models: tuple[Literal[*PRESETS], ...] = DEFAULT
    devices: int = 8
    length: int = 4096
    rows: int = 1
    check: bool = False

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self)


def main(options: Options) -> None:
    """Prints a line for each model and mesh."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    print(
        f"GiB on each of {options.devices} devices, {options.length} tokens x {options.rows} rows"
    )
    columns = [Column("model", "model", width=-16), Column("mesh", "mesh", width=-18)]
    columns += [Column(name, name, ".3f", 9) for name in (*Memory._fields, "total")]
    if options.check:
        columns += [Column("compiled", "compiled", ".3f"), Column("predicted", "share", ".0%")]
    print(format_header(columns), flush=True)
    for name in options.models:
        for label, sizes in meshes(options.devices).items():
            mesh = make_mesh(sizes)
            training = TrainingConfig(
                model=PRESETS[name],
                data=DataConfig(sequence_length=options.length),
                steps=1000,
                global_batch_size=options.rows * batch_shards(mesh),
            )
            row = {"model": name, "mesh": label}
            try:
                check_mesh(training, mesh)
            except ValueError as error:
                print(format_row(columns, row | {"error": str(error)}))
                continue
            memory = predict_memory(training, mesh)
            row |= {part: size / 2**30 for part, size in memory._asdict().items()}
            row["total"] = sum(memory) / 2**30
            if options.check:
                row["compiled"] = peak_gib(compile_train_step(training, mesh))
                row["share"] = row["total"] / row["compiled"]
            print(format_row(columns, row), flush=True)


def meshes(devices: int) -> dict[str, MeshConfig]:
    """A mesh for each axis, and one that mixes them."""
    plans = {"data": MeshConfig(), "fsdp": MeshConfig(fsdp=devices)}
    if devices % 2 == 0:
        plans["tensor 2, fsdp"] = MeshConfig(tensor=2, fsdp=devices // 2)
    if devices > 1:
        plans["sequence"] = MeshConfig(sequence=devices)
    return plans


if __name__ == "__main__":
    sys.exit(run_command("plan_memory.py", main, Options, __doc__))
