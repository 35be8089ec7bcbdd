"""Evaluates a trained model: of a run, or a PyTorch checkpoint with its tokenizer.

    python experiments/evaluate.py runs/tiny --text book.txt --window 1024 4096 --stride 512

Task "perplexity" reads the files of --text in windows and prints perplexity, bits per byte and the loss
by the number of tokens read, also beyond the length of training. With --output all results are
appended to DIRECTORY/results.jsonl.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from gdn2_jax.command import require_positive, run_command

import tyro

from gdn2_jax.data import Tokenizer, load_tokenizer
from gdn2_jax.evaluation import LocalModel, on_local_devices, text_perplexity
from gdn2_jax.rows import Column, append_row, format_header, format_row
from gdn2_jax.training import CheckpointError
from gdn2_jax.training.weights import open_weights


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to evaluate, and on what."""

    model: Annotated[Path, tyro.conf.Positional] = Path("runs/tiny")
    """The directory of a run of train.py, one of its checkpoints, or a PyTorch checkpoint."""

    tasks: tuple[str, ...] = ("perplexity",)
    """Their names."""

    text: tuple[Path, ...] = ()
    """UTF-8 files for "perplexity", each a document."""

    window: tuple[int, ...] = ()
    """Tokens of the windows in which texts are read; by default the length of training. Several are
    evaluated one after the other."""

    stride: int | None = None
    """Tokens that each window scores; by default all, so that windows do not overlap."""

    batch_size: int = 8
    """Sequences at once on each device. Results do not depend on it."""

    tokenizer: str = ""
    """A tokenizer.json, if the checkpoint has none; "bytes" for a model of bytes."""

    first: str = ""
    """Name of the token before each text; by default the one that ends a document."""

    output: Path | None = None
    """Directory for results.jsonl and the figure."""

    def __post_init__(self):
        require_positive(self)


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
    for task in options.tasks:
        if task == "perplexity":
            evaluate_texts(options, evaluated)
        else:
            raise ValueError(f"tasks: expected perplexity, got {task}")
    return 0


def load(options: Options) -> Evaluated:
    """Reads the model."""
    weights = open_weights(options.model)
    tokenizer = load_tokenizer(options.tokenizer or weights.tokenizer, weights.end_of_document)
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
    texts = [path.read_text(encoding="utf-8-sig") for path in options.text]
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


if __name__ == "__main__":
    sys.exit(run_command("evaluate.py", main, Options, __doc__, keep_programs=True))
