"""Times a decoding step: implementation x batch size.

    python experiments/benchmark_decode.py
    python experiments/benchmark_decode.py --batches 64 --implementations pallas

A compiled function advances a stack of layers by one token, as decoding does: each layer has its own
state and the output of one is the query of the next. The states are donated, and together several
times the size of a GPU's cache, so that each step reads its state from memory. Reported is the time of
a layer's step: on a GPU by its profiler, the sum over the kernels of the function, and by the clock,
calls queued behind one another, which also shows where launching takes longer than computing. The
bandwidth is that of reading the state once and writing it once, in the profiler's time, beside
a large copy's, measured in the same process.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdn2_jax.command import require_positive, run_command

import jax
import jax.numpy as jnp

from gdn2_jax import gated_delta_rule_2_step
from gdn2_jax.ops import Implementation
from gdn2_jax.rows import Column, append_row, format_header, format_row
from gdn2_jax.testing import operator_inputs
from gdn2_jax.timing import copy_bandwidth, device_events, measure, spread

# Twice the cache of an H100 or H200 and more; no fewer layers than XLA groups into one CUDA graph.
STATES_BYTES = 2**27
MINIMUM_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      batches: batch sizes.
      heads: key and value heads.
      head_dim: key and value channels a head.
      implementations: of the step; "xla" and, on a GPU, "pallas" where empty.
      layers: steps in one compiled function; as many as the states need to outgrow the cache where
        None.
      repeats: timed samples of each function.
      output: file to append the rows to, as JSON lines.
    """

    batches: tuple[int, ...] = (1, 16, 128, 512)
    heads: int = 16
    head_dim: int = 128
    implementations: tuple[Implementation, ...] = ()
    layers: int | None = None
    repeats: int = 10
    output: Path | None = None

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self)


def main(options: Options) -> None:
    """Prints the table."""
    device = jax.devices()[0].device_kind
    on_gpu = jax.default_backend() == "gpu"
    bandwidth = copy_bandwidth() if on_gpu else None
    print(f"{device}, jax {jax.__version__}, {options.heads} heads, d = {options.head_dim}")
    if bandwidth:
        print(f"copy bandwidth (read + write): {bandwidth / 1e12:.2f} TB/s")
    print(format_header(COLUMNS), flush=True)
    for batch in options.batches:
        for implementation in options.implementations or (
            ("xla", "pallas") if on_gpu else ("xla",)
        ):
            row = {"device": device, "implementation": implementation, "batch": batch}
            row |= {"heads": options.heads, "head_dim": options.head_dim}
            try:
                row |= time_step(options, batch, implementation)
            except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
                row["error"] = str(error).splitlines()[0]
            else:
                if bandwidth:
                    row["copy_share"] = row["bytes_per_s"] / bandwidth
            print(format_row(COLUMNS, row), flush=True)
            append_row(options.output, row)
    if options.output:
        print(f"rows appended to {options.output}")


def time_step(options: Options, batch: int, implementation: str) -> dict[str, Any]:
    """Times of one layer's step, the bandwidth it reaches, and whether states stay in place."""
    state_bytes = batch * options.heads * options.head_dim**2 * 4
    layers = options.layers or max(MINIMUM_LAYERS, math.ceil(STATES_BYTES / state_bytes))
    states, tokens = inputs(layers, batch, options.heads, options.head_dim)
    function = stack(functools.partial(gated_delta_rule_2_step, implementation=implementation))

    def feed_back(operands, results):
        nonlocal states
        states = results[0]
        return states, tokens

    times = measure(function, (states, tokens), options.repeats, next_operands=feed_back)
    row = {
        "layers": layers,
        "clock_us": times["median_ms"] / layers * 1e3,
        "clock_iqr_us": times["iqr_ms"] / layers * 1e3,
        "in_place": times["alias_bytes"] >= layers * state_bytes > times["temp_bytes"],
        "compile_s": times["compile_s"],
    }
    samples = []
    for _ in range(options.repeats if jax.default_backend() == "gpu" else 0):
        events = device_events(lambda: feed_back(None, function(states, tokens)))
        samples.append(sum(event.milliseconds for event in events) / layers)
    if samples:
        device = spread(samples)
        row |= {"step_us": device["median_ms"] * 1e3, "iqr_us": device["iqr_ms"] * 1e3}
        row["bytes_per_s"] = 2 * state_bytes / row["step_us"] * 1e6
    return row


def inputs(layers: int, batch: int, heads: int, head_dim: int) -> tuple[list, list]:
    """States of the layers and their tokens (q, k, v, g, b, w), gates as at initialisation."""
    tokens = operator_inputs(batch, 1, heads, head_dim, dtype="bfloat16", initial_state=False)
    tokens = [x[:, 0] for x in tokens[:6]]
    draw = jax.jit(jax.random.normal, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), layers)
    states = [draw(key, (batch, heads, head_dim, head_dim)) for key in keys]
    return states, [[jnp.roll(x, i, axis=0) for x in tokens] for i in range(layers)]


def stack(step: Callable) -> Callable:
    """One token of all layers, jitted, the states donated."""

    def run(states, tokens):
        query = tokens[0][0]
        new_states = []
        for state, (_, *others) in zip(states, tokens, strict=True):
            state, query = step(state, query, *others)
            new_states.append(state)
        return new_states, query

    return jax.jit(run, donate_argnums=0)


COLUMNS = (
    Column("implementation", "implementation"),
    Column("batch", "batch"),
    Column("layers", "layers"),
    Column("step us", "step_us", ".2f"),
    Column("IQR us", "iqr_us", ".2f"),
    Column("bytes/s", "bytes_per_s", ".2e", 11),
    Column("of copy", "copy_share", ".0%"),
    Column("clock us", "clock_us", ".2f"),
    Column("clock IQR us", "clock_iqr_us", ".2f"),
    Column("in place", "in_place"),
    Column("compile s", "compile_s", ".1f"),
)


if __name__ == "__main__":
    sys.exit(run_command("benchmark_decode.py", main, Options, __doc__))
