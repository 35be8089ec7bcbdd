"""Times the training step on one device and on all of them: weak scaling and long sequences.

    python experiments/benchmark_scaling.py                      # swa_gdn2_1.3B on GPUs, tiny elsewhere
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python experiments/benchmark_scaling.py

Data, fsdp and tensor meshes take --tokens a device in rows of --length; context parallelism takes one
sequence of each of --sequences over all devices. Efficiency is tokens/s a device over those of one
device of the same machine. The share of collectives is theirs of all time on the devices in a profile
of two steps. Losses of three steps are compared with one device's on the same batch, in rows where
both fit. Rows are appended to --output.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from gdn2_jax.data import DataConfig
from gdn2_jax.models import PRESETS
from gdn2_jax.parallel import MeshConfig, make_mesh, put_batch
from gdn2_jax.timing import device_events, peak_gib
from gdn2_jax.training import TrainingConfig, check_mesh, compile_train_step
from gdn2_jax.training.step import initial_state, state_shardings

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all"),
    *("nccl", "allreduce", "allgather", "reducescatter"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      model: a preset; swa_gdn2_1.3B on GPUs and tiny elsewhere if None.
      tokens: of a device in weak scaling; 16,384 on GPUs and 256 elsewhere if None.
      length: of the sequences in weak scaling; 4096 on GPUs and 128 elsewhere if None.
      sequences: tokens of one sequence over all devices; 131,072 and 524,288 on GPUs, 512 elsewhere
        if empty.
      implementation: of the operators.
      remat: instead of the preset's, see `ModelConfig`.
      steps: timed.
      output: file for the rows, as JSON lines.
    """

    model: Literal[*PRESETS] | None = None
    tokens: int | None = None
    length: int | None = None
    sequences: tuple[int, ...] = ()
    implementation: Literal["xla", "pallas", "recurrent"] | None = None
    remat: str | None = None
    steps: int = 5
    output: Path = Path("runs/scaling.jsonl")


def main(config: Config) -> None:
    """Prints a line for each mesh, writes rows."""
    on_gpu, devices = jax.default_backend() == "gpu", jax.device_count()
    model = PRESETS[config.model or ("swa_gdn2_1.3B" if on_gpu else "tiny")]
    changes = {"implementation": config.implementation, "remat": config.remat}
    model = dataclasses.replace(model, **{k: v for k, v in changes.items() if v is not None})
    tokens, length = config.tokens or (16384 if on_gpu else 256), config.length
    length = length or (4096 if on_gpu else 128)
    sequences = config.sequences or ((131072, 524288) if on_gpu else (512,))
    rows = tokens // length
    runs = [("one device", MeshConfig(), 1, rows, length)]
    if devices > 1:
        for name in ("data", "fsdp", "tensor"):
            sizes = MeshConfig(**{name: devices})
            runs.append((f"{name} {devices}, same batch", sizes, devices, rows, length))
            runs.append((f"{name} {devices}, weak", sizes, devices, rows * devices, length))
        for sequence in sequences:
            span = sequence // devices
            runs.append((f"one device, {span}", MeshConfig(), 1, 1, span))
            sizes = MeshConfig(sequence=devices)
            runs.append((f"sequence {devices}, {sequence}", sizes, devices, 1, sequence))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{'run':<28}{'tokens/s a device':>18}{'efficiency':>11}{'collectives':>12}{'GiB':>8}  loss"
    )
    one = None
    for name, sizes, count, batch, tokens_in_row in runs:
        row: dict[str, Any] = {"run": name, "devices": count, "batch": batch}
        row |= {"length": tokens_in_row, "device": jax.devices()[0].device_kind}
        training = TrainingConfig(
            model=model,
            data=DataConfig(sequence_length=tokens_in_row),
            steps=1000,
            global_batch_size=batch,
        )
        try:
            row |= measure(training, make_mesh(sizes, jax.devices()[:count]), config.steps)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            row["error"] = str(error).splitlines()[0]
            print(f"{name:<28}  {row['error']}", flush=True)
        else:
            if count == 1:
                one = row
            elif one:
                row["efficiency"] = row["tokens_per_second"] / one["tokens_per_second"]
                if (batch, tokens_in_row) == (one["batch"], one["length"]):
                    row["loss_error"] = max(map(relative, row["losses"], one["losses"]))
            print_row(row)
        with config.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(f"rows appended to {config.output}")


def measure(training: TrainingConfig, mesh: jax.sharding.Mesh, steps: int) -> dict[str, Any]:
    """Speed, memory, losses and the share of collectives of a step on the mesh."""
    check_mesh(training, mesh)
    print(f"  compiling for {dict(mesh.shape)}", file=sys.stderr, flush=True)
    step = compile_train_step(training, mesh)
    shardings = state_shardings(training, mesh)
    state = jax.jit(initial_state, static_argnums=0, out_shardings=shardings)(training)
    shape = (1, training.global_batch_size, training.data.sequence_length)
    ids = np.random.default_rng(0).integers(0, training.model.vocab_size, (2, *shape), np.int32)
    ones = np.ones(shape, np.int32)
    batch = {"inputs": ids[0], "targets": ids[1], "segment_ids": ones}
    batch = put_batch(mesh, {**batch, "weights": ones.astype(np.float32)})

    def run(count: int):
        nonlocal state
        losses = []
        for _ in range(count):
            state, metrics = step(state, batch)
            losses.append(metrics.loss)
        return losses

    losses = [float(loss) for loss in run(3)]
    start = time.perf_counter()
    jax.block_until_ready(run(steps))
    seconds = (time.perf_counter() - start) / steps
    events = device_events(lambda: run(2))
    shares = [
        event.milliseconds
        for event in events
        if any(word in f"{event.name} {event.operation}".lower() for word in COLLECTIVES)
    ]
    total = sum(event.milliseconds for event in events)
    return {
        "tokens_per_second": training.tokens_per_step / seconds / mesh.size,
        "ms": seconds * 1e3,
        "peak_gib": peak_gib(step),
        "collectives": sum(shares) / total if total else 0.0,
        "losses": losses,
    }


def relative(x: float, y: float) -> float:
    """Error of x against y."""
    return abs(x - y) / abs(y)


def print_row(row: dict[str, Any]) -> None:
    """Prints a line of the table."""
    line = f"{row['run']:<28}{row['tokens_per_second']:18,.0f}{row.get('efficiency', 1):11.1%}"
    line += f"{row['collectives']:12.1%}{row['peak_gib']:8.2f}  {row['losses'][-1]:.5f}"
    if "loss_error" in row:
        line += f" (error {row['loss_error']:.1e})"
    print(line, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
