"""Times the GPU kernels of the operator, stage by stage, from a device profile.

    python experiments/profile_operator.py                    # 32,768 tokens x 16 heads, d = 128
    python experiments/profile_operator.py --shapes 1,8192,16,128 --implementation xla

Bytes are those of every array a kernel takes and returns, once; operations are those of its matrix
products (a multiplication and an addition each). Both are set against ceilings measured in the
same process: the bandwidth of a large copy, and the rate of a large bf16 matrix product. Kernels of
XLA are added up under "other".
"""

import collections
import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from gdn2_jax.command import require_positive, run_command

import jax
from benchmark_operator import Shape, both, forward, inputs, parse_shape

from gdn2_jax.ops import Implementation
from gdn2_jax.rows import Column, append_row, format_header, format_row
from gdn2_jax.timing import copy_bandwidth, device_events, matmul_rate

CHUNK = 64
KERNELS = (
    "intra_chunk_forward",
    "state_pass_forward",
    "state_pass_backward",
    "chunk_backward",
)
COLUMNS = (
    Column("stage", "stage", width=-22),
    Column("ms", "ms", ".3f", 8),
    Column("TB/s", "tb", ".2f"),
    Column("of copy", "share", ".2f"),
    Column("TFLOP/s", "tflop", ".0f"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to profile.

    Attributes:
      shapes: each "B,T,H,d".
      implementation: of the operator.
      repeats: profiled calls of each function.
      output: file to append the rows to, as JSON lines.
    """

    shapes: tuple[str, ...] = ("8,4096,16,128", "1,32768,16,128")
    implementation: Implementation = "pallas"
    repeats: int = 10
    output: Path | None = None

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self)
        for shape in self.shapes:
            parse_shape(shape)


def main(options: Options) -> None:
    """Prints a table for each shape and pass."""
    if jax.default_backend() != "gpu":
        raise SystemExit("profile_operator: expected a GPU, got " + jax.default_backend())
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    device = jax.devices()[0].device_kind
    print(f"{device}: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    for text in options.shapes:
        shape = parse_shape(text)
        arguments, cotangents = inputs(shape, "bfloat16")
        for name, function, operands in (
            ("forward", forward(options.implementation), arguments),
            ("forward + backward", both(options.implementation), (arguments, cotangents)),
        ):
            print(f"\n{text} {name}\n{format_header(COLUMNS)}")
            rows = profile(function, operands, shape, options.repeats)
            rows.append({"stage": "all", "ms": sum(row["ms"] for row in rows)})
            for row in rows:
                shown = dict(row)
                if "bytes" in row:
                    speed, flops = row["bytes"] / row["ms"] * 1e3, row["flop"] / row["ms"] * 1e3
                    shown |= {"tb": speed / 1e12, "share": speed / bandwidth, "tflop": flops / 1e12}
                print(format_row(COLUMNS, shown), flush=True)
                append_row(options.output, {"device": device, "shape": text, "pass": name} | row)
    if options.output:
        print(f"rows appended to {options.output}")


def profile(function: Callable, operands: tuple, shape: Shape, repeats: int) -> list[dict]:
    """Median time of each stage over the calls, with its bytes and operations."""
    compiled = function.lower(*operands).compile()
    jax.block_until_ready(compiled(*operands))
    events = device_events(
        lambda: [jax.block_until_ready(compiled(*operands)) for _ in range(repeats)]
    )
    times = collections.defaultdict(list)
    for event in events:
        stage = next((kernel for kernel in KERNELS if kernel in event.name), "other")
        times[stage].append(event.milliseconds)
    moved = kernel_bytes(jax.make_jaxpr(function)(*operands).jaxpr)
    rows = []
    for stage in (*KERNELS, "other"):
        if stage == "other":
            rows.append({"stage": stage, "ms": sum(times[stage]) / repeats})
        elif times[stage]:
            row = {"stage": stage, "ms": statistics.median(times[stage])}
            rows.append(row | {"bytes": moved[stage], "flop": operations(stage, shape)})
    return rows


def kernel_bytes(jaxpr: jax.extend.core.Jaxpr) -> dict[str, int]:
    """Bytes of the operands and results of each kernel in a computation."""
    moved = {}
    for equation in jaxpr.eqns:
        name = str(equation.params.get("name", ""))
        if name.endswith("_kernel"):
            avals = [x.aval for x in (*equation.invars, *equation.outvars)]
            moved[name.removesuffix("_kernel")] = sum(x.size * x.dtype.itemsize for x in avals)
            continue
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            moved |= kernel_bytes(inner)
    return moved


def operations(stage: str, shape: Shape) -> int:
    """Operations of a stage's matrix products, K = V = d, operands in two parts counted once."""
    batch, length, heads, d = shape
    per_chunk = {
        # T and Aqk; five doublings of the inverse; Y and U; three sums of g
        "intra_chunk_forward": 7 * CHUNK**2 * d + 10 * CHUNK**3,
        "state_pass_forward": 3 * CHUNK * d**2 + CHUNK**2 * d,
        # and dZ
        "state_pass_backward": 3 * CHUNK * d**2 + 2 * CHUNK**2 * d,
        # dQg, dKt, dEg; dAqk and dT; two for the columns of the pairs and two for their rows; three
        # sums of g and two of its gradient
        "chunk_backward": 3 * CHUNK * d**2 + 11 * CHUNK**2 * d,
    }
    return 2 * per_chunk[stage] * batch * heads * -(-length // CHUNK)


if __name__ == "__main__":
    sys.exit(run_command("profile_operator.py", main, Options, __doc__))
