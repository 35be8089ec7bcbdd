"""Times the operator and measures its memory: implementation x shape x dtype.

    python experiments/benchmark_operator.py                       # the project's own shapes
    python experiments/benchmark_operator.py --shapes 1,8192,16,128 --dtypes bfloat16
    python experiments/benchmark_operator.py --peers fla cudnn     # PyTorch kernels in this process
    python experiments/benchmark_operator.py --gates gdn2 kda gdn  # also with one number a head

A row is one compiled function: the forward, or the forward and the backward with cotangents of both
results. Times are medians with the interquartile range; inputs are on the device, compilation is
apart. "temp / inputs" is the compiled function's temporary memory over the bytes of q, k, v, g, b, w,
and "floor" what reading every input and writing every result once would take at the bandwidth of
a large copy, measured in the same process.
"""

import dataclasses
import importlib
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gdn2_jax.command import require_positive, run_command

import jax
import jax.numpy as jnp

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops import Implementation
from gdn2_jax.rows import Column, append_row, format_header, format_row
from gdn2_jax.testing import ERROR_BOUNDS, operator_inputs
from gdn2_jax.timing import copy_bandwidth, measure, spread

Shape = tuple[int, int, int, int]

# (shape, dtype, implementations); None stands for the implementation the device gets by default.
CPU_CASES = [((1, 2048, 4, 64), "float32", ("recurrent", "xla"))]
GPU_CASES = [
    ((8, 4096, 16, 128), "bfloat16", ("xla", "triton", "pallas")),
    ((1, 32768, 16, 128), "bfloat16", ("xla", "triton", "pallas")),
    ((1, 2048, 4, 64), "float32", ("recurrent", "xla", "triton")),
]
MEMORY_SHAPE = (1, 4096, 4, 128)

