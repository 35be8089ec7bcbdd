"""Times the training step on one device and on meshes of all of them: weak scaling, long sequences.

On 2, 4 or 8 GPUs of a host (--devices takes the first so many of them):

    export NCCL_NVLS_ENABLE=0 JAX_COMPILATION_CACHE_DIR=runs/compiled
    python experiments/benchmark_scaling.py --devices 2
    python experiments/benchmark_scaling.py --devices 4
    python experiments/benchmark_scaling.py --devices 8
    python experiments/benchmark_scaling.py --devices 4 --model gdn2_1.3B --axes tensor

and without any, a tiny model:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python experiments/benchmark_scaling.py

Data, fsdp and tensor meshes take --tokens a device in sequences of --length; context parallelism
takes one sequence of each of --sequences over all devices. Efficiency is tokens/s a device over those
of one device that runs as many tokens: the same sequences, or one device's span of the long one.
Every row is timed after as many untimed steps: a GPU that was idle is 2 to 3 % faster.
Collectives are a share of all time on the devices in a profile of two steps; exposed is the share of
the time that a device is busy in which it runs collectives and nothing else.

Every mesh's losses and gradient norms of the first four steps, at a constant learning rate, are set
against those of one device on the same batch, which it takes in as many microbatches as there are
devices. For context parallelism the batch is one device's span of the shortest of --sequences. A
relative difference of more than 1 % of a loss or 5 % of a norm (bf16; 0.01 % and 0.1 % in float32)
ends the script with status 1, and so does a mesh that does not compile or run.

What is worth most is measured first; rows are appended to --output as they come. The same command
goes on where it was stopped: what the output holds is not measured again. The figure beside it draws
all rows. A README beside it and docs/performance.md get its table where they have a place for it
(`gdn2_jax.rows.renew_table`). Begin a new output on another machine, so that efficiency is that of one
machine.
"""

import dataclasses
import functools
import itertools
import math
import re
import sys
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gdn2_jax.command import require_positive, run_command

import jax
import numpy as np
from benchmark_training import compile_step, random_batch, say

from gdn2_jax.data import DataConfig
from gdn2_jax.models import PRESETS, ModelConfig
from gdn2_jax.ops import Implementation
from gdn2_jax.parallel import MeshConfig, batch_sharding, make_mesh
from gdn2_jax.rows import (
    Column,
    append_row,
    format_header,
    format_row,
    markdown_table,
    read_rows,
    renew_table,
)
from gdn2_jax.timing import Event, device_events, peak_gib
from gdn2_jax.training import OptimizerConfig, TrainingConfig, check_mesh
from gdn2_jax.training.step import initial_state, state_shardings

COMPARED_STEPS = 4
# Largest relative difference of losses and of gradient norms.
TOLERANCES = {"bfloat16": (1e-2, 5e-2), "float32": (1e-4, 1e-3)}
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all"),
    *("nccl", "allreduce", "allgather", "reducescatter"),
)
# What remat="full" leaves room for beside the state of 1.3B on 80 GB.
LONGEST_SPAN = 131072
# Of the timed steps together, if there are more than two.
TIMED_SECONDS = 5
# That may hold a table of rows, beside the README in the output's folder.
PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      model: a preset; swa_gdn2_1.3B on GPUs and tiny elsewhere if None.
      devices: the first so many; all if None.
      axes: of the mesh, each tried alone; data and fsdp also together from 4 devices on, tensor
        at 2 and as far as it divides the heads, with data for the rest.
      tokens: of a device in weak scaling; 16,384 on GPUs and 256 elsewhere if None.
      length: of the sequences in weak scaling; 4096 on GPUs and 128 elsewhere if None.
      sequences: tokens of one sequence over all devices. If empty: of 131,072 and 524,288 those of
        which a device's span is at most 131,072 on GPUs, 512 elsewhere.
      implementation: of the operators.
      remat: instead of the preset's, see `ModelConfig`.
      unroll: likewise.
      long_remat: the same where a device has more than `tokens`.
      steps: timed, or fewer (at least 2) of those that take more than 5 s together.
      together: so many rows compile at once, before the first of them is measured.
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
    implementation: Implementation | None = None
    remat: str | None = None
    unroll: bool | None = None
    long_remat: str = "full"
    steps: int = 10
    together: int = 16
    minutes: float = 20
    output: Path | None = None

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self, minutes=0)


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


