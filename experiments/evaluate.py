"""Evaluates a trained model: of a run, or a PyTorch checkpoint with its tokenizer.

    python experiments/evaluate.py runs/tiny --text book.txt --window 1024 4096 --stride 512
    python experiments/evaluate.py runs/tiny --tasks niah_single_1 --lengths 1024 2048 --limit 100
    python experiments/evaluate.py checkpoint --tasks table2 table3 table4 --download True --output out
    python experiments/evaluate.py runs/tiny --tasks my_task --task-folder my_tasks

Task "perplexity" reads the files of --text in windows and prints perplexity, bits per byte and the loss
by the number of tokens read, also beyond the length of training. niah_single_1, niah_single_2,
niah_single_3 and niah_multikey_1 are RULER's needles in a haystack, made here. All other names are tasks
of lm-evaluation-harness. table2, table3 and table4 stand for those of the paper's tables. With --output
all results are appended to DIRECTORY/results.jsonl. Exit status 3: the data of some task were missing.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from gdn2_jax.command import require_positive, run_command

import tyro

from gdn2_jax.data import Tokenizer, load_tokenizer
from gdn2_jax.evaluation import LocalModel, on_local_devices, text_perplexity
from gdn2_jax.evaluation.needles import NEEDLE_TASKS, evaluate_needles
from gdn2_jax.evaluation.tables import TABLES, table_row, table_tasks
from gdn2_jax.rows import Column, append_row, format_header, format_row, markdown_table
from gdn2_jax.training import CheckpointError
from gdn2_jax.training.weights import open_weights


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to evaluate, and on what."""

    model: Annotated[Path, tyro.conf.Positional] = Path("runs/tiny")
    """The directory of a run of train.py, one of its checkpoints, or a PyTorch checkpoint."""

    tasks: tuple[str, ...] = ("perplexity",)
    """Their names: perplexity, niah_..., tasks of lm-evaluation-harness, table2, table3, table4."""

    text: tuple[Path, ...] = ()
    """UTF-8 files for "perplexity", each a document."""

    window: tuple[int, ...] = ()
    """Tokens of the windows in which texts are read; by default the length of training. Several are
    evaluated one after the other."""

    stride: int | None = None
    """Tokens that each window scores; by default all, so that windows do not overlap."""

    batch_size: int = 8
    """Sequences at once on each device. Results do not depend on it."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens of needle tasks, the question and the answer included."""

    essays: Path | None = None
    """The text in which needles stand; Python's documentation by default."""

    limit: int | None = None
    """Examples of each task at most; by default 500 of needle tasks, and all of others."""

    max_length: int | None = None
    """Tokens that the model reads in tasks of the harness; by default the length of training."""

    fewshot: int | None = None
    """Examples before each question in tasks of the harness, instead of each task's own number."""

    task_folder: Path | None = None
    """YAML files of tasks for the harness."""

    data_folder: Path | None = None
    """Copies of data sets by their names, as FOLDER/allenai/ai2_arc; the harness reads them first."""

    download: bool = False
    """Fetch data sets that are not on this disk."""

    tokenizer: str = ""
    """A tokenizer.json, if the checkpoint has none; "bytes" for a model of bytes."""

    first: str = ""
    """Name of the token before each text; by default the one that ends a document."""

    output: Path | None = None
    """Directory for results.jsonl and the figure."""

    def __post_init__(self):
        require_positive(self, fewshot=0)


class Evaluated(NamedTuple):
    """What is evaluated.

    Attributes:
      model: on all local devices.
      tokenizer: of the model.
      first: token before each text.
      length: tokens of a sequence in training.
    """

    model: LocalModel
    tokenizer: Tokenizer
    first: int
    length: int


