r"""Times a decoding step of the operator, or prefill and decoding of whole models.

    python experiments/benchmark_decode.py
    python experiments/benchmark_decode.py --batches 64 --implementations pallas
    python experiments/benchmark_decode.py --models gdn2_1.3B swa_gdn2_1.3B attention_1.3B --batches 1 64 \
        --minutes 8 --output experiments/results/decode/h100.jsonl

With --models random bfloat16 weights of presets read prompts and generate after contexts of several
lengths. A prompt is read in pieces of 4,096 tokens, fewer in large batches, without padding. The
last piece of a context is timed; all take as long, since full attention's cache has its final size
from the first on. Decoding is `continue_session`, greedy, by the clock. What the output holds is
not measured again; a figure is drawn beside it.

Without --models a compiled function advances a stack of layers by one token, as decoding does: each
layer has its own state and the output of one is the query of the next. The states are donated, and
together several times the size of a GPU's cache, so that each step reads its state from memory. Reported
is the time of a layer's step: on a GPU by its profiler, the sum over the kernels of the function, and
by the clock, calls queued behind one another, which also shows where launching takes longer than
computing. The bandwidth is that of reading the state once and writing it once, in the profiler's time,
beside a large copy's, measured in the same process.
"""

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gdn2_jax.command import out_of_memory, require_positive, run_command

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gdn2_jax import gated_delta_rule_2_step
from gdn2_jax.models import (
    PRESETS,
    DeltaRule,
    LanguageModel,
    ModelConfig,
    Session,
    continue_session,
    with_state_rounding,
)
from gdn2_jax.models.session import empty_cache, read
from gdn2_jax.ops import Implementation
from gdn2_jax.rows import Column, append_row, format_header, format_row, read_rows
from gdn2_jax.testing import operator_inputs
from gdn2_jax.timing import copy_bandwidth, device_events, measure, spread

# More than twice the cache of an H100 or H200, and at least as many layers as one CUDA graph holds.
STATES_BYTES = 2**27
MINIMUM_LAYERS = 8

StateForm = Literal["float32", "nearest", "stochastic"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      batches: batch sizes.
      heads: key and value heads.
      head_dim: key and value channels a head.
      implementations: of the step; "xla" and, on a GPU, "pallas" where empty.
      states: how they are kept between steps: in float32, or in bfloat16, to which each step rounds them.
      layers: steps in one compiled function; as many as the states need to outgrow the cache where
        None.
      repeats: timed samples of each function.
      output: file to append the rows to, as JSON lines.
      models: presets; the operator alone where empty.
      contexts: tokens before those that are generated.
      new_tokens: generated in a sample.
      unroll: compile the layers of models one after another, not as a loop; the preset's if None.
      minutes: after these, no further row is measured.
    """

    batches: tuple[int, ...] = (1, 16, 128, 512)
    heads: int = 16
    head_dim: int = 128
    implementations: tuple[Implementation, ...] = ()
    states: tuple[StateForm, ...] = ("float32",)
    layers: int | None = None
    repeats: int = 10
    output: Path | None = None
    models: tuple[str, ...] = ()
    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768, 65536, 262144, 1048576)
    new_tokens: int = 128
    unroll: bool | None = None
    minutes: float = 20

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self, minutes=0)
        for name in self.models:
            if name not in PRESETS:
                raise ValueError(f"models: expected names of presets, got {name}")


def main(options: Options) -> None:
    """Prints the table."""
    if options.models:
        return benchmark_models(options)
    device = jax.devices()[0].device_kind
    on_gpu = jax.default_backend() == "gpu"
    bandwidth = copy_bandwidth() if on_gpu else None
    print(f"{device}, jax {jax.__version__}, {options.heads} heads, d = {options.head_dim}")
    if bandwidth:
        print(f"copy bandwidth (read + write): {bandwidth / 1e12:.2f} TB/s")
    print(format_header(COLUMNS), flush=True)
    implementations = options.implementations or (("xla", "pallas") if on_gpu else ("xla",))
    for batch, implementation, kept in itertools.product(
        options.batches, implementations, options.states
    ):
        row = {"device": device, "implementation": implementation, "batch": batch, "state": kept}
        row |= {"heads": options.heads, "head_dim": options.head_dim}
        try:
            row |= time_step(options, batch, implementation, kept)
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
            row["error"] = str(error).splitlines()[0]
        else:
            if bandwidth:
                row["copy_share"] = row["bytes_per_s"] / bandwidth
        print(format_row(COLUMNS, row), flush=True)
        append_row(options.output, row)
    if options.output:
        print(f"rows appended to {options.output}")


def time_step(options: Options, batch: int, implementation: str, kept: str) -> dict[str, Any]:
    """Times of one layer's step, the bandwidth it reaches, and whether states stay in place."""
    state_bytes = batch * options.heads * options.head_dim**2 * (4 if kept == "float32" else 2)
    layers = options.layers or max(MINIMUM_LAYERS, math.ceil(STATES_BYTES / state_bytes))
    states, tokens = inputs(layers, batch, options.heads, options.head_dim, kept)
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


def inputs(layers: int, batch: int, heads: int, head_dim: int, kept: str) -> tuple[list, list]:
    """States of the layers and their tokens (q, k, v, g, b, w), gates as at initialisation.

    Tokens also have the seeds of stochastic rounding, or None.
    """
    tokens = operator_inputs(batch, 1, heads, head_dim, dtype="bfloat16", initial_state=False)
    tokens = [x[:, 0] for x in tokens[:6]]
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), layers)
    dtype = jnp.float32 if kept == "float32" else jnp.bfloat16
    states = [draw(key, (batch, heads, head_dim, head_dim), dtype) for key in keys]
    seeds = None
    if kept == "stochastic":
        seeds = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads)
    return states, [[*(jnp.roll(x, i, axis=0) for x in tokens), seeds] for i in range(layers)]