def main(options: Options) -> None:
    """Prints a line for each mesh, writes rows and figure."""
    start = time.monotonic()
    device, runs = jax.devices()[0].device_kind, plan(options)
    slug = re.sub(r"\W+", "-", device.lower())
    output = options.output or Path(__file__).parent / "results" / "scaling" / f"{slug}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    rows, late, failed = read_rows(output), [], []
    print(
        f"{device}, jax {jax.__version__}; rows go to {output}\n{format_header(COLUMNS)}",
        flush=True,
    )

    def done(run: Run) -> dict[str, Any] | None:
        return latest(rows, key_of(run, device))

    def in_time() -> bool:
        return time.monotonic() - start < options.minutes * 60

    differing = False
    for group in itertools.batched(runs, options.together):
        todo = [run for run in group if not done(run)]
        with ThreadPoolExecutor(len(group)) as pool:
            # Nothing is timed while others compile.
            futures = [pool.submit(compile_run, run) for run in todo if in_time()]
            wait(futures)
        compiled = dict(zip(map(id, todo), futures))
        for run in group:
            if id(run) in compiled and in_time():
                say(f"{label(key_of(run, device))}: running")
                row = key_of(run, device) | measure(run, compiled.pop(id(run)), options.steps)
                rows.append(row)
                append_row(output, row)
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
    for page in (output.with_name("README.md"), PERFORMANCE):
        renew_table(page, output, table(rows))
    if late:
        print(f"not measured within {options.minutes:g} minutes, run again: {'; '.join(late)}")
    if failed:
        print(f"failed, see above: {'; '.join(failed)}")
    if differing:
        raise SystemExit("some meshes do not train as one device does, see above")
    if failed:
        raise SystemExit("some meshes could not be measured, see above")


def plan(options: Options) -> list[Run]:
    """What to measure, the most telling first, but references before the rows that need them."""
    on_gpu, devices = jax.default_backend() == "gpu", options.devices
    if devices is None:
        devices = jax.device_count()
    if not 1 <= devices <= jax.device_count():
        raise SystemExit(f"devices: expected 1 to {jax.device_count()}, got {devices}")
    tokens = options.tokens or (16384 if on_gpu else 256)
    length = options.length or (4096 if on_gpu else 128)
    sequences = options.sequences or ((131072, 524288) if on_gpu else (512,))
    if not options.sequences:
        sequences = tuple(x for x in sequences if x <= devices * LONGEST_SPAN)
    if tokens % length:
        raise SystemExit(f"length: expected a divisor of {tokens} tokens, got {length}")
    if wrong := [x for x in sequences if x % devices**2]:
        raise SystemExit(
            f"sequences: expected multiples of {devices**2}, so that {devices} devices divide a "
            f"device's span too, got {wrong[0]}"
        )
    name = options.model or ("swa_gdn2_1.3B" if on_gpu else "tiny")
    of_model = ("remat", "unroll", "implementation")
    changes = {x: getattr(options, x) for x in of_model if getattr(options, x) is not None}
    model = dataclasses.replace(PRESETS[name], **changes)
    rows = tokens // length

    alone, batch = MeshConfig(data=1), rows * devices
    runs = [Run(name, training_config(model, alone, rows, length))]
    if devices == 1:
        return runs
    meshes = [
        Run(name, training_config(model, sizes, batch, length))
        for sizes in batch_meshes(options.axes, devices, math.gcd(*model.tensor_axes.values()))
    ]
    if meshes:
        same = training_config(model, alone, batch, length, accumulation=devices)
        runs.append(Run(name, same, timed=False))

    sizes, long_runs = MeshConfig(data=1, sequence=devices), []
    for sequence in sorted(sequences) if "sequence" in options.axes else ():
        span, of = sequence // devices, model
        if span > tokens:
            of = dataclasses.replace(model, remat=options.long_remat)
        long_runs += [
            Run(name, training_config(of, alone, 1, span)),
            Run(name, training_config(of, sizes, 1, sequence)),
        ]
        if len(long_runs) == 2:
            long_runs.append(Run(name, training_config(of, sizes, 1, span), timed=False))
    return list(dict.fromkeys(runs + meshes[:3] + long_runs[:2] + meshes[3:] + long_runs[2:]))