def main(options: Options) -> int | str:
    """Returns the exit status, or a message for it to be 1."""
    if "perplexity" in options.tasks and not options.text:
        raise ValueError("text: expected files for task perplexity, got none")
    try:
        evaluated = load(options)
    except CheckpointError as error:
        return f"evaluate.py: {error}"
    harness_tasks, tables = [], []
    for task in options.tasks:
        if task == "perplexity":
            evaluate_texts(options, evaluated)
        elif task in NEEDLE_TASKS:
            find_needles(options, evaluated, [task])
        elif task == "table3":
            find_needles(options, evaluated, list(NEEDLE_TASKS))
        elif task in TABLES:
            tables.append(task)
            harness_tasks += table_tasks(task, evaluated.tokenizer)
        else:
            harness_tasks.append(task)
    return run_harness(options, evaluated, harness_tasks, tables) if harness_tasks else 0


def load(options: Options) -> Evaluated:
    """Reads the model."""
    weights = open_weights(options.model)
    tokenizer = load_tokenizer(options.tokenizer or weights.tokenizer, weights.end_of_document)
    of_bytes = weights.model.vocab_size == tokenizer.vocab_size
    if not (options.tokenizer or weights.training or weights.tokenizer != "bytes" or of_bytes):
        raise ValueError(
            f"tokenizer: expected one for the {weights.model.vocab_size} ids of {options.model}, "
            f"which has no tokenizer.json, got none"
        )
    if tokenizer.vocab_size > weights.model.vocab_size:
        raise ValueError(
            f"tokenizer: expected one of at most the model's {weights.model.vocab_size} ids, "
            f"got {tokenizer.vocab_size}"
        )
    first = tokenizer.end_of_document
    if options.first:
        ids = tokenizer.encode(options.first, special_tokens=True)
        if len(ids) != 1:
            raise ValueError(f"first: expected the name of one token, got {options.first!r}")
        first = int(ids[0])
    training = weights.training
    length = training.data.sequence_length if training else weights.model.context_length
    return Evaluated(on_local_devices(weights.model, weights.load()), tokenizer, first, length)


