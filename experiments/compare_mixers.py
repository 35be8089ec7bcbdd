"""Trains models of several mixers on the same data, in the same order, with the same budget.

    python experiments/compare_mixers.py                                  # 30M, every mixer
    python experiments/compare_mixers.py 30M --models gdn2 swa_gdn2 attention --seeds 0 1
    python experiments/compare_mixers.py tiny --models gdn2 kda --steps 100 --directory runs/quick

The first argument, if it is no option, is the scale: {scales}. --models are presets without their
scale; "swa_" makes a hybrid. All other options are those of train.py and hold for every model. What
is stopped or killed continues when started again; finished runs are not repeated. So a limit on time
is `timeout --signal TERM 400 python experiments/compare_mixers.py ...`: the run that it stops writes a
checkpoint and its line of the table. The vocabulary is the tokenizer's unless --model.vocab-size is given.

--directory gets a folder for each run. --results, the same folder unless given, gets results.jsonl (a
line for each run), curves.jsonl (every logged step), results.md and results.png, all renewed after
each run.
"""

import dataclasses
import json
import os
import re
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

from gdn2_jax.command import out_of_memory, read_options, run_command

import jax
import tyro
from tqdm import tqdm

from gdn2_jax.data import load_tokenizer, path_options, prepare
from gdn2_jax.models import SCALES, model_sizes
from gdn2_jax.parallel import make_mesh
from gdn2_jax.rows import markdown_table
from gdn2_jax.training import (
    PRESETS,
    CheckpointError,
    DivergenceError,
    Programs,
    StoppedError,
    TrainingConfig,
    check_mesh,
    is_finished,
    open_run,
    run_files,
    submit_programs,
    train,
    wait_for,
)
from gdn2_jax.training.flops import training_flops_per_token
from gdn2_jax.training.metrics import read_metrics

ALL = ("gdn2", "kda", "gdn", "deltanet", "mamba2", "mamba3", "mamba3_mimo", "attention")
COLUMNS = (
    *("run", "parameters", "state a layer", "cache a layer", "tokens", "training loss"),
    *("validation loss", "bits per byte", "tokens/s", "GFLOPs a token"),
)


def main(arguments: list[str]) -> int | str:
    """Returns the exit status, or a message for it to be 1."""
    try:
        runs, directory, results = parse(arguments)
        # Mesh and data are the same for every run, so they are checked once, before compiling.
        first = next(iter(runs.values()))
        check_mesh(first, make_mesh(first.mesh))
        print(prepare(first.data).description, flush=True)
    except (ValueError, OSError) as error:
        return f"compare_mixers.py: {error}"
    results.mkdir(parents=True, exist_ok=True)
    programs = compile_all(runs, directory)
    rows, curves, failed = [], [], []
    for number, (name, config) in enumerate(runs.items(), start=1):
        print(f"\n[{number}/{len(runs)}] {name}", flush=True)
        stopped = None
        if is_finished(config, directory / name):
            print(f"is finished in {directory / name}", flush=True)
        else:
            try:
                compiled = wait_for(programs.pop(name))
                train(open_run(config, directory / name), compiled)
            except StoppedError as error:
                stopped = error
            except (ValueError, OSError, CheckpointError) as error:
                return f"compare_mixers.py: {name}: {error}"
            except DivergenceError as error:
                print(f"{name}: {error}", flush=True)
            except jax.errors.JaxRuntimeError as error:
                print(f"{name}: {out_of_memory(error) or error}", flush=True)
                failed.append(name)
        metrics = read_metrics(run_files(directory / name).metrics)
        rows.append(summarize(name, config, metrics))
        curves += [{"run": name, **row} for row in metrics]
        write(results, rows, curves, arguments)
        if stopped:
            print(f"compare_mixers.py: {name}: {stopped}", file=sys.stderr)
            return 128 + stopped.signal
    print(f"\n{table(rows)}\n\nin {results}: results.jsonl, curves.jsonl, results.md, results.png")
    return f"compare_mixers.py: failed: {', '.join(failed)}" if failed else 0


