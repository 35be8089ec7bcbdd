"""Times compiled functions, and what bounds them: the rates of copies and of matrix products."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def measure(
    function: Callable,
    operands: tuple,
    repeats: int,
    *,
    next_operands: Callable[[tuple, Any], tuple] | None = None,
) -> dict[str, Any]:
    """Compiles, warms up and times a jitted function.

    A sample is the mean over calls queued behind one another for some 50 ms, so that the host's
    share hides behind the device's.

    Args:
      function: jitted.
      operands: its arguments, on the device.
      repeats: samples to take.
      next_operands: maps the operands and results of a call to the operands of the next one; needed
        where the function takes its operands' buffers (donation). The same operands if None.

    Returns:
      median_ms and iqr_ms of the samples, compile_s, temp_bytes (temporary memory), alias_bytes
      (operands that results overwrite) and peak_gib (all memory of a call).
    """
    start = time.perf_counter()
    compiled = function.lower(*operands).compile()
    compile_s = time.perf_counter() - start
    memory = compiled.memory_analysis()

    def run(calls: int) -> float:
        nonlocal operands
        start = time.perf_counter()
        for _ in range(calls):
            results = compiled(*operands)
            if next_operands:
                operands = next_operands(operands, results)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / calls

    run(1)
    calls = max(1, min(200, int(0.05 / run(1))))
    return {
        **spread([run(calls) * 1e3 for _ in range(repeats)]),
        "compile_s": compile_s,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "peak_gib": peak_gib(compiled),
    }


def peak_gib(compiled: jax.stages.Compiled) -> float:
    """All memory of a call: operands, results and temporaries, shared buffers once."""
    memory: Any = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (total - memory.alias_size_in_bytes) / 2**30


class Event(NamedTuple):
    """Something that ran on a device.

    Attributes:
      operation: the instruction of the compiled computation that it belongs to; "" if not known.
      milliseconds: that it took.
      start: when it began, in milliseconds.
      device: that it ran on; a CPU's simulated devices are one.
    """

    name: str
    operation: str
    milliseconds: float
    start: float = 0.0
    device: str = ""


def device_events(run: Callable[[], Any]) -> list[Event]:
    """Everything on the GPUs' streams, or on a CPU, while `run()` computes its results.

    Launches do not count: the sum is the time of a computation where the host is never late.
    Mosaic's `profiler.measure` has no operations, streams or devices, and knows GPUs alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    if jax.default_backend() == "gpu":
        planes = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    events = [
        Event(
            event.name,
            str(dict(event.stats).get("hlo_op", "")),
            event.duration_ns / 1e6,
            event.start_ns / 1e6,
            plane.name,
        )
        for plane in planes
        for line in plane.lines
        if jax.default_backend() != "gpu" or line.name.startswith("Stream")
        for event in line.events
    ]
    # A CPU's lines also hold what the host does.
    return [event for event in events if event.operation or jax.default_backend() == "gpu"]


def spread(samples: list[float]) -> dict[str, float]:
    """Median and interquartile range of samples in milliseconds."""
    if len(samples) < 2:
        return {"median_ms": samples[0], "iqr_ms": 0.0}
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median_ms": median, "iqr_ms": high - low}


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 4 GiB."""
    x = jax.random.normal(jax.random.key(0), (2**30,))
    seconds = measure(jax.jit(lambda x: x + 1), (x,), 5)["median_ms"] / 1e3
    return 2 * x.nbytes / seconds


def matmul_rate(size: int = 8192) -> float:
    """Operations a second of a bf16 product of two square matrices."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    seconds = measure(jax.jit(jnp.matmul), (x, x), 5)["median_ms"] / 1e3
    return 2 * size**3 / seconds