def stack(step: Callable) -> Callable:
    """One token of all layers, jitted, the states donated."""

    def run(states, tokens):
        query = tokens[0][0]
        new_states = []
        for state, (_, *others, seeds) in zip(states, tokens, strict=True):
            state, query = step(state, query, *others, rounding_seeds=seeds)
            new_states.append(state)
        return new_states, query

    return jax.jit(run, donate_argnums=0)


def benchmark_models(options: Options) -> None:
    """Prints a row for each model, batch and context, and draws them."""
    start = time.monotonic()
    device = jax.devices()[0].device_kind
    bandwidth = copy_bandwidth() if jax.default_backend() == "gpu" else None
    rows = read_rows(options.output) if options.output else []
    # The file may hold rows of the operator, too, and rows from before states had other dtypes.
    rows = [{"state": "float32", "unroll": False} | row for row in rows if "model" in row]
    keys = ("model", "batch", "state", "context", "unroll")
    done = {tuple(row[key] for key in keys) for row in rows}
    late = []
    print(f"{device}, jax {jax.__version__}\n{format_header(MODEL_COLUMNS)}", flush=True)
    for name in options.models:
        params = None
        rounded = isinstance(PRESETS[name].mixer, DeltaRule)
        kinds = options.states if rounded else ("float32",)
        for batch, kept, context in itertools.product(options.batches, kinds, options.contexts):
            config = model_config(name, context, options.unroll, kept)
            if (name, batch, kept, context, config.unroll) in done:
                continue
            if time.monotonic() - start > options.minutes * 60:
                late.append(f"{name} B={batch} {context}")
                continue
            params = random_params(config) if params is None else params
            row = {"device": device, "model": name, "batch": batch, "state": kept}
            row |= {"context": context, "unroll": config.unroll}
            try:
                row |= time_model(options, config, params, batch, context)
            except jax.errors.JaxRuntimeError as error:
                row["error"] = out_of_memory(error) or str(error).splitlines()[0]
            else:
                if bandwidth:
                    floor_ms = row["weight_bytes"] / bandwidth * 1e3
                    row |= {"copy_bandwidth": bandwidth, "of_weights": row["step_ms"] / floor_ms}
            print(format_row(MODEL_COLUMNS, row), flush=True)
            append_row(options.output, row)
            rows.append(row)
    if late:
        print(f"not measured within {options.minutes:g} minutes, run again: {'; '.join(late)}")
    if options.output and rows:
        draw(rows, options.output.with_suffix(".png"))
        print(f"rows in {options.output}, figure in {options.output.with_suffix('.png')}")


def model_config(name: str, context: int, unroll: bool | None, kept: StateForm) -> ModelConfig:
    """The preset with weights of 16 bits; full attention keeps the context and what follows."""
    config = dataclasses.replace(PRESETS[name], param_dtype="bfloat16")
    if unroll is not None:
        config = dataclasses.replace(config, unroll=unroll)
    config = with_state_rounding(config, None if kept == "float32" else kept)
    if config.mixer.cache_grows:
        config = dataclasses.replace(config, context_length=context + 1024)
    return config


def random_params(config: ModelConfig) -> dict:
    """Weights as at the beginning of training."""
    # The same parameters in a loop of layers, which compiles faster.
    model = LanguageModel(dataclasses.replace(config, unroll=False))
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))["params"]