def parse(arguments: list[str]) -> tuple[dict[str, TrainingConfig], Path, Path]:
    """Returns the runs by name, in order, their directory and that of the results."""
    scale, options = "30M", arguments
    if arguments and not arguments[0].startswith("-"):
        scale, *options = arguments
    if scale not in SCALES:
        raise ValueError(f"expected a scale, one of {', '.join(SCALES)}, got {scale!r}")
    preset = PRESETS[f"gdn2_{scale}"]
    if any(re.match(r"--model\.(mixer|mixer\.kind|hybrid)(=|$)", option) for option in options):
        raise ValueError("model.mixer, model.hybrid: expected no value, --models chooses them")

    def command(
        config: Annotated[TrainingConfig, tyro.conf.arg(name="")] = preset,
        models: tuple[str, ...] = ALL,
        seeds: tuple[int, ...] = (0,),
        directory: Path = Path("runs") / f"compare_{scale}",
        results: Path | None = None,
    ):
        """Pairs what the command line gives.

        Args:
          config: of every run, apart from the mixer.
          models: what to compare.
          seeds: each model is trained once with each.
          directory: where the runs go, each into a folder.
          results: where table, plot and metrics of all runs go; None for `directory`.
        """
        return config, models, seeds, directory, results or directory

    config, models, seeds, directory, results = read_options(
        command,
        path_options(options),
        prog=f"compare_mixers.py {scale}",
        description=__doc__.format(scales=", ".join(SCALES)),
    )
    # What was changed in the preset's model is changed in every model, and what was changed in its
    # mixer in every mixer of that class.
    changes, old = changed_fields(config.model, preset.model), preset.model
    parts = {
        name: changed_fields(changes.pop(name), getattr(old, name))
        for name in ("mixer", "attention")
        if name in changes
    }
    if not any(re.match("--model.vocab.size", option) for option in options):
        data = config.data
        changes["vocab_size"] = data.trained_vocab_size or (
            load_tokenizer(data.tokenizer, data.end_of_document).vocab_size
        )
    if not (models and seeds):
        raise ValueError("models, seeds: expected at least one of each")
    runs = {}
    for model in models:
        if f"{model}_{scale}" not in PRESETS:
            known = [name.removesuffix(f"_{scale}") for name in PRESETS if name.endswith(scale)]
            raise ValueError(f"models: expected some of {', '.join(known)}, got {model!r}")
        own = PRESETS[f"{model}_{scale}"].model
        same = {n: p for n, p in parts.items() if type(getattr(own, n)) is type(getattr(old, n))}
        replaced = {n: dataclasses.replace(getattr(own, n), **p) for n, p in same.items()}
        for seed in seeds:
            changed = dataclasses.replace(own, **changes, **replaced)
            runs[f"{model}-{seed}"] = dataclasses.replace(config, model=changed, seed=seed)
    return runs, directory, results


