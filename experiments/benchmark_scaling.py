"""Times the training step on one device and on meshes of all of them: weak scaling, long sequences.

On 2, 4 or 8 GPUs of a host (--devices takes the first so many of them):

    export NCCL_NVLS_ENABLE=0 JAX_COMPILATION_CACHE_DIR=runs/compiled
    python experiments/benchmark_scaling.py --devices 2
    python experiments/benchmark_scaling.py --devices 4
    python experiments/benchmark_scaling.py --devices 8

and without any, a tiny model:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python experiments/benchmark_scaling.py

Data, fsdp and tensor meshes take --tokens a device in sequences of --length; context parallelism
takes one sequence of each of --sequences over all devices. Efficiency is tokens/s a device over those
of one device that runs as many tokens: the same sequences, or one device's span of the long one.
Collectives are a share of all time on the devices in a profile of two steps.

Every mesh's losses and gradient norms of the first four steps, at a constant learning rate, are set
against those of one device on the same batch, which it takes in as many microbatches as there are
devices. For context parallelism the batch is one sequence of --tokens. A relative difference of more
than 1 % of a loss or 5 % of a norm (bf16; 0.01 % and 0.1 % in float32) ends the script with status 1,
and so does a mesh that does not compile or run.

Rows are appended to --output as they come. The same command goes on where it was stopped: what the
output holds is not measured again. The figure beside it draws all rows. Begin a new output on
another machine, so that efficiency is that of one machine.
"""

import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from benchmark_training import compile_step, random_batch, read_rows, say

from gdn2_jax.data import DataConfig
from gdn2_jax.models import PRESETS, ModelConfig, tensor_axes
from gdn2_jax.parallel import MeshConfig, batch_sharding, make_mesh
from gdn2_jax.timing import device_events, peak_gib
from gdn2_jax.training import OptimizerConfig, TrainingConfig, check_mesh
from gdn2_jax.training.step import initial_state, state_shardings