# The gates that have one number for all channels of a head.
ONE_CHANNEL = {"gdn2": "", "kda": "bw", "gdn": "gbw"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      shapes: each "B,T,H,d"; the project's own where empty.
      implementations: of the operator, for the shapes given.
      dtypes: of q, k, v, b and w, for the shapes given.
      gates: of GDN-2, a number a channel; of KDA, one a head to erase and to write; of GDN, one log-decay
        a head, too.
      peers: kernels of other packages to time beside ours, where importable: fla, cudnn.
      repeats: timed samples of each function.
      output: file to append the rows to, as JSON lines.
    """

    shapes: tuple[str, ...] = ()
    implementations: tuple[Implementation, ...] = ("xla",)
    dtypes: tuple[Literal[*ERROR_BOUNDS], ...] = ("bfloat16",)
    gates: tuple[Literal[*ONE_CHANNEL], ...] = ("gdn2",)
    peers: tuple[Literal["fla", "cudnn"], ...] = ()
    repeats: int = 10
    output: Path | None = None

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self)
        for shape in self.shapes:
            parse_shape(shape)


def main(options: Options) -> None:
    """Prints the table."""
    on_gpu = jax.default_backend() == "gpu"
    bandwidth = copy_bandwidth() if on_gpu else None
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    if bandwidth:
        print(f"copy bandwidth (read + write): {bandwidth / 1e12:.2f} TB/s", flush=True)
    print(format_header(COLUMNS))
    rows = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print_row(row)
        append_row(options.output, {"device": jax.devices()[0].device_kind, **row})

    cases = GPU_CASES if on_gpu else CPU_CASES
    if options.shapes:
        shapes = [parse_shape(shape) for shape in options.shapes]
        cases = [(s, dtype, options.implementations) for s in shapes for dtype in options.dtypes]
    for case, gates in itertools.product(cases, options.gates):
        shape, dtype, implementations = case
        arguments, cotangents = inputs(shape, dtype, gates)
        for implementation in implementations:
            for name, function, operands in (
                ("forward", forward(implementation), arguments),
                ("forward + backward", both(implementation), (arguments, cotangents)),
            ):
                row = label(implementation, shape, dtype, name, gates)
                try:
                    row |= measure(function, operands, options.repeats)
                except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                    add(row | {"error": str(error).splitlines()[0]})
                    continue
                row["temp_ratio"] = row.pop("temp_bytes") / sum(x.nbytes for x in arguments)
                del row["alias_bytes"]
                if bandwidth:
                    row["floor_ms"] = traffic(arguments, name) / bandwidth * 1e3
                add(row)
        for peer in options.peers:
            for row in time_peer(peer, arguments, options.repeats):
                add(dict(label(peer, shape, dtype, row.pop("pass"), gates), **row))
    if not options.shapes:
        for row in memory_rows():
            add(row)
    for line in summary(rows):
        print(line)
    if options.output:
        print(f"rows appended to {options.output}")


def parse_shape(text: str) -> Shape:
    """Reads "B,T,H,d"."""
    shape = tuple(int(number) for number in text.split(",") if number.strip().isdecimal())
    if len(shape) != 4 or text.count(",") != 3 or min(shape) < 1:
        raise ValueError(f"shapes: expected B,T,H,d, got {text!r}")
    return shape


def inputs(
    shape: Shape, dtype: str, gates: str = "gdn2", value_dim: int | None = None
) -> tuple[tuple, tuple]:
    """Inputs with the gates of a new layer, and cotangents of both results.

    Heads have as many value channels as key channels if `value_dim` is None.
    """
    batch, length, heads, dim = shape
    drawn = operator_inputs(batch, length, heads, dim, value_dim, dtype=dtype, initial_state=False)
    drawn = drawn._replace(**{name: getattr(drawn, name)[..., :1] for name in ONE_CHANNEL[gates]})
    state_shape = batch, heads, dim, drawn.v.shape[-1]
    state = jax.random.normal(jax.random.key(0), state_shape, drawn.g.dtype)
    return tuple(drawn[:6]), (drawn.v[::-1], state)


def forward(implementation: str) -> Callable:
    """The operator, jitted."""
    return jax.jit(lambda *arguments: gated_delta_rule_2(*arguments, implementation=implementation))


def both(implementation: str) -> Callable:
    """The operator and its gradients, jitted."""

    def run(arguments, cotangents):
        results, pullback = jax.vjp(forward(implementation), *arguments)
        return results, pullback(cotangents)

    return jax.jit(run)


def traffic(arguments: tuple, name: str) -> int:
    """Bytes of every input, result, cotangent and gradient once."""
    read = sum(x.nbytes for x in arguments)
    output = arguments[2].nbytes
    return read + output if name == "forward" else 3 * read + 2 * output


def memory_rows() -> list[dict[str, Any]]:
    """Compiles forward + backward at a length and twice that; nothing runs."""
    rows = []
    batch, length, heads, dim = MEMORY_SHAPE
    for shape in (MEMORY_SHAPE, (batch, 2 * length, heads, dim)):
        key_side = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        g = jax.ShapeDtypeStruct(shape, jnp.float32)
        state = jax.ShapeDtypeStruct((batch, heads, dim, dim), jnp.float32)
        arguments = (key_side, key_side, key_side, g, key_side, key_side)
        start = time.perf_counter()
        compiled = both("xla").lower(arguments, (key_side, state)).compile()
        compile_s = time.perf_counter() - start
        memory = compiled.memory_analysis()
        given = sum(x.size * x.dtype.itemsize for x in arguments)
        temp = memory.temp_size_in_bytes
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + temp
        rows.append(
            dict(
                label("xla", shape, "bfloat16", "forward + backward"),
                compile_s=compile_s,
                temp_ratio=temp / given,
                peak_gib=total / 2**30,
            )
        )
    return rows


def time_peer(peer: str, arguments: tuple, repeats: int) -> list[dict[str, Any]]:
    """Times another package's kernel on the same inputs, with CUDA events."""
    try:
        torch = importlib.import_module("torch")
        function, operands = {"fla": fla_call, "cudnn": cudnn_call}[peer](torch, arguments)
    except ImportError as error:
        print(f"{peer}: not importable ({error})")
        return []
    try:
        torch.cuda.reset_peak_memory_stats()
        operands = [x.requires_grad_() if x.is_floating_point() else x for x in operands]
        output = function(*operands)
        cotangent = torch.randn_like(output)

        def step():
            torch.autograd.backward(function(*operands), cotangent)
            for x in operands:
                x.grad = None

        with torch.no_grad():
            times = cuda_times(torch, lambda: function(*operands), repeats)
        rows = [{"pass": "forward", **times}]
        rows.append({"pass": "forward + backward", **cuda_times(torch, step, repeats)})
        rows[-1]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return rows
    except Exception as error:  # noqa: BLE001 - each package declines with its own
        print(f"{peer}: declined these inputs ({error})")
        return []


def fla_call(torch: Any, arguments: tuple) -> tuple[Callable, list]:
    """flash-linear-attention's GDN-2."""
    chunk_gdn2 = importlib.import_module("fla.ops.gdn2").chunk_gdn2
    return lambda *x: chunk_gdn2(*x)[0], [to_torch(torch, x) for x in arguments]


def cudnn_call(torch: Any, arguments: tuple) -> tuple[Callable, list]:
    """KDA of cuDNN, whose GDN-2 declines Hopper; the scalar beta is the erase gate's mean."""
    attention = importlib.import_module("cudnn.linear_attention").kimi_delta_attention
    q, k, v, g, b, _ = arguments
    batch, length = q.shape[:2]
    packed = [to_torch(torch, x.reshape(-1, *x.shape[2:])) for x in (q, k, v, g, b.mean(-1))]
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * length
    return lambda *x: attention(*x, cu_seqlens)[0], packed


def to_torch(torch: Any, x: jax.Array) -> Any:
    """Copies an array to PyTorch, on the GPU."""
    return torch.from_dlpack(x).clone()


def cuda_times(torch: Any, function: Callable, repeats: int) -> dict[str, float]:
    """Times a PyTorch function with events around batches of ten calls."""
    for _ in range(3):
        function()
    samples = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            function()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / 10)
    return spread(samples)


