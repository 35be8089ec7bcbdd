"""Times a decoding step: implementation x batch size.

    python experiments/benchmark_decode.py
    python experiments/benchmark_decode.py --batches 64 --implementations pallas

A compiled function advances a stack of layers by one token, as decoding does: each layer has its own
state and the output of one is the query of the next. The states are donated, and together several
times the size of a GPU's cache, so that each step reads its state from memory. Reported is the time of
a layer, the bandwidth of reading its state once and writing it once, and the share of a large
copy's, measured in the same process.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from gdn2_jax import gated_delta_rule_2_step
from gdn2_jax.ops import Implementation
from gdn2_jax.testing import operator_inputs
from gdn2_jax.timing import copy_bandwidth, measure

# Twice the cache of an H100 or H200 and more; no fewer layers than XLA groups into one CUDA graph.
STATES_BYTES = 2**27
MINIMUM_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Config:
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
        sizes = {"heads": self.heads, "head_dim": self.head_dim, "repeats": self.repeats}
        sizes |= {"batches": min(self.batches, default=0)}
        sizes |= {"layers": 1 if self.layers is None else self.layers}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def main(config: Config) -> None:
    """Prints the table."""
    device = jax.devices()[0].device_kind
    on_gpu = jax.default_backend() == "gpu"
    bandwidth = copy_bandwidth() if on_gpu else None
    print(f"{device}, jax {jax.__version__}, {config.heads} heads, d = {config.head_dim}")
    if bandwidth:
        print(f"copy bandwidth (read + write): {bandwidth / 1e12:.2f} TB/s")
    print(HEADER, flush=True)
    for batch in config.batches:
        for implementation in config.implementations or (("xla", "pallas") if on_gpu else ("xla",)):
            row = {"device": device, "implementation": implementation, "batch": batch}
            row |= {"heads": config.heads, "head_dim": config.head_dim}
            try:
                row |= time_step(config, batch, implementation)
            except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
                row["error"] = str(error).splitlines()[0]
            else:
                row["copy_share"] = row["bytes_per_s"] / bandwidth if bandwidth else None
            print(format_row(row), flush=True)
            if config.output:
                config.output.parent.mkdir(parents=True, exist_ok=True)
                with config.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if config.output:
        print(f"rows appended to {config.output}")


def time_step(config: Config, batch: int, implementation: str) -> dict[str, Any]:
    """Time of one layer's step, the bandwidth it reaches, and whether states stay in place."""
    state_bytes = batch * config.heads * config.head_dim**2 * 4
    layers = config.layers or max(MINIMUM_LAYERS, math.ceil(STATES_BYTES / state_bytes))
    states, tokens = inputs(layers, batch, config.heads, config.head_dim)
    times = measure(
        stack(functools.partial(gated_delta_rule_2_step, implementation=implementation)),
        (states, tokens),
        config.repeats,
        next_operands=lambda operands, results: (results[0], operands[1]),
    )
    step_us = times["median_ms"] / layers * 1e3
    return {
        "layers": layers,
        "step_us": step_us,
        "iqr_us": times["iqr_ms"] / layers * 1e3,
        "bytes_per_s": 2 * state_bytes / step_us * 1e6,
        "in_place": times["alias_bytes"] >= layers * state_bytes > times["temp_bytes"],
        "compile_s": times["compile_s"],
    }


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


HEADER = "implementation  batch  layers   us a step  IQR us    TB/s   of copy  in place  compile s"


def format_row(row: dict[str, Any]) -> str:
    """A line of the table."""
    start = f"{row['implementation']:>14}  {row['batch']:>5}"
    if "error" in row:
        return f"{start}  {row['error']}"
    share = "-" if row["copy_share"] is None else f"{row['copy_share']:.0%}"
    return (
        f"{start}  {row['layers']:>6}  {row['step_us']:>10.2f}  {row['iqr_us']:>6.2f}  "
        f"{row['bytes_per_s'] / 1e12:>6.3f}  {share:>8}  {'yes' if row['in_place'] else 'no':>8}  "
        f"{row['compile_s']:>9.1f}"
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
