"""Times the whole training step: forward, backward, clipping and AdamW, on random tokens.

    python experiments/benchmark_training.py                     # swa_gdn2_1.3B on a GPU, tiny on a CPU
    python experiments/benchmark_training.py --models swa_kda_1.3B attention_1.3B --lengths 4096
    python experiments/benchmark_training.py --unroll False --output loop.jsonl

A step has the same number of tokens at every length, as in figure 2 of arXiv 2605.22791. Model FLOPs
are those of `gdn2_jax.training.flops`, set against the data sheet's peak and against the rate of a
large bf16 product measured in the same process. The parts come from a device profile: the time of
each kernel goes to the module whose operation the compiler names it after, so a fused kernel counts
for one of the operations in it. A norm's time is added
to the layer that it feeds, and the time of recomputation to the module that is recomputed.

Rows are appended to --output; what it already holds is not measured again unless --again True is given.
The figure beside it draws all its rows. NOTES.md beside it and docs/performance.md get its table where they
have a place for it (`gdn2_jax.rows.renew_table`).
"""

import collections
import dataclasses
import functools
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

from gdn2_jax.command import require_positive, run_command

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gdn2_jax.data import DataConfig
from gdn2_jax.models import PRESETS, Batch, ModelConfig
from gdn2_jax.ops import Implementation
from gdn2_jax.parallel import batch_sharding, make_mesh
from gdn2_jax.rows import (
    Column,
    append_row,
    format_header,
    format_row,
    markdown_table,
    read_rows,
    renew_table,
)
from gdn2_jax.timing import Event, device_events, matmul_rate, peak_gib, spread
from gdn2_jax.training import TrainingConfig
from gdn2_jax.training.flops import peak_flops, training_flops_per_token
from gdn2_jax.training.step import (
    abstract_batch,
    abstract_state,
    initial_state,
    jit_train_step,
    state_shardings,
)

# That may hold a table of rows, beside the notes in the output's folder.
PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"
PARTS = ("mixer", "attention", "MLP", "embedding + loss", "optimizer", "other")