def label(
    implementation: str, shape: Shape, dtype: str, name: str, gates: str = "gdn2"
) -> dict[str, Any]:
    """What a row is about."""
    row = {"implementation": implementation, "gates": gates, "shape": shape, "dtype": dtype}
    return row | {"pass": name}


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Ratios of "xla" to "recurrent" where both were timed."""
    times = {
        (row["shape"], row["gates"], row["pass"], row["implementation"]): row["median_ms"]
        for row in rows
        if "median_ms" in row
    }
    lines = []
    for (shape, gates, name, implementation), ms in times.items():
        other = times.get((shape, gates, name, "recurrent"))
        if implementation == "xla" and other:
            lines.append(f"{shape} {gates} {name}: xla takes {ms / other:.2f} of recurrent's time")
    return lines


COLUMNS = (
    Column("implementation", "implementation"),
    Column("gates", "gates", width=6),
    Column("shape", "shape_text", width=20),
    Column("dtype", "dtype", width=9),
    Column("pass", "pass", width=19),
    Column("median ms", "median_ms", ".3f"),
    Column("IQR ms", "iqr_ms", ".3f", 7),
    Column("floor ms", "floor_ms", ".3f"),
    Column("compile s", "compile_s", ".1f"),
    Column("temp / inputs", "temp_ratio", ".2f"),
    Column("peak GiB", "peak_gib", ".2f"),
    Column("x floor", "floors", ".1f"),
)


def print_row(row: dict[str, Any]) -> None:
    """Prints a row of the table."""
    shown = row | {"shape_text": ",".join(map(str, row["shape"]))}
    if "floor_ms" in row:
        shown["floors"] = row["median_ms"] / row["floor_ms"]
    print(format_row(COLUMNS, shown), flush=True)


if __name__ == "__main__":
    sys.exit(run_command("benchmark_operator.py", main, Options, __doc__))
