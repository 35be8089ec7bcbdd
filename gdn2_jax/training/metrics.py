"""The record of a run: metrics.jsonl, TensorBoard and a plot."""

import contextlib
import json
import time
from pathlib import Path

import jax
import numpy as np
import tensorboardX.summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from gdn2_jax.files import naming, write_text
from gdn2_jax.rows import read_rows

# Of a curve of losses; more rows are averaged.
_POINTS = 300


class MetricsLog:
    """Appends rows to a .jsonl file and to TensorBoard's.

    Opened for a run that goes on from `step`, it first drops the rows of later steps, which the
    run will write again, and lines that are damaged, such as a last one that a killed run left
    incomplete. Of several processes only the first writes.

    Raises:
      OSError: a file cannot be written; so does every method.
    """

    def __init__(self, path: Path, tensorboard_directory: Path, step: int):
        self._path = path if jax.process_index() == 0 else None
        if self._path:
            rows = [row for row in read_metrics(path) if row["step"] <= step]
            # Replaced as a whole: a run killed here has either the old file or the new one.
            write_text(path, "".join(map(_line, rows)))
            # SummaryWriter writes in a thread, which ends without a word when the disk is full; what
            # is then handed to it waits for ever.
            tensorboard_directory.mkdir(exist_ok=True)
            self._tensorboard = EventsWriter(str(tensorboard_directory / "events"))
            # TensorBoard hides what it has of this step and later ones.
            start = SessionLog(status=SessionLog.START)
            self._tensorboard.write_event(Event(step=step + 1, session_log=start))
            self._tensorboard.flush()

    def write(self, row: dict[str, float]) -> None:
        """Writes a row, which has its "step"; in the files it is when this returns."""
        if not self._path:
            return
        with naming(f"{self._path} or TensorBoard's beside it"):
            with self._path.open("a") as file:
                file.write(_line(row))
            now = time.time()
            for name, value in row.items():
                if name not in ("step", "time"):
                    scalar = tensorboardX.summary.scalar(name, value)
                    event = Event(wall_time=now, step=row["step"], summary=scalar)
                    self._tensorboard.write_event(event)
            self._tensorboard.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._path:
            # What a full disk did not take is tried again, and told before.
            with contextlib.suppress(OSError):
                self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics file, see `read_rows`."""
    return read_rows(path, number="step")


def plot_losses(
    rows: list[dict[str, float]], path: Path, *, title: str = "", tokens_per_step: int | None = None
) -> None:
    """Draws training and validation loss over steps into a .png, and a .pdf beside it.

    Args:
      rows: of a metrics file. Of the training loss, means over intervals are drawn: "mean_loss"
        where it is, and of many rows the means of neighbours.
      path: of the .png.
      title: of the plot.
      tokens_per_step: for an axis of tokens.
    """
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    losses = [(row["step"], row.get("mean_loss", row["loss"])) for row in rows if "loss" in row]
    validations = [
        (row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row
    ]
    if losses:
        parts = np.array_split(np.array(losses), min(len(losses), _POINTS))
        axes.plot(*zip(*(part.mean(axis=0) for part in parts)), label="loss")
    if validations:
        axes.plot(*zip(*validations), "o-", label="validation loss")
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    if losses or validations:
        axes.legend()
    if tokens_per_step:
        scale = (lambda step: step * tokens_per_step, lambda tokens: tokens / tokens_per_step)
        top = axes.secondary_xaxis("top", functions=scale)
        top.set_xlabel("tokens")
        top.xaxis.set_major_formatter(EngFormatter())
    for file in (path, path.with_suffix(".pdf")):
        figure.savefig(file, dpi=150)


def _line(row: dict[str, float]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