COMPARED_STEPS = 4
# Of losses and of gradient norms.
TOLERANCES = {"bfloat16": (1e-2, 5e-2), "float32": (1e-4, 1e-3)}
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all"),
    *("nccl", "allreduce", "allgather", "reducescatter"),
)
# What remat="full" leaves room for beside the state of 1.3B on 80 GB.
LONGEST_SPAN = 65536


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      model: a preset; swa_gdn2_1.3B on GPUs and tiny elsewhere if None.
      devices: the first so many; all if None.
      axes: of the mesh, each tried alone; tensor beside data where it divides the heads no further.
      tokens: of a device in weak scaling; 16,384 on GPUs and 256 elsewhere if None.
      length: of the sequences in weak scaling; 4096 on GPUs and 128 elsewhere if None.
      sequences: tokens of one sequence over all devices. If empty: of 131,072 and 524,288 those of
        which a device's span is at most 65,536 on GPUs, 512 elsewhere.
      implementation: of the operators.
      remat: instead of the preset's, see `ModelConfig`.
      unroll: likewise.
      long_remat: the same where a device has more than `tokens`.
      steps: timed.
      minutes: after these, no further row is compiled or measured.
      output: file for the rows, as JSON lines; by default
        experiments/results/scaling/<device>.jsonl.
    """

    model: Literal[*PRESETS] | None = None
    devices: int | None = None
    axes: tuple[Literal["data", "fsdp", "tensor", "sequence"], ...] = (
        *("data", "fsdp", "tensor", "sequence"),
    )
    tokens: int | None = None
    length: int | None = None
    sequences: tuple[int, ...] = ()
    implementation: Literal["xla", "pallas", "recurrent"] | None = None
    remat: str | None = None
    unroll: bool | None = None
    long_remat: str = "full"
    steps: int = 5
    minutes: float = 20
    output: Path | None = None


class Run(NamedTuple):
    """A row to measure.

    Attributes:
      model: name of the preset.
      training: what to train, on which mesh.
      timed: not only compared.
    """

    model: str
    training: TrainingConfig
    timed: bool = True


def main(config: Config) -> None:
    """Prints a line for each mesh, writes rows and figure."""
    start = time.monotonic()
    # Before the first use of the device; JAX would leave a quarter of it unused.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    device, groups = jax.devices()[0].device_kind, list(plan(config))
    slug = re.sub(r"\W+", "-", device.lower())
    output = config.output or Path(__file__).parent / "results" / "scaling" / f"{slug}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    rows, late, failed = read_rows(output), [], []
    print(f"{device}, jax {jax.__version__}; rows go to {output}\n{HEADER}", flush=True)

    def done(run: Run) -> dict[str, Any] | None:
        return latest(rows, key_of(run, device))

    def in_time() -> bool:
        return time.monotonic() - start < config.minutes * 60

    differing = False
    for group in groups:
        todo = [run for run in group if not done(run)]
        with ThreadPoolExecutor(len(group)) as pool:
            # Nothing runs while others compile, which would disturb it.
            futures = [pool.submit(compile_run, run) for run in todo if in_time()]
            wait(futures)
        compiled = dict(zip(map(id, todo), futures))
        for run in group:
            if id(run) in compiled and in_time():
                say(f"{label(key_of(run, device))}: running")
                row = key_of(run, device) | measure(run, compiled.pop(id(run)), config.steps)
                rows.append(row)
                with output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                if "error" in row:
                    failed.append(label(row))
                    print(f"{label(row):<36}  {row['error']}", flush=True)
            if row := done(run):
                differing |= print_row(row, rows)
            elif run in todo and not in_time():
                late.append(label(key_of(run, device)))
    figure = output.with_suffix(".png")
    draw(rows, figure)
    print(f"rows in {output}, figure in {figure}")
    if late:
        print(f"not measured within {config.minutes:g} minutes, run again: {'; '.join(late)}")
    if failed:
        print(f"failed, see above: {'; '.join(failed)}")
    if differing:
        raise SystemExit("some meshes do not train as one device does, see above")
    if failed:
        raise SystemExit("some meshes could not be measured, see above")


def plan(config: Config) -> Iterator[list[Run]]:
    """Groups of runs that compile at once; those that others are compared with come first."""
    on_gpu, devices = jax.default_backend() == "gpu", config.devices
    if devices is None:
        devices = jax.device_count()
    if not 1 <= devices <= jax.device_count():
        raise SystemExit(f"devices: expected 1 to {jax.device_count()}, got {devices}")
    tokens = config.tokens or (16384 if on_gpu else 256)
    length = config.length or (4096 if on_gpu else 128)
    sequences = config.sequences or ((131072, 524288) if on_gpu else (512,))
    if not config.sequences:
        sequences = tuple(x for x in sequences if x <= devices * LONGEST_SPAN)
    if tokens % length:
        raise SystemExit(f"length: expected a divisor of {tokens} tokens, got {length}")
    if wrong := [x for x in sequences if x % devices]:
        raise SystemExit(f"sequences: expected multiples of {devices} devices, got {wrong[0]}")
    name = config.model or ("swa_gdn2_1.3B" if on_gpu else "tiny")
    options = ("remat", "unroll", "implementation")
    changes = {name: getattr(config, name) for name in options if getattr(config, name) is not None}
    model = dataclasses.replace(PRESETS[name], **changes)
    long = dataclasses.replace(model, remat=config.long_remat)
    rows = tokens // length

    alone = MeshConfig(data=1)
    group = [Run(name, training_config(model, alone, rows, length))]
    if axes := [axis for axis in config.axes if axis != "sequence" and devices > 1]:
        batch = rows * devices
        same = training_config(model, alone, batch, length, accumulation=devices)
        group.append(Run(name, same, timed=False))
        for axis in axes:
            size = devices
            if axis == "tensor":
                size = math.gcd(devices, *tensor_axes(model).values())
            sizes = MeshConfig(**{"data": devices // size, axis: size})
            group.append(Run(name, training_config(model, sizes, batch, length)))
    yield list(dict.fromkeys(group))
    if devices == 1 or "sequence" not in config.axes:
        return

    sizes = MeshConfig(data=1, sequence=devices)
    group = [Run(name, training_config(model, mesh, 1, tokens)) for mesh in (alone, sizes)]
    for sequence in sequences:
        span, of = sequence // devices, model if sequence <= tokens * devices else long
        group.append(Run(name, training_config(of, alone, 1, span)))
        group.append(Run(name, training_config(of, sizes, 1, sequence)))
    yield list(dict.fromkeys(group))


def training_config(
    model: ModelConfig, sizes: MeshConfig, batch: int, length: int, accumulation: int = 1
) -> TrainingConfig:
    """A run at a constant learning rate, so that every step's update shows in the next loss."""
    return TrainingConfig(
        model=model,
        mesh=sizes,
        data=DataConfig(sequence_length=length),
        optimizer=OptimizerConfig(warmup=0, final_learning_rate=1),
        steps=1000,
        global_batch_size=batch,
        accumulation=accumulation,
    )