# Thousand tokens a second on one H100, hybrids of 1.3B: figure 2 of arXiv 2605.22791. The text states
# the first and last of GDN-2; the others are read off the figure, to within 0.02.
PAPER_LENGTHS = (2048, 4096, 8192, 16384)
PAPER = {
    "GDN-2": (38.00, 37.25, 36.87, 36.11),
    "KDA": (39.81, 38.98, 38.85, 38.50),
    "Gated DeltaNet": (41.85, 40.86, 40.02, 39.49),
    "Mamba-3 SISO": (44.34, 42.94, 42.28, 40.72),
    "Transformer": (45.83, 42.29, 36.72, 29.36),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      models: names of presets; swa_gdn2_1.3B on a GPU and tiny elsewhere if empty.
      lengths: of the sequences; 2K to 16K on a GPU, 64 and 128 elsewhere if empty.
      tokens: of a step; 16,384 on a GPU, 512 elsewhere if None.
      remat: instead of the preset's, see `ModelConfig`.
      unroll: instead of the preset's, see `ModelConfig`.
      implementation: of the operators.
      steps: of a timed sample.
      repeats: samples.
      profile: profile three more steps for the parts. Without it, kernels are launched as CUDA
        graphs as in training, which are a little faster but hide the names of their operations.
      operations: the slowest so many to print with the parts.
      again: measure also what the output holds.
      output: file for the rows, as JSON lines; by default
        experiments/results/training/<device>.jsonl.
    """

    models: tuple[Literal[*PRESETS], ...] = ()
    lengths: tuple[int, ...] = ()
    tokens: int | None = None
    remat: str | None = None
    unroll: bool | None = None
    implementation: Implementation | None = None
    steps: int = 5
    repeats: int = 3
    profile: bool = True
    operations: int = 12
    again: bool = False
    output: Path | None = None

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self, operations=0)


def main(options: Options) -> None:
    """Prints the table and the parts, writes rows and figure."""
    on_gpu = jax.default_backend() == "gpu"
    device = jax.devices()[0].device_kind
    if jax.device_count() > 1:
        device = f"{jax.device_count()} x {device}"
    names = options.models or (("swa_gdn2_1.3B",) if on_gpu else ("tiny",))
    lengths = options.lengths or (PAPER_LENGTHS if on_gpu else (64, 128))
    tokens = options.tokens or (16384 if on_gpu else 512)
    for length in lengths:
        if length < 1 or tokens % length:
            raise SystemExit(f"lengths: expected divisors of {tokens} tokens, got {length}")
    slug = re.sub(r"\W+", "-", device.lower())
    output = options.output or Path(__file__).parent / "results" / "training" / f"{slug}.jsonl"

    rate = matmul_rate(8192 if on_gpu else 512)
    print(f"{device}, jax {jax.__version__}, bf16 product {rate / 1e12:.4g} TFLOP/s")
    print(f"{tokens} tokens a step; rows go to {output}\n{format_header(COLUMNS)}", flush=True)
    rows = read_rows(output)
    of_model = ("remat", "unroll", "implementation")
    changes = {x: getattr(options, x) for x in of_model if getattr(options, x) is not None}
    with ThreadPoolExecutor(len(lengths)) as pool:
        for name in names:
            model = dataclasses.replace(PRESETS[name], **changes)
            todo = []
            for length in lengths:
                key = {"device": device, "jax": jax.__version__, "model": name}
                key |= {"length": length, "batch": tokens // length, "graphs": not options.profile}
                key |= {x: getattr(model, x) for x in of_model}
                done = [row for row in rows if key.items() <= row.items() and "error" not in row]
                if done and not options.again:
                    print_row(done[-1], options.operations)
                else:
                    todo.append((key, training_config(model, length, tokens)))
            # The lengths of a model compile at once, before any of them runs.
            steps = [
                pool.submit(compile_step, training, make_mesh(), options.profile)
                for _, training in todo
            ]
            wait(steps)
            for (key, training), step in zip(todo, steps, strict=True):
                row = key | {"bf16_product_flops": rate} | measure(options, training, step)
                rows.append(row)
                append_row(output, row)
                print_row(row, options.operations)
    figure = output.with_suffix(".png")
    draw(rows, figure)
    print(f"rows appended to {output}, figure in {figure}")
    for page in (output.with_name("NOTES.md"), PERFORMANCE):
        renew_table(page, output, table(rows))


def training_config(model: ModelConfig, length: int, tokens: int) -> TrainingConfig:
    """A run of `tokens` a step in sequences of `length`; none of its data are read."""
    return TrainingConfig(
        model=model,
        data=DataConfig(sequence_length=length),
        steps=1000,
        global_batch_size=tokens // length,
    )


# Python runs one thread at a time anyway.
TRACING = threading.Lock()


def compile_step(
    training: TrainingConfig, mesh: Mesh, profile: bool
) -> tuple[jax.stages.Compiled, float]:
    """The step on a mesh, and the seconds that it took to compile beside others in threads.

    With `profile` kernels keep the names of their operations, not being launched as CUDA graphs.
    """
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    size = f"{training.data.sequence_length} x {training.global_batch_size}"
    size += f" on {axes}" if axes else ""
    say(f"{size}: compiling")
    start = time.perf_counter()
    batch = abstract_batch(training, mesh, training.accumulation)
    with TRACING:
        lowered = jit_train_step(training, mesh).lower(abstract_state(training, mesh), batch)
    graphs = {"xla_gpu_enable_command_buffer": ""} if profile else None
    step = lowered.compile(compiler_options=graphs)
    seconds = time.perf_counter() - start
    say(f"{size}: compiled in {seconds:.0f} s")
    return step, seconds


def measure(options: Options, training: TrainingConfig, compiled: Future) -> dict[str, Any]:
    """Time, rates and memory of the step, and what its parts take."""
    mesh, model, length = make_mesh(), training.model, training.data.sequence_length
    try:
        step, compile_s = compiled.result()
        make_batch = jax.jit(random_batch, static_argnums=0, out_shardings=batch_sharding(mesh, 1))
        state, batch = state_maker(model)(), make_batch(training)

        def run(steps: int):
            nonlocal state
            for _ in range(steps):
                state, metrics = step(state, batch)
            return metrics

        losses = [float(run(1).loss), float(run(1).loss)]
        samples = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(options.steps))
            samples.append((time.perf_counter() - start) / options.steps * 1e3)
        losses.append(float(run(1).loss))
        events = device_events(lambda: run(3)) if options.profile else []
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    row = {**spread(samples), "compile_s": compile_s, "peak_gib": peak_gib(step), "losses": losses}
    row["tokens_per_second"] = training.tokens_per_step / row["median_ms"] * 1e3
    flops = training_flops_per_token(model, length) * row["tokens_per_second"]
    row["model_flops"] = flops / jax.device_count()
    if events:
        row |= breakdown(events, operation_names(step.as_text()), model.mixer.kind, 3)
    return row


@functools.cache
def state_maker(model: ModelConfig) -> Callable:
    """A compiled function without arguments; the state is the same for every length."""
    training, mesh = training_config(model, 1, jax.device_count()), make_mesh()
    make = functools.partial(initial_state, training)
    return jax.jit(make, out_shardings=state_shardings(training, mesh))


def random_batch(training: TrainingConfig) -> Batch:
    """A batch such as the data pipeline gives."""
    shape = (training.accumulation, training.microbatch_size, training.data.sequence_length)
    keys = jax.random.split(jax.random.key(1))
    inputs, targets = (jax.random.randint(key, shape, 0, training.model.vocab_size) for key in keys)
    return Batch(inputs, targets, jnp.ones(shape))


def operation_names(compiled: str) -> dict[str, str]:
    """The traced operation behind each instruction of a compiled computation's text.

    Instructions that run other instructions are left out, because these would count twice.
    """
    names = {}
    for line in compiled.splitlines():
        # Lines of kernels hold the kernel's code: no search may go back and forth in them.
        head, equals, rest = line.partition(" = ")
        opcode = re.search(r" ([\w-]+)\(", rest)
        path = re.search(r'op_name="([^"]*)"', rest)
        if equals and opcode and path and opcode[1] not in ("while", "call", "conditional"):
            names[head.split()[-1].removeprefix("%")] = path[1]
    return names


def breakdown(
    events: list[Event], names: dict[str, str], mixer: str, steps: int
) -> dict[str, dict[str, float]]:
    """Milliseconds a step of each part, of its passes, and of the 60 slowest operations."""
    parts, passes, operations = (collections.Counter() for _ in range(3))
    # Kernels that XLA itself writes are called after their instruction.
    kernels = {re.sub(r"\W", "_", name): path for name, path in names.items()}
    for event in events:
        path = names.get(event.operation) or kernels.get(event.name, "")
        if not path and jax.default_backend() != "gpu":
            continue
        milliseconds = event.milliseconds / steps / jax.device_count()
        scopes = path.split("/")
        part = part_of(scopes, mixer)
        direction = "forward"
        if "rematted_computation" in path:
            direction = "recomputation"
        elif "transpose(" in path:
            direction = "backward"
        elif part in ("optimizer", "other"):
            direction = part
        parts[part] += milliseconds
        passes[direction] += milliseconds
        operations[f"{direction} {short_name(scopes) or event.name}"] += milliseconds
    return {
        "parts_ms": {part: parts[part] for part in PARTS},
        "passes_ms": dict(passes),
        "operations_ms": dict(operations.most_common(60)),
    }


def part_of(scopes: list[str], mixer: str) -> str:
    """The part of the model whose module an operation's path names."""
    if "optimizer" in scopes:
        return "optimizer"
    if {"mlp", "mlp_norm"} & set(scopes):
        return "MLP"
    if {"mixer", "mixer_norm"} & set(scopes):
        attends = "attention_block" in scopes or "attention" in mixer
        return "attention" if attends else "mixer"
    outside = {"embed", "final_norm", "loss", "jvp(loss)", "transpose(jvp(loss))"}
    return "embedding + loss" if outside & set(scopes) else "other"


def short_name(scopes: list[str]) -> str:
    """An operation's path from its block on, without the names of transformations."""
    if "layers" in scopes:
        # Recomputed operations repeat the path.
        scopes = scopes[len(scopes) - scopes[::-1].index("layers") :]
    hidden = {"while", "body", "eval_jaxpr", "checkpoint", "rematted_computation", "jit(step)"}
    return "/".join(scope for scope in scopes if scope not in hidden)


COLUMNS = (
    Column("model", "model", width=-18),
    Column("T x B", "size", width=9),
    Column("tokens/s", "tokens_per_second", ",.0f", 9),
    Column("ms", "median_ms", ".1f", 7),
    Column("IQR", "iqr_ms", ".1f", 5),
    Column("MFU", "mfu", ".1%", 6),
    Column("of product", "share", ".1%"),
    Column("GiB", "peak_gib", ".1f", 5),
    Column("compile s", "compile_s", ".0f"),
)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Adds to a row what the tables show."""
    row = row | {"size": f"{row['length']} x {row['batch']}"}
    if "model_flops" in row:
        row["share"] = row["model_flops"] / row["bf16_product_flops"]
        if peak := peak_flops(row["device"].split(" x ")[-1]):
            row["mfu"] = row["model_flops"] / peak
    return row


def print_row(row: dict[str, Any], operations: int) -> None:
    """Prints a line of the table and what the step's time went into."""
    print(format_row(COLUMNS, shown(row)))
    for name in ("parts_ms", "passes_ms"):
        if name in row:
            parts = (f"{part} {ms:.1f}" for part, ms in row[name].items() if ms)
            print(f"    {name.removesuffix('_ms')}, ms: {', '.join(parts)}")
    slowest = list(row.get("operations_ms", {}).items())[:operations]
    for name, milliseconds in slowest:
        print(f"    {milliseconds:9.2f}  {name}")
    sys.stdout.flush()


def table(rows: list[dict[str, Any]]) -> str:
    """The latest row of each model and length as Markdown, with the parts in ms."""
    columns = [column for column in COLUMNS if column.key not in ("share", "compile_s")]
    latest = {(r["device"], r["model"], r["length"]): r for r in rows if "error" not in r}
    lines = []
    for row in map(shown, latest.values()):
        cells = [format(row[x.key], x.style) if x.key in row else "" for x in columns]
        parts = row.get("parts_ms", {})
        lines.append(cells + [f"{parts[x]:.1f}" if x in parts else "" for x in PARTS])
    return markdown_table([*(column.name for column in columns), *PARTS], lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws tokens a second over length: each model's latest rows, and the paper's on a GPU."""
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = collections.defaultdict(dict)
    for row in rows:
        if "error" not in row:
            lines[row["model"], row["device"]][row["length"]] = row["tokens_per_second"] / 1e3
    for (model, device), points in lines.items():
        axes.plot(*zip(*sorted(points.items())), "o-", label=f"{model}, {device}")
    if any(row["model"].endswith("1.3B") for row in rows):
        for index, (name, values) in enumerate(PAPER.items()):
            style = {"color": f"{0.2 + 0.15 * index:.2f}", "linewidth": 1}
            axes.plot(PAPER_LENGTHS, values, "--", label=f"{name}, the paper's, H100", **style)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of a sequence", ylabel="thousand tokens a second", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def say(text: str) -> None:
    """Shows progress, apart from the table."""
    print(f"  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command("benchmark_training.py", main, Options, __doc__, gpu_memory=0.95))