def time_model(
    options: Options, config: ModelConfig, params: dict, batch: int, context: int
) -> dict[str, Any]:
    """Prefill and decoding after a context, and the memory that they need."""
    length = max(1, min(context, PIECE, PIECE_TOKENS // batch))
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    cache = at_position(empty_cache(config, batch), context - length)
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    weight_bytes = (
        sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed"]["embedding"].nbytes
    )
    compiled = compiled_read(config, batch, length, params, cache)
    session, samples = Session(cache, None), []
    for _ in range(1 + options.repeats):
        before = time.perf_counter()
        session = jax.block_until_ready(compiled(params, session.cache, tokens))
        samples.append((time.perf_counter() - before) * 1e3)
    piece = spread(samples[1:])["median_ms"]
    steps = []
    for _ in range(1 + options.repeats):
        before = time.perf_counter()
        _, session = continue_session(
            config, params, session, max_new_tokens=options.new_tokens, temperature=0.0
        )
        jax.block_until_ready(session)
        steps.append((time.perf_counter() - before) * 1e3 / options.new_tokens)
    step = spread(steps[1:])
    prefill_ms = piece * math.ceil(context / length)
    row = {
        "piece": length,
        "prefill_tokens_per_s": batch * length / piece * 1e3,
        "first_token_ms": prefill_ms + step["median_ms"],
        "step_ms": step["median_ms"],
        "step_iqr_ms": step["iqr_ms"],
        "decode_tokens_per_s": batch / step["median_ms"] * 1e3,
        "cache_bytes": cache_bytes,
        "weight_bytes": weight_bytes,
        "prefill_temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    if batch == 1 and context == FORWARD_TOKENS:
        del session
        row["forward_tokens_per_s"] = time_forward(options, config, params)
    return row


_PROGRAMS: dict[tuple, jax.stages.Compiled] = {}


def compiled_read(
    config: ModelConfig, batch: int, length: int, params: dict, cache: dict
) -> jax.stages.Compiled:
    """The program that reads a piece, compiled once for each model and shape."""
    if (config, batch, length) not in _PROGRAMS:
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        lowered = read.lower(config, params, cache, tokens)
        _PROGRAMS[config, batch, length] = lowered.compile()
    return _PROGRAMS[config, batch, length]


def time_forward(options: Options, config: ModelConfig, params: dict) -> float:
    """Tokens a second of the forward of training, without the loss, on one long sequence."""
    tokens = jnp.zeros((1, FORWARD_TOKENS), jnp.int32)
    forward = jax.jit(lambda p, x: LanguageModel(config).apply({"params": p}, x, head=False))
    times = measure(forward, (params, tokens), options.repeats)
    return FORWARD_TOKENS / times["median_ms"] * 1e3


def at_position(cache: dict, position: int) -> dict:
    """The cache at this position. Its contents stay, because they do not change the time."""
    flat = flatten_dict(cache)
    for path, value in flat.items():
        if path[-1] == "index":
            flat[path] = jnp.full_like(value, position)
        elif path[-1] == "slot":
            flat[path] = jnp.full_like(value, position % flat[*path[:-1], "key"].shape[2])
    return unflatten_dict(flat)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws step, prefill and cache against the context, a line for each model and batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = {
        "step_ms": "a decoding step (ms)",
        "prefill_tokens_per_s": "prefill (tokens/s)",
        "cache_bytes": "cache (bytes)",
    }
    keys = ("model", "batch", "state", "unroll")
    kinds = sorted({tuple(row[key] for key in keys) for row in rows if "error" not in row})
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, kind in enumerate(kinds):
            points = sorted(
                (row["context"], row[key])
                for row in rows
                if tuple(row[name] for name in keys) == kind and key in row
            )
            model, batch, kept, unroll = kind
            label = f"{model}, B={batch}" + ("" if kept == "float32" else f", bfloat16 ({kept})")
            label += "" if unroll else ", layers in a loop"
            axes.plot(*zip(*points), marker=".", color=f"C{number}", label=label)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="context (tokens)", ylabel=title)
        if key == "cache_bytes":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.suptitle(f"{rows[0]['device']}; lines end where memory does, or the measurement")
    figure.savefig(path, dpi=150)


# Tokens of a piece of a prompt, of one row and of all; tokens of the forward beside it.
PIECE = 4096
PIECE_TOKENS = 65536
FORWARD_TOKENS = 32768

MODEL_COLUMNS = (
    Column("model", "model", width=-16),
    Column("batch", "batch"),
    Column("state", "state", width=-10),
    Column("context", "context", ",", 9),
    Column("step ms", "step_ms", ".3f"),
    Column("IQR ms", "step_iqr_ms", ".3f"),
    Column("of weights", "of_weights", ".2f"),
    Column("decode tok/s", "decode_tokens_per_s", ",.0f"),
    Column("prefill tok/s", "prefill_tokens_per_s", ",.0f"),
    Column("first token ms", "first_token_ms", ",.1f"),
    Column("cache bytes", "cache_bytes", ".3e"),
    Column("temp bytes", "prefill_temp_bytes", ".3e"),
    Column("forward tok/s", "forward_tokens_per_s", ",.0f"),
)
COLUMNS = (
    Column("implementation", "implementation"),
    Column("batch", "batch"),
    Column("state", "state", width=-10),
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
