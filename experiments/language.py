"""Compares language models of several mixers: tuned learning rates, seeds, and what they have learnt.

    python experiments/build_corpus.py runs/corpus --vocab-size 16384
    python experiments/language.py mixers_30M --corpus runs/corpus --devices 2 --minutes 25
    python experiments/language.py mixers_30M --table

A study is a file in experiments/language. Each of its models is trained at each learning rate on a
quarter of the tokens; then, with one seed on all of them, at the rate of the lowest validation loss and at
smaller ones while they are better, as longer runs ask for smaller rates; then with each seed at the best.
Two processes of a GPU take turns: one trains, the other compiles. What is stopped, also by --minutes,
goes on when started again; finished runs are not repeated. --tokens makes all runs shorter or longer,
under results of their own.

A finished run is a line of STUDY.jsonl in --results: validation bits per byte, loss by position up to
eight times the training length, recall of rare pairs of tokens, tokens/s, and a GDN-2's gates. --table
prints the table and draws STUDY.png and STUDY_gates.png beside it; so does the end of a study.
--directory keeps what unfinished runs need.
"""

import dataclasses
import functools
import heapq
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gdn2_jax.command import read_study, run_command

import jax
import numpy as np
import tyro

from gdn2_jax.data import DataConfig, Excerpt, load_tokenizer, prepare
from gdn2_jax.evaluation.readouts import (
    count_in_training,
    gate_statistics,
    loss_by_position,
    rare_recall,
)
from gdn2_jax.models import PRESETS as MODELS
from gdn2_jax.models import ModelConfig, model_sizes, with_parameters_of
from gdn2_jax.parallel import make_mesh
from gdn2_jax.rows import append_row, markdown_table, read_rows, source_commit
from gdn2_jax.training import (
    CheckpointError,
    DivergenceError,
    OptimizerConfig,
    Programs,
    StoppedError,
    TrainingConfig,
    compile_programs,
    open_run,
    run_files,
    train,
)
from gdn2_jax.training.metrics import read_metrics
from gdn2_jax.workers import Worker, share, worker_devices

HERE = Path(__file__).parent
STUDIES = HERE / "language"
RESULTS = HERE / "results" / "language"

# Changes of a preset's mixer that a study may name after it.
VARIANTS: dict[str, dict[str, Any]] = {
    "_scalar_bw": {"erase_gate": "scalar", "write_gate": "scalar"},
    "_tied": {"erase_gate": "scalar", "write_gate": "tied"},
    "_scalar_b": {"erase_gate": "scalar"},
    "_scalar_w": {"write_gate": "scalar"},
    "_negative": {"allow_negative_eigenvalues": True},
    "_sigmoid": {"output_gate": "sigmoid"},
    "_silu": {"output_gate": "silu"},
}

# A pair of tokens is rare if training has it less often than once in so many tokens.
RARE = 50_000