def batch_meshes(axes: Collection[str], devices: int, heads: int) -> list[MeshConfig]:
    """Meshes of all devices that split a batch's rows, parameters or heads."""
    meshes = [MeshConfig(**{"data": 1, axis: devices}) for axis in ("data", "fsdp") if axis in axes]
    largest = math.gcd(devices, heads)
    tensors = [MeshConfig(data=devices // n, tensor=n) for n in (math.gcd(2, largest), largest)]
    tensors = [sizes for sizes in tensors if "tensor" in axes and sizes.tensor > 1]
    meshes += tensors[:1]
    if devices > 2 and devices % 2 == 0 and {"data", "fsdp"} <= set(axes):
        meshes.append(MeshConfig(data=2, fsdp=devices // 2))
    return list(dict.fromkeys(meshes + tensors[1:]))


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
    """The fields that are equal in two rows of the same measurement."""
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
    """The step, and the function that makes its state."""
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

        def seconds_of(count: int) -> float:
            start = time.perf_counter()
            jax.block_until_ready(take(count))
            return time.perf_counter() - start

        metrics = jax.device_get(take(COMPARED_STEPS))
        row: dict[str, Any] = {
            "losses": [float(x.loss) for x in metrics],
            "grad_norms": [float(x.grad_norm) for x in metrics],
            "peak_gib": peak_gib(step),
        }
        if not run.timed:
            return row
        # The first of the timed steps: its time decides how many there are.
        count = max(2, min(steps, int(TIMED_SECONDS / seconds_of(1))))
        seconds_of(count - 1)
        seconds = seconds_of(count) / count
        events = device_events(lambda: take(2))
    except (ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return row | {
        "ms": seconds * 1e3,
        "tokens_per_second": training.tokens_per_step / seconds / mesh.size,
        **communication(events),
    }


def communication(events: list[Event]) -> dict[str, float]:
    """Collectives as a share of all time, and where nothing else runs, of the time of any event."""
    total = collectives = busy = exposed = 0.0
    for device in {event.device for event in events}:
        own = [event for event in events if event.device == device]
        others = [event for event in own if not is_collective(event)]
        total += sum(event.milliseconds for event in own)
        collectives += sum(event.milliseconds for event in own if is_collective(event))
        busy += covered(own)
        exposed += covered(own) - covered(others)
    return {"collectives": collectives / total, "exposed": exposed / busy}


def is_collective(event: Event) -> bool:
    """Whether an event is communication between devices."""
    return any(word in f"{event.name} {event.operation}".lower() for word in COLLECTIVES)


def covered(events: list[Event]) -> float:
    """Milliseconds in which at least one of a device's events runs."""
    total, end = 0.0, -math.inf
    for event in sorted(events, key=lambda event: event.start):
        stop = event.start + event.milliseconds
        total += max(0.0, stop - max(end, event.start))
        end = max(end, stop)
    return total


COLUMNS = (
    Column("mesh, tokens x sequences", "label", width=-36),
    Column("tokens/s a device", "tokens_per_second", ",.0f"),
    Column("efficiency", "efficiency", ".1%"),
    Column("collectives", "collectives", ".1%"),
    Column("exposed", "exposed", ".1%"),
    Column("GiB", "peak_gib", ".1f", 6),
    Column("last loss", "loss", ".5f"),
    Column("loss differs by", "loss_error", ".1e"),
    Column("gradient norm by", "norm_error", ".1e"),
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


def differences(rows: list[dict[str, Any]], row: dict[str, Any]) -> tuple[float, float] | None:
    """The largest relative differences of losses and gradient norms from one device's, if known."""
    reference = None
    if set(row["mesh"].values()) != {1}:
        reference = on_one_device(rows, row, whole=True)
    return reference and tuple(
        # Python's max would pass over a NaN.
        np.max([abs(x - y) / y for x, y in zip(row[name], reference[name], strict=True)])
        for name in ("losses", "grad_norms")
    )


def shown(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds to a row what the tables show: its label, loss, and comparison with one device."""
    several = set(row["mesh"].values()) != {1}
    shown = row | {"label": label(row), "loss": row["losses"][-1]}
    if not several:
        shown |= {"collectives": None, "exposed": None}
    elif "tokens_per_second" in row:
        shown["efficiency"] = efficiency(rows, row)
    if errors := differences(rows, row):
        shown |= {"loss_error": errors[0], "norm_error": errors[1]}
    return shown


def print_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Prints a line of the table; whether losses or gradients are not those of one device."""
    row = shown(row, rows)
    agree = True
    if "loss_error" in row:
        bounds = TOLERANCES[PRESETS[row["model"]].dtype]
        errors = row["loss_error"], row["norm_error"]
        agree = all(error <= bound for error, bound in zip(errors, bounds, strict=True))
    print(format_row(COLUMNS, row) + ("" if agree else ", TOO MUCH"), flush=True)
    return not agree


def table(rows: list[dict[str, Any]]) -> str:
    """The latest row of each mesh and size as Markdown; rows that are only references are left out."""
    columns = [column for column in COLUMNS if column.key != "loss"]
    lines = []
    for row in {label(row): row for row in rows if "error" not in row}.values():
        if "tokens_per_second" in row or set(row["mesh"].values()) != {1}:
            cells = shown(row, rows)
            lines.append(
                [
                    "" if cells.get(column.key) is None else format(cells[column.key], column.style)
                    for column in columns
                ]
            )
    return markdown_table([column.name for column in columns], lines)


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
    sys.exit(run_command("benchmark_scaling.py", main, Options, __doc__, gpu_memory=0.93))
