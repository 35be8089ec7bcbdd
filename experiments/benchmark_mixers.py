"""Times forward + backward of each mixer's layer and, where it has its own, operator.

    python experiments/benchmark_mixers.py                      # 1.3B on a GPU, tiny on a CPU
    python experiments/benchmark_mixers.py --mixers gdn2 mamba3_mimo --batch 1 --length 32768

The sizes are those of the presets "<mixer>_<scale>", so all layers of a scale have the same width and
the recurrent ones the same state. A row is one compiled function: outputs, and the gradients of every
parameter and input for a random cotangent. Times are medians with the interquartile range; "x gdn2"
compares with the same part of gdn2, where that was timed before.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gdn2_jax.command import require_positive, run_command

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.models import MIXERS, PRESETS, SCALES, ModelConfig
from gdn2_jax.ops import Implementation, Mamba3Inputs, Mamba3Weights, mamba2, mamba3
from gdn2_jax.rows import Column, append_row, format_header, format_row
from gdn2_jax.testing import operator_inputs
from gdn2_jax.timing import measure

COLUMNS = (
    Column("mixer", "mixer", width=24),
    Column("part", "part", width=8),
    Column("median ms", "median_ms", ".3f"),
    Column("IQR ms", "iqr_ms", ".3f", 7),
    Column("x gdn2", "ratio", ".2f"),
    Column("compile s", "compile_s", ".1f"),
    Column("peak GiB", "peak_gib", ".2f"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      mixers: names of presets before "_<scale>".
      scale: of the presets; 1.3B on a GPU and tiny elsewhere if None.
      batch: sequences.
      length: tokens of each; 4096 on a GPU and 128 elsewhere if None.
      implementation: of the operators.
      repeats: timed samples of each function.
      output: file to append the rows to, as JSON lines.
    """

    mixers: tuple[Literal[*MIXERS], ...] = tuple(MIXERS)
    scale: Literal[*SCALES] | None = None
    batch: int = 8
    length: int | None = None
    implementation: Implementation | None = "xla"
    repeats: int = 10
    output: Path | None = None

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self)


def main(options: Options) -> None:
    """Prints the table."""
    on_gpu = jax.default_backend() == "gpu"
    scale = options.scale or ("1.3B" if on_gpu else "tiny")
    length = options.length or (4096 if on_gpu else 128)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}; {scale}, B={options.batch}, T={length}", flush=True)
    print(format_header(COLUMNS))
    first = {}
    for mixer in options.mixers:
        model = dataclasses.replace(
            PRESETS[f"{mixer}_{scale}"], implementation=options.implementation
        )
        for part, build in (("operator", operator), ("layer", layer)):
            row = {"mixer": mixer, "part": part, "scale": scale, "batch": options.batch}
            row |= {"length": length, "implementation": options.implementation, "device": device}
            try:
                case = build(model, options.batch, length)
                if case is None:
                    continue
                row |= measure(with_gradients(case[0]), case[1:], options.repeats)
            except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                row["error"] = str(error).splitlines()[0]
            if mixer == "gdn2" and "median_ms" in row:
                first[part] = row["median_ms"]
            ratio = row["median_ms"] / first[part] if "median_ms" in row and part in first else None
            print(format_row(COLUMNS, row | {"ratio": ratio}), flush=True)
            append_row(options.output, row)


def layer(model: ModelConfig, batch: int, length: int) -> tuple[Callable, tuple, jax.Array]:
    """The mixer's layer as a function, its parameters and inputs, and a cotangent."""
    module = model.mixer.layer(model, False, None)
    x = normal(0, (batch, length, model.d_model), jnp.promote_types(model.dtype, jnp.float32))
    params = jax.jit(module.init)(jax.random.key(0), x[:1, :1])["params"]
    cotangent = normal(1, x.shape, model.dtype)
    return lambda params, x: module.apply({"params": params}, x), (params, x), cotangent


def operator(model: ModelConfig, batch: int, length: int) -> tuple | None:
    """The mixer's own operator as a function, its arguments and a cotangent; None if it has none.

    Gates are as at initialisation. KDA, GDN and DeltaNet run on gdn2's operator, timed there.
    """
    cases = {"gdn2": gdn2_case, "mamba2": mamba2_case, "mamba3": mamba3_case}
    if model.mixer.kind not in cases:
        return None
    function, arguments, v = cases[model.mixer.kind](model, batch, length)

    def outputs(*arguments):
        return function(*arguments, implementation=model.implementation)[0]

    return outputs, arguments, normal(1, v.shape, v.dtype)


def gdn2_case(model: ModelConfig, batch: int, length: int) -> tuple:
    """Function, arguments, values."""
    shape = (batch, length, model.mixer.num_heads, model.mixer.head_dim)
    arguments = operator_inputs(*shape, dtype=model.dtype, initial_state=False)[:6]
    return gated_delta_rule_2, arguments, arguments[2]


def mamba2_case(model: ModelConfig, batch: int, length: int) -> tuple:
    """Function, arguments, values."""
    mixer = model.mixer
    heads = mixer.inner_dim // mixer.head_dim
    shared = (batch, length, 1, mixer.state_dim)
    q, k = (normal(seed, shared, model.dtype) for seed in (2, 3))
    v = normal(4, (batch, length, heads, mixer.head_dim), model.dtype)
    dt = time_steps(v.shape[:-1])
    rate = jax.random.uniform(jax.random.key(5), (heads,), dt.dtype, 1, 16)
    return mamba2, (q, k, v, -rate * dt, dt), v


def mamba3_case(model: ModelConfig, batch: int, length: int) -> tuple:
    """Function, arguments, values."""
    mixer = model.mixer
    heads = mixer.inner_dim // mixer.head_dim
    ranks, key_dim = mixer.mimo_rank or 1, mixer.state_dim
    q, k = (normal(s, (batch, length, ranks, 1, key_dim), model.dtype) for s in (2, 3))
    v, z = (normal(s, (batch, length, heads, mixer.head_dim), model.dtype) for s in (4, 5))
    dt = time_steps(v.shape[:-1])
    half = jnp.full_like(dt, 0.5)
    rotation = jnp.pi * jnp.tanh(normal(6, (batch, length, key_dim // 4), dt.dtype))
    bias = jnp.ones((heads, ranks, key_dim), dt.dtype)
    weights = Mamba3Weights(bias, bias, jnp.ones(heads, dt.dtype))
    if mixer.mimo_rank:
        rank = jnp.ones((heads, ranks, mixer.head_dim), dt.dtype)
        weights = weights._replace(v_rank=rank / ranks, z_rank=rank, o_rank=rank / ranks)
    return mamba3, (Mamba3Inputs(q, k, v, z, -half * dt, dt, half, rotation), weights), v


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def time_steps(shape: tuple[int, ...]) -> jax.Array:
    """Log-uniform in [1e-3, 1e-1]."""
    low, high = np.log([1e-3, 1e-1])
    return jnp.exp(jax.random.uniform(jax.random.key(7), shape, minval=low, maxval=high))


def with_gradients(function: Callable) -> Callable:
    """Outputs and the gradients of all arguments, jitted."""

    def run(arguments, cotangent):
        outputs, pullback = jax.vjp(function, *arguments)
        return outputs, pullback(cotangent)

    return jax.jit(run)


if __name__ == "__main__":
    sys.exit(run_command("benchmark_mixers.py", main, Options, __doc__))