PERPLEXITY = (
    Column("window", "window"),
    Column("stride", "stride"),
    Column("tokens", "tokens", ",", 12),
    Column("loss", "loss", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("bits per byte", "bits_per_byte", ".4f"),
    Column("word perplexity", "word_perplexity", ".4g"),
)
POSITIONS = (
    Column("tokens read", "read", ",", 12),
    Column("loss", "loss", ".4f"),
    Column("tokens", "count", ",", 12),
)


def evaluate_texts(options: Options, evaluated: Evaluated) -> None:
    """Prints the perplexity of the texts for each window."""
    texts = [read_text("text", path) for path in options.text]
    if not any(texts):
        files = ", ".join(map(str, options.text))
        raise ValueError(f"text: expected files with a text, got the empty {files}")
    rows = []
    for window in options.window or (evaluated.length,):
        result = text_perplexity(
            evaluated.model,
            evaluated.tokenizer,
            texts,
            length=window,
            stride=options.stride,
            batch_size=options.batch_size,
            first=evaluated.first,
            progress=f"window {window}",
        )
        row: dict[str, Any] = {"task": "perplexity", "model": str(options.model)}
        row |= {"texts": [str(path) for path in options.text], "window": window}
        row |= {"stride": options.stride or window, **result.total._asdict()}
        row |= {"word_perplexity": result.word_perplexity, "read": result.ends}
        row |= {"losses": result.losses, "counts": result.counts}
        rows.append(row)
        print(f"{format_header(PERPLEXITY)}\n{format_row(PERPLEXITY, row)}")
        print(f"\n{format_header(POSITIONS)}")
        for read, loss, count in zip(result.ends, result.losses, result.counts, strict=True):
            print(format_row(POSITIONS, {"read": read, "loss": loss, "count": count}))
        print(flush=True)
        if options.output:
            append_row(options.output / "results.jsonl", row)
    if options.output:
        draw_losses(rows, evaluated.length, options.output / "loss_by_tokens_read.png")


def read_text(name: str, path: Path) -> str:
    """The text of a file; raises a ValueError that names the option if it is not UTF-8."""
    try:
        # As in training, line breaks stay what they are.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, got {path} ({error})") from error


def draw_losses(rows: list[dict[str, Any]], length: int, path: Path) -> None:
    """Draws the loss against the tokens read, a line for each window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(row["read"], row["losses"], marker=".", label=f"window {row['window']}")
    axes.axvline(length, color="grey", linestyle=":", label="length of training")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens read", ylabel="loss (nats)")
    axes.legend()
    figure.savefig(path, dpi=150)


def find_needles(options: Options, evaluated: Evaluated, tasks: list[str]) -> None:
    """Prints the share of needles found, in percent, by task and length."""
    essays = read_text("essays", options.essays) if options.essays else ""
    if options.essays and not essays.strip():
        raise ValueError(f"essays: expected a text, got the empty {options.essays}")
    table = []
    for name in tasks:
        cells = []
        for length in options.lengths:
            result = evaluate_needles(
                evaluated.model,
                evaluated.tokenizer,
                NEEDLE_TASKS[name],
                length=length,
                samples=options.limit or 500,
                batch_size=options.batch_size,
                first=evaluated.first,
                essays=essays,
                progress=f"{name} {length}",
            )
            tokens = [example.tokens for example in result.examples]
            row = {"task": name, "model": str(options.model), "length": length}
            row |= {"score": result.score, "samples": len(tokens)}
            row |= {"prompt_tokens": [min(tokens), sum(tokens) / len(tokens), max(tokens)]}
            row |= {"essays": str(options.essays or "the documentation of Python")}
            if options.output:
                append_row(options.output / "results.jsonl", row)
                for example, output in zip(result.examples, result.outputs, strict=True):
                    append_row(
                        options.output / f"{name}_{length}.jsonl",
                        {**example._asdict(), "output": output},
                    )
            cells.append(f"{100 * result.score:.1f}")
        table.append([name, *cells])
    print(markdown_table(["task", *map(str, options.lengths)], table), flush=True)


def run_harness(
    options: Options, evaluated: Evaluated, tasks: list[str | dict], tables: list[str]
) -> int:
    """Prints the harness' table of its tasks, and the paper's tables; 3 if data are missing."""
    # Without a network each missing data set would cost many attempts to fetch it.
    os.environ["HF_HUB_OFFLINE"] = str(int(not options.download))
    from lm_eval.utils import make_table

    from gdn2_jax.evaluation.harness import HarnessModel, run_tasks

    model = HarnessModel(
        evaluated.model,
        evaluated.tokenizer,
        max_length=options.max_length or evaluated.length,
        batch_size=options.batch_size,
        first=evaluated.first,
    )
    missing = {}
    results = run_tasks(
        model,
        tasks,
        folder=options.task_folder,
        data_folder=options.data_folder,
        fewshot=options.fewshot,
        limit=options.limit,
        missing=missing.__setitem__,
    )
    if results is not None:
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
        for name, metrics in results["results"].items():
            row = {"task": name, "model": str(options.model), "max_length": model.max_length}
            row |= {"metrics": metrics, "shots": results["n-shot"].get(name)}
            row |= {"samples": results["n-samples"].get(name)}
            if options.output:
                append_row(
                    options.output / "results.jsonl", json.loads(json.dumps(row, default=str))
                )
    for table in tables:
        header = [column.name for column in TABLES[table]]
        values = table_row(table, results["results"] if results else {})
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        print(f"{table}\n{markdown_table([*header, 'Avg'], [cells])}\n")
    for name, reason in missing.items():
        print(f"{name}: no data ({reason})", file=sys.stderr)
    if missing:
        print(
            "These data sets are not on this disk. --download True fetches them to "
            "~/.cache/huggingface, which another machine can be given. Or --data-folder FOLDER "
            "names a folder with copies, such as FOLDER/allenai/ai2_arc.",
            file=sys.stderr,
        )
    return 3 if missing else 0


if __name__ == "__main__":
    sys.exit(run_command("evaluate.py", main, Options, __doc__, keep_programs=True))