COLUMNS = (
    *("model", "learning rate", "seeds", "bits per byte", "loss at 8x less at 1x"),
    *("rare pairs seen before", "not seen", "tokens/s", "parameters", "state a layer"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What to compare.

    Attributes:
      scale: of the presets.
      models: presets without their scale, each with a key of `VARIANTS` or none.
      learning_rates: of the sweep.
      seeds: of the runs at the best rate; none: the sweep is the study, and takes all tokens.
      more_seeds: more of them, for some models.
      sweep_seeds: of the sweep.
      tokens: of such a run.
      sweep_share: of them that a run of the sweep takes.
      sequence_length: in training.
      batch_size: sequences a step.
      windows: texts that are read for the loss by position.
    """

    scale: str
    models: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    more_seeds: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    sweep_seeds: tuple[int, ...] = (0,)
    tokens: int
    sweep_share: float = 0.25
    sequence_length: int = 1024
    batch_size: int = 64
    windows: int = 64


class Spec(NamedTuple):
    """A run, with its name among those of its study; `phase` is "sweep" or "final"."""

    key: str
    model: str
    phase: str
    config: TrainingConfig


class Job(NamedTuple):
    """What all processes know; `directory` holds the runs and logs."""

    directory: Path
    study: Study
    commit: str


# --- what there is to do ------------------------------------------------------------------------


def model_config(name: str, scale: str, vocab_size: int) -> ModelConfig:
    """The preset of a study's model, with its variant."""
    preset, changes = name, {}
    for suffix, fields in VARIANTS.items():
        if name.endswith(suffix):
            preset, changes = name.removesuffix(suffix), fields
            break
    if f"{preset}_{scale}" not in MODELS:
        known = sorted(n.removesuffix(f"_{scale}") for n in MODELS if n.endswith(f"_{scale}"))
        raise ValueError(f"models: expected some of {', '.join(known)}, got {name!r}")
    model = MODELS[f"{preset}_{scale}"]
    mixer = dataclasses.replace(model.mixer, **changes)
    variant = dataclasses.replace(model, vocab_size=vocab_size, mixer=mixer)
    return with_parameters_of(variant, model, 1, multiple=16) if changes else variant


@functools.cache
def vocab_size(tokenizer: str) -> int:
    """Read once: all runs are described anew whenever one is handed out."""
    return load_tokenizer(tokenizer).vocab_size


def spec(study: Study, data: DataConfig, model: str, phase: str, rate: float, seed: int) -> Spec:
    """Describes a run."""
    share = study.sweep_share if phase == "sweep" and study.seeds else 1
    steps = max(1, round(share * study.tokens / (study.batch_size * study.sequence_length)))
    config = TrainingConfig(
        model=model_config(model, study.scale, vocab_size(data.tokenizer)),
        data=dataclasses.replace(data, sequence_length=study.sequence_length, seed=0),
        optimizer=OptimizerConfig(learning_rate=rate, warmup=0.05),
        steps=steps,
        global_batch_size=study.batch_size,
        seed=seed,
        log_every=min(20, steps),
        validate_every=steps,
        checkpoint_every=1000,
        checkpoints_kept=1,
        sample_tokens=0,
    )
    return Spec(f"{model}-{phase}-{rate:g}-{seed}-{steps}", model, phase, config)


def specs(study: Study, data: DataConfig, rows: list[dict]) -> Iterator[Spec]:
    """Yields the runs that can be started now, the finished ones too: model by model, sweep, then seeds."""
    finished = {row["run"]: row for row in rows}
    for model in study.models:
        for rate in study.learning_rates:
            for seed in study.sweep_seeds:
                yield spec(study, data, model, "sweep", rate, seed)
        best = best_rate(study, data, model, rows)
        if best is None or not study.seeds:
            continue
        seed, *seeds = [*study.seeds, *study.more_seeds.get(model, [])]
        rate, loss = best, math.inf
        for smaller in sorted((r for r in study.learning_rates if r <= best), reverse=True):
            run = spec(study, data, model, "final", smaller, seed)
            yield run
            if run.key not in finished:
                rate = None
                break
            if _loss(finished[run.key]) > loss:
                break
            rate, loss = smaller, _loss(finished[run.key])
        if rate is not None:
            yield from (spec(study, data, model, "final", rate, seed) for seed in seeds)


def best_rate(study: Study, data: DataConfig, model: str, rows: list[dict]) -> float | None:
    """The rate of the lowest validation loss in a model's sweep; None before that is finished."""
    finished = {row["run"]: row for row in rows}
    losses = {}
    for rate in study.learning_rates:
        keys = [spec(study, data, model, "sweep", rate, s).key for s in study.sweep_seeds]
        if not all(key in finished for key in keys):
            return None
        losses[rate] = statistics.mean(_loss(finished[key]) for key in keys)
    rate = min(losses, key=losses.get)
    return rate if math.isfinite(losses[rate]) else None


def expected_seconds(run: Spec, rows: list[dict]) -> float:
    """How long a run should take, by the finished ones of its model, or else of all; 0 without any."""
    speeds = [
        (row["model"], row["tokens_per_second"]) for row in rows if "tokens_per_second" in row
    ]
    own = [speed for model, speed in speeds if model == run.model]
    if not speeds:
        return 0.0
    speed = statistics.median(own or [speed for _, speed in speeds])
    training = run.config.steps * run.config.tokens_per_step / speed
    return 1.1 * training  # It is validated and read out, too.


def _loss(row: dict) -> float:
    value = row["bits_per_byte"]
    return math.inf if value is None else value


# --- one run, in a process ----------------------------------------------------------------------


def compile_run(run: Spec) -> Programs:
    """Compiles what a run needs."""
    return compile_programs(run.config, make_mesh(run.config.mesh))


def run_one(run: Spec, programs: Programs, worker: Worker, job: Job) -> dict | None:
    """Trains a model, or goes on, and reads out what it has learnt.

    Returns:
      The run's line; None if it was stopped.
    """
    worker.report("started")
    directory = job.directory / run.key
    config, study = run.config, job.study
    row = {
        "run": run.key,
        "model": run.model,
        "phase": run.phase,
        "learning_rate": config.optimizer.learning_rate,
        "seed": config.seed,
        "tokens": config.steps * config.tokens_per_step,
        "bits_per_byte": None,
        **model_sizes(config.model, config.data.sequence_length)._asdict(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": job.commit,
    }
    try:
        params = train(open_run(config, directory), programs).params
    except StoppedError:
        return None
    except CheckpointError as error:
        raise ValueError(error) from error
    except DivergenceError as error:
        shutil.rmtree(directory)
        return row | {"diverged": str(error)}
    metrics = read_metrics(run_files(directory).metrics)
    logged = [point for point in metrics if "loss" in point]
    speeds = [point["tokens_per_second"] for point in logged]
    row |= {
        "bits_per_byte": metrics[-1]["validation_bits_per_byte"],
        "validation_loss": metrics[-1]["validation_loss"],
        "training_loss": logged[-1]["mean_loss"],
        "curve": [[point["tokens"], round(point["mean_loss"], 4)] for point in logged],
        # Without the first steps, and the median, as others compile and are evaluated meanwhile.
        "tokens_per_second": round(statistics.median(speeds[len(speeds) // 4 :])),
    }
    if run.phase == "final" or not study.seeds:
        row |= read_out(run, params, job)
    # The weights are not kept: the disk may be small, and the command makes them again.
    shutil.rmtree(directory)
    return row


def read_out(run: Spec, params, job: Job) -> dict:
    """Measures recall, use of long context, and gates."""
    study = job.study
    # The loop over layers compiles in a fraction of the time, and little runs.
    config = dataclasses.replace(
        run.config, model=dataclasses.replace(run.config.model, unroll=False)
    )
    corpus = prepare(config.data)
    held_out = corpus.validation
    with np.load(job.directory / "pairs.npz") as file:
        pairs, counts = file["pairs"], file["counts"]
    some = Excerpt(held_out, 2**20 // study.sequence_length)
    recall = rare_recall(
        config.model,
        params,
        some,
        pairs=pairs,
        counts=counts,
        rare=max(2, corpus.train.store.num_tokens // RARE),
        batch_size=min(study.batch_size, len(some)),
    )
    position = loss_by_position(
        config.model,
        params,
        held_out.store,
        length=8 * study.sequence_length,
        windows=study.windows,
        batch_size=max(1, study.batch_size // 8),
    )
    results = {"recall": recall._asdict(), "position": position._asdict()}
    if config.model.mixer.kind == "gdn2":
        batch = np.stack([some[i].inputs for i in range(min(8, len(some)))])
        results["gates"] = gate_statistics(config.model, params, batch)._asdict()
    return results


# --- the command --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The command line.

    Attributes:
      study: name of a file in experiments/language.
      corpus: directory that build_corpus.py filled.
      models: instead of the study's.
      tokens: of a run with all tokens; None: as the study says.
      devices: number of GPUs, all if None; without GPUs, of processes.
      minutes: after which to stop.
      whole_runs: begin no run that would not end before, but a shorter one; for a machine whose disk
        is lost.
      directory: of unfinished runs; runs/language/STUDY unless given.
      results: of the rows, the table and the figures.
      table: print the table and draw, and do no more.
    """

    study: tyro.conf.Positional[str]
    corpus: Path = Path("runs/corpus")
    models: tuple[str, ...] = ()
    tokens: int | None = None
    devices: int | None = None
    minutes: float = float("inf")
    whole_runs: bool = False
    directory: Path | None = None
    results: Path = RESULTS
    table: bool = False


def main(arguments: list[str]) -> int | str:
    """Returns the exit status, or a message for it to be 1."""
    options = tyro.cli(Options, args=arguments, prog="language.py", description=__doc__)
    deadline = time.time() + 60 * options.minutes
    name, corpus, tokens, results = options.study, options.corpus, options.tokens, options.results
    changes = {key: value for key in ("models", "tokens") if (value := getattr(options, key))}
    study = read_study(Study, STUDIES, name, **changes)
    directory = options.directory or Path("runs") / "language" / name
    suffix = f"_{tokens / 1e6:g}M_tokens" if tokens else ""
    rows_file = results / f"{name}{suffix}.jsonl"
    if options.table:
        return show(rows_file)
    if not list(corpus.glob("train-*.npy")):
        raise ValueError(
            f"corpus: expected train-0.npy in {corpus}; build_corpus.py makes or unpacks it"
        )
    data = DataConfig(
        paths=tuple(map(str, sorted(corpus.glob("train-*.npy")))),
        validation_paths=tuple(map(str, sorted(corpus.glob("validation-*.npy")))),
        tokenizer=str(corpus / "tokenizer.json"),
        cache_directory=str(directory / "cache"),
        sequence_length=study.sequence_length,
    )
    for model in study.models:
        model_config(model, study.scale, 257)
    directory.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    prepared = prepare(data)
    print(prepared.description, flush=True)
    if not (directory / "pairs.npz").exists():
        stores = prepared.validation.store, prepared.train.store
        pairs, counts = count_in_training(*stores, prepared.tokenizer.vocab_size)
        np.savez(directory / "pairs.npz", pairs=pairs, counts=counts)
    job = Job(directory, study, source_commit())
    devices = worker_devices(options.devices, processes=2)
    failed = work(job, data, rows_file, devices, deadline, options.whole_runs)
    rows = finished_runs(rows_file)
    left = [run.key for run in specs(study, data, rows) if run.key not in {r["run"] for r in rows}]
    if rows:
        show(rows_file)
    if failed:
        return f"language.py: failed: {'; '.join(failed)}"
    if left:
        return f"language.py: stopped, {len(left)} runs or more are left; start again to continue"
    return 0


def work(
    job: Job,
    data: DataConfig,
    rows_file: Path,
    devices: list[str],
    deadline: float,
    whole_runs: bool,
) -> list[str]:
    """Runs the study on all devices until it ends or time does; returns what failed."""
    rows, failed, began = finished_runs(rows_file), [], time.time()
    given = {row["run"] for row in rows}
    waiting: dict[str, float] = {}  # seconds that a run should take
    running: dict[str, float] = {}  # when it should end

    def ends_in_time(run: Spec) -> bool:
        idle = len(set(devices)) - len(running)
        free = [*running.values(), *(idle * [time.time()])]
        heapq.heapify(free)
        for seconds in waiting.values():
            heapq.heapreplace(free, free[0] + seconds)
        return free[0] + expected_seconds(run, rows) < deadline

    def next_run() -> Spec | None:
        left = (run for run in specs(job.study, data, rows) if run.key not in given)
        run = next((run for run in left if not whole_runs or ends_in_time(run)), None)
        if run:
            given.add(run.key)
            waiting[run.key] = expected_seconds(run, rows)
        return run

    for kind, run, value in share(
        next_run,
        compile_run,
        functools.partial(run_one, job=job),
        devices=devices,
        deadline=deadline,
        in_hand=2,
        programs=job.directory / "programs",
        logs=job.directory,
    ):
        at, seconds = f"[{time.time() - began:.0f} s]", waiting.pop(run.key, 0.0)
        if kind == "progress":
            running[run.key] = time.time() + seconds
            print(f"{at} {value} {run.key}", flush=True)
            continue
        running.pop(run.key, None)
        if kind == "failed":
            failed.append(f"{run.key}: {value}; see {job.directory}/worker-*.log")
            print(f"failed: {failed[-1]}", flush=True)
        elif value is not None:
            rows.append(value)
            append_row(rows_file, value)
            loss = value["bits_per_byte"]
            print(
                f"{at} finished {run.key}: {'diverged' if loss is None else f'{loss:.4f}'} "
                f"bits per byte, {value.get('tokens_per_second', 0):,} tokens/s",
                flush=True,
            )
    return failed


def finished_runs(path: Path) -> list[dict]:
    """The rows of a file; the last of each run counts."""
    return list({row["run"]: row for row in read_rows(path)}.values())


# --- the table and the figures ------------------------------------------------------------------


def show(rows_file: Path) -> int | str:
    """Prints the table and writes it and the figures beside the rows."""
    rows = finished_runs(rows_file)
    if not rows:
        return f"language.py: {rows_file}: expected rows, found none"
    text = f"{table_of(rows)}\n\n{facts_of(rows, rows_file)}"
    print(text)
    rows_file.with_suffix(".md").write_text(text + "\n")
    draw(rows, rows_file.with_suffix(".png"))
    if any("gates" in row for row in rows):
        draw_gates(rows, rows_file.with_name(f"{rows_file.stem}_gates.png"))
    return 0


def table_of(rows: list[dict]) -> str:
    """A line for each model in Markdown, the best first; spreads are standard deviations."""
    lines = []
    for model, finals in _by_model(rows):
        rates = sorted({row["learning_rate"] for row in rows if row["model"] == model})
        rate = finals[0]["learning_rate"]
        edge = " (edge)" if len(rates) > 1 and rate in (rates[0], rates[-1]) else ""

        speeds = [row["tokens_per_second"] for row in finals if "tokens_per_second" in row]
        lines.append(
            [
                model + ("" if finals[0]["phase"] == "final" else " (sweep only)"),
                f"{rate:g}{edge}",
                str(len(finals)),
                _mean([row["bits_per_byte"] for row in finals], 4),
                _mean([_late(row["position"]["losses"]) for row in finals if "position" in row]),
                _mean([row["recall"]["second"] for row in finals if "recall" in row]),
                _mean([row["recall"]["first"] for row in finals if "recall" in row]),
                f"{statistics.median(speeds):,.0f}" if speeds else "-",
                f"{finals[0]['parameters']:,}",
                f"{finals[0]['state']:,}" if finals[0]["state"] else "-",
            ]
        )
    return markdown_table(COLUMNS, lines)


def facts_of(rows: list[dict], rows_file: Path) -> str:
    """What the runs took, and where they ran."""
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in rows if row["bits_per_byte"])
    devices, commits = (
        ", ".join(sorted({row[key] for row in rows})) for key in ("device", "commit")
    )
    return (
        f"{len(rows)} runs, {seconds / 60:.0f} minutes of training on {devices}; commits {commits}; "
        f"rows in `{rows_file.name}`."
    )


def _mean(values: list[float | None], digits: int = 3) -> str:
    """Mean and standard deviation of the values that are there."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _late(losses: list[float]) -> float:
    """Loss at the end of the long texts less that at the training length."""
    return losses[-1] - losses[len(losses) // 8 - 1]


def _by_model(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """Each model with the final runs of the rate with the most, or the sweep's best before there are any."""
    groups = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    chosen = []
    for model, group in groups.items():
        group = [row for row in group if row["phase"] == "final"] or group
        by_rate = {}
        for row in group:
            by_rate.setdefault(row["learning_rate"], []).append(row)
        finals = max(
            by_rate.values(), key=lambda rows: (len(rows), -statistics.mean(map(_loss, rows)))
        )
        chosen.append((model, finals))
    return sorted(chosen, key=lambda pair: statistics.mean(map(_loss, pair[1])))


def draw(rows: list[dict], path: Path) -> None:
    """Draws the sweep, the results, the loss by position and the recall."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    (sweep, result), (position, recall) = figure.subplots(2, 2)
    groups = _by_model(rows)
    for colour, (model, finals) in zip(colormaps["tab20"].colors, groups, strict=False):
        points = {}
        for row in rows:
            if row["model"] == model and row["phase"] == "sweep" and row["bits_per_byte"]:
                points.setdefault(row["learning_rate"], []).append(row["bits_per_byte"])
        rates = sorted(points)
        means = [statistics.mean(points[rate]) for rate in rates]
        spreads = [max(points[rate]) - min(points[rate]) for rate in rates]
        sweep.errorbar(
            rates, means, [s / 2 for s in spreads], marker="o", color=colour, label=model
        )
        finished = [row for row in finals if row["bits_per_byte"]]
        result.plot(
            [row["bits_per_byte"] for row in finished], [model] * len(finished), "o", color=colour
        )
        known = [row["position"] for row in finished if "position" in row]
        if known:
            curve = np.mean([p["losses"] for p in known], axis=0)
            position.plot(known[0]["ends"], curve, color=colour, label=model)
        for name, marker in (("second", "o"), ("first", "|")):
            values = [row["recall"][name] for row in finished if "recall" in row]
            recall.plot(values, [model] * len(values), marker, color=colour)
    sweep.set(xlabel="learning rate", ylabel="validation, bits per byte", title="sweep")
    swept = sorted({row["learning_rate"] for row in rows if row["phase"] == "sweep"})
    sweep.set_xscale("log")
    sweep.set_xticks(swept, map("{:g}".format, swept))
    sweep.minorticks_off()
    result.set(xlabel="validation, bits per byte; a point a seed", title="at the best rate")
    position.set(xlabel="position", ylabel="loss, nats a token", title="long texts")
    position.set_xscale("log", base=2)
    position.xaxis.set_major_formatter("{x:,.0f}")
    recall.set(
        xlabel="right guesses at rare pairs: o seen before in the text, | not", title="recall"
    )
    for axes in (result, recall):
        axes.invert_yaxis()
    for axes in (sweep, result, position, recall):
        axes.grid(alpha=0.3)
    figure.legend(*sweep.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=150)


def draw_gates(rows: list[dict], path: Path) -> None:
    """Draws histograms of b, w and exp(g) by layer, of the first seed of each GDN-2."""
    from matplotlib.figure import Figure

    shown = {}
    for row in rows:
        if "gates" in row:
            shown.setdefault(row["model"], row)
    figure = Figure(figsize=(11, 2.6 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 3, squeeze=False)
    for line, (model, row) in zip(grid, shown.items(), strict=True):
        for axes, name, symbol in zip(line, ("erase", "write", "keep"), ("b", "w", "exp(g)")):
            shares = np.array(row["gates"][name])
            top = 2 if name == "erase" and model.endswith("_negative") else 1
            extent = (0, top, len(shares) - 0.5, -0.5)
            image = axes.imshow(
                np.log10(shares + 1e-5), aspect="auto", extent=extent, vmin=-4, vmax=0
            )
            axes.set(title=f"{model}: {symbol}", ylabel="layer")
        figure.colorbar(image, ax=line, label="log10 of the share")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(run_command("language.py", lambda: main(sys.argv[1:])))