def changed_fields(new: Any, old: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from those of another."""
    return {name: value for name, value in vars(new).items() if value != getattr(old, name)}


def compile_all(runs: dict[str, TrainingConfig], directory: Path) -> dict[str, Programs]:
    """Compiles all that the unfinished runs need: traces one run at a time, compiles many at once.

    Returns:
      Done futures of the runs' programs. Speeds are measured after this, on an idle CPU.
    """
    unfinished = [name for name in runs if not is_finished(runs[name], directory / name)]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        programs = {
            name: submit_programs(runs[name], make_mesh(runs[name].mesh), pool)
            for name in tqdm(unfinished, "trace", unit="run", mininterval=1)
        }
        futures = jax.tree.leaves(programs)
        for _ in tqdm(as_completed(futures), "compile", len(futures), mininterval=1):
            pass
    finally:
        # Ctrl-C does not wait for compilations.
        pool.shutdown(wait=False, cancel_futures=True)
    return programs


def summarize(name: str, config: TrainingConfig, metrics: list[dict]) -> dict:
    """The run's line of results.jsonl."""
    logged = [row for row in metrics if "loss" in row]
    validated = [row for row in metrics if "validation_loss" in row]
    last = logged[-1] if logged else {"tokens": 0, "loss": None}
    sizes = model_sizes(config.model, config.data.sequence_length)
    return {
        "run": name,
        "mixer": config.model.mixer.kind,
        "hybrid": config.model.hybrid,
        "seed": config.seed,
        "tokens": last["tokens"],
        "finished": last["tokens"] == config.steps * config.tokens_per_step,
        "loss": last["loss"],
        "validation_loss": validated[-1]["validation_loss"] if validated else None,
        "bits_per_byte": validated[-1]["validation_bits_per_byte"] if validated else None,
        # The median leaves out steps that waited for an evaluation or a checkpoint.
        "tokens_per_second": statistics.median([row["tokens_per_second"] for row in logged] or [0]),
        **sizes._asdict(),
        "flops_per_token": training_flops_per_token(config.model, config.data.sequence_length),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def write(directory: Path, rows: list[dict], curves: list[dict], arguments: list[str]) -> None:
    """Writes the four files."""
    for name, lines in (("results", rows), ("curves", curves)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    command = shlex.join(["python", "experiments/compare_mixers.py", *arguments])
    devices = ", ".join(sorted({row["device"] for row in rows}))
    text = f"    {command}\n\non {devices}, JAX {jax.__version__}.\n\n{table(rows)}\n"
    (directory / "results.md").write_text(text)
    plot(rows, curves, directory / "results.png")


def table(rows: list[dict]) -> str:
    """The results in Markdown; a line for each run."""
    lines = []
    for row in rows:
        name = row["run"] if row["finished"] else f"{row['run']} (unfinished)"
        losses = [row[key] for key in ("loss", "validation_loss", "bits_per_byte")]
        lines.append(
            [
                name,
                f"{row['parameters']:,}",
                f"{row['state']:,}" if row["state"] else "-",
                f"{row['cache']:,}",
                f"{row['tokens']:,}",
                *("-" if loss is None else f"{loss:.4f}" for loss in losses),
                f"{row['tokens_per_second']:,.0f}",
                f"{row['flops_per_token'] / 1e9:.3g}",
            ]
        )
    return markdown_table(COLUMNS, lines)


def plot(rows: list[dict], curves: list[dict], path: Path) -> None:
    """Draws losses against tokens, and speed and memory of each run; a colour for each mixer."""
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 9), layout="constrained")
    (training, validation), (speed, memory) = figure.subplots(2, 2)
    names = [row["run"] for row in rows]
    mixers = {name: name.removeprefix("swa_").rpartition("-")[0] for name in names}
    colours = dict(zip(dict.fromkeys(mixers.values()), colormaps["tab10"].colors))
    per_step = {row["run"]: row["tokens"] / row["step"] for row in curves if "tokens" in row}
    panels = ((training, "loss", ""), (validation, "validation_bits_per_byte", "o"))
    for axes, key, marker in panels:
        for row in rows:
            own = [point for point in curves if point["run"] == row["run"] and key in point]
            # An evaluation need not fall on a logged step.
            xs = [point["step"] * per_step[row["run"]] for point in own]
            axes.plot(
                xs,
                [point[key] for point in own],
                label=row["run"],
                color=colours[mixers[row["run"]]],
                linestyle="--" if row["hybrid"] else "-",
                marker=marker,
                markersize=3,
                linewidth=1,
            )
        axes.set(xlabel="tokens")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3, which="both")
    training.set(ylabel="training loss, nats per token", yscale="log")
    training.yaxis.set_major_formatter("{x:.3g}")
    training.yaxis.set_minor_formatter("{x:.3g}")
    validation.set(ylabel="validation, bits per byte")
    figure.legend(*training.get_legend_handles_labels(), loc="outside right upper")
    panels = ((speed, "tokens_per_second"), (memory, "cache"))
    for axes, key in panels:
        for row in rows:
            colour = colours[mixers[row["run"]]]
            (bar,) = axes.barh(row["run"], row[key], color=colour)
            bar.set(hatch="//" if row["hybrid"] else None, edgecolor="white", linewidth=0)
            axes.annotate(f" {row[key]:,.0f}", (row[key], row["run"]), va="center", size="small")
        axes.invert_yaxis()
        axes.margins(x=0.35)
    speed.xaxis.set_major_formatter(EngFormatter())
    speed.set(xlabel="tokens per second")
    memory.set(xlabel="floats a layer of the mixer keeps in decoding", xscale="log")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(run_command("compare_mixers.py", lambda: main(sys.argv[1:]), keep_programs=True))
