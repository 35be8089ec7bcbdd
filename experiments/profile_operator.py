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
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from gdn2_jax.command import require_positive, run_command

import jax
import tyro
from benchmark_operator import Shape, both, forward, inputs, parse_shape

from gdn2_jax.ops import Implementation
from gdn2_jax.timing import copy_bandwidth, device_events, matmul_rate

CHUNK = 64
KERNELS = (
    "intra_chunk_forward",
    "state_pass_forward",
    "state_pass_backward",
    "chunk_backward",
)


@dataclasses.dataclass(frozen=True)
class Config:
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


def main(config: Config) -> None:
    """Prints a table for each shape and pass."""
    if jax.default_backend() != "gpu":
        raise SystemExit("profile_operator: expected a GPU, got " + jax.default_backend())
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    device = jax.devices()[0].device_kind
    print(f"{device}: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    for text in config.shapes:
        shape = parse_shape(text)
        arguments, cotangents = inputs(shape, "bfloat16")
        for name, function, operands in (
            ("forward", forward(config.implementation), arguments),
            ("forward + backward", both(config.implementation), (arguments, cotangents)),
        ):
            print(f"\n{text} {name}\n{'stage':<22}{'ms':>8}{'TB/s':>8}{'of copy':>9}{'TFLOP/s':>9}")
            rows = profile(function, operands, shape, config.repeats)
            rows.append({"stage": "all", "ms": sum(row["ms"] for row in rows)})
            for row in rows:
                print_row(row, bandwidth)
                if config.output:
                    config.output.parent.mkdir(parents=True, exist_ok=True)
                    with config.output.open("a") as file:
                        file.write(
                            json.dumps({"device": device, "shape": text, "pass": name} | row) + "\n"
                        )
    if config.output:
        print(f"rows appended to {config.output}")


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


def print_row(row: dict, bandwidth: float) -> None:
    """Prints a stage."""
    line = f"{row['stage']:<22}{row['ms']:8.3f}"
    if "bytes" in row:
        achieved = row["bytes"] / row["ms"] * 1e3
        rate = row["flop"] / row["ms"] / 1e9
        line += f"{achieved / 1e12:8.2f}{achieved / bandwidth:9.2f}{rate:9.0f}"
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(
        run_command("profile_operator.py", lambda: main(tyro.cli(Config, description=__doc__)))
    )