def mesh_of(training: TrainingConfig) -> jax.sharding.Mesh:
    """Of the first devices."""
    count = math.prod(dataclasses.asdict(training.mesh).values())
    return make_mesh(training.mesh, jax.devices()[:count])


def key_of(run: Run, device: str) -> dict[str, Any]:
    """What makes two rows the same measurement."""
    model, training = run.training.model, run.training
    return {
        "device": device,
        "jax": jax.__version__,
        "model": run.model,
        "mesh": dataclasses.asdict(training.mesh),
        "batch": training.global_batch_size,
        "length": training.data.sequence_length,
        "accumulation": training.accumulation,
        "remat": model.remat,
        "unroll": model.unroll,
        "implementation": model.implementation,
    }


def compile_run(run: Run) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """The step, and what makes its state."""
    training, mesh = run.training, mesh_of(run.training)
    check_mesh(training, mesh)
    make = functools.partial(initial_state, training)
    make = jax.jit(make, out_shardings=state_shardings(training, mesh)).lower().compile()
    return compile_step(training, mesh, profile=True)[0], make


def measure(run: Run, compiled: Future, steps: int) -> dict[str, Any]:
    """Losses and gradient norms; speed, memory and the share of collectives."""
    training, mesh = run.training, mesh_of(run.training)
    try:
        step, make_state = compiled.result()
        make_batch = functools.partial(random_batch, training)
        state, batch = make_state(), jax.jit(make_batch, out_shardings=batch_sharding(mesh, 1))()

        def take(count: int):
            nonlocal state
            metrics = []
            for _ in range(count):
                state, of_step = step(state, batch)
                metrics.append(of_step)
            return metrics

        metrics = jax.device_get(take(COMPARED_STEPS))
        row: dict[str, Any] = {
            "losses": [float(x.loss) for x in metrics],
            "grad_norms": [float(x.grad_norm) for x in metrics],
            "peak_gib": peak_gib(step),
        }
        if not run.timed:
            return row
        start = time.perf_counter()
        jax.block_until_ready(take(steps))
        seconds = (time.perf_counter() - start) / steps
        events = device_events(lambda: take(2))
    except (ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    collectives = sum(
        event.milliseconds
        for event in events
        if any(word in f"{event.name} {event.operation}".lower() for word in COLLECTIVES)
    )
    return row | {
        "ms": seconds * 1e3,
        "tokens_per_second": training.tokens_per_step / seconds / mesh.size,
        "collectives": collectives / sum(event.milliseconds for event in events),
    }


HEADER = (
    f"{'mesh, tokens x sequences':<36}{'tokens/s a device':>18}{'efficiency':>11}"
    f"{'collectives':>12}{'GiB':>8}{'last loss':>10}  differs from one device's by"
)


def label(row: dict[str, Any]) -> str:
    """A row's name in table and figure."""
    axes = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    name = f"{axes or 'one device'}, {row['length']} x {row['batch']}"
    return name + (f" in {row['accumulation']} parts" if row["accumulation"] > 1 else "")


def latest(rows: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any] | None:
    """The last of the rows that were measured and have the key's values."""
    found = [row for row in rows if key.items() <= row.items() and "error" not in row]
    return found[-1] if found else None


def on_one_device(
    rows: list[dict[str, Any]], row: dict[str, Any], *, whole: bool
) -> dict[str, Any] | None:
    """The row of one device with the whole batch of `row`, or with one device's share of it."""
    mesh = row["mesh"]
    names = ("device", "jax", "model", "remat", "unroll", "implementation")
    key = {name: row[name] for name in names} | {"mesh": dict.fromkeys(mesh, 1)}
    if whole:
        return latest(rows, key | {"batch": row["batch"], "length": row["length"]})
    key["batch"] = row["batch"] // (mesh["data"] * mesh["fsdp"] * mesh["tensor"])
    return latest(rows, key | {"length": row["length"] // mesh["sequence"], "accumulation": 1})


def efficiency(rows: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """Tokens/s of a device over those of one device alone; None where that was not timed."""
    one = on_one_device(rows, row, whole=False)
    return one and row["tokens_per_second"] / one["tokens_per_second"]


def print_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Prints a line of the table; whether losses or gradients are not those of one device."""
    line, several = f"{label(row):<36}", set(row["mesh"].values()) != {1}
    if "tokens_per_second" in row:
        share = efficiency(rows, row)
        shown = f"{share:.1%}" if share and several else ""
        line += f"{row['tokens_per_second']:18,.0f}{shown:>11}{row['collectives']:12.1%}"
    else:
        line += " " * 41
    line += f"{row['peak_gib']:8.2f}{row['losses'][-1]:10.5f}"
    reference = on_one_device(rows, row, whole=True) if several else None
    agree = True
    if reference:
        errors = [
            # Python's max would pass over a NaN.
            np.max([abs(x - y) / y for x, y in zip(row[name], reference[name], strict=True)])
            for name in ("losses", "grad_norms")
        ]
        bounds = TOLERANCES[PRESETS[row["model"]].dtype]
        agree = all(error <= bound for error, bound in zip(errors, bounds, strict=True))
        line += "  {:.1e} (loss), {:.1e} (gradient norm)".format(*errors)
        line += "" if agree else ", TOO MUCH"
    print(line, flush=True)
    return not agree


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws tokens/s a device and efficiency of every mesh, the latest rows of each."""
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib.figure import Figure

    timed = {label(row): row for row in rows if "tokens_per_second" in row}
    figure = Figure(figsize=(10, 1.5 + 0.35 * len(timed)), layout="constrained")
    speed, share = figure.subplots(1, 2, sharey=True)
    bars = speed.barh(list(timed), [row["tokens_per_second"] for row in timed.values()])
    speed.bar_label(bars, fmt="{:,.0f}", padding=3)
    speed.margins(x=0.2)
    shares = {name: efficiency(rows, row) for name, row in timed.items()}
    shares = {name: value for name, value in shares.items() if value}
    share.bar_label(share.barh(list(shares), list(shares.values())), fmt="{:.0%}", padding=3)
    share.axvline(0.9, color="0.5", linestyle="--", linewidth=1)
    share.margins(x=0.2)
    share.invert_yaxis()
    speed.set(xlabel="tokens a second a device")
    share.set(xlabel="of one device's tokens a second; dashed: 90 %")
    devices = ", ".join(sorted({row["device"] for row in timed.values()}))
    figure.suptitle(
        f"training step of {', '.join({r['model'] for r in timed.values()})}, {devices}"
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
