"""The record of a run: metrics.jsonl, TensorBoard and a plot."""

import json
import os
from pathlib import Path

import jax
import tensorboardX


class MetricsLog:
    """Appends rows to a .jsonl file and to TensorBoard's.

    Opened for a run that goes on from `step`, it first drops the rows of later steps, which the
    run will write again, and a last line that a killed run left incomplete. Of several processes
    only the first writes.
    """

    def __init__(self, path: Path, tensorboard_directory: Path, step: int):
        self._path = path if jax.process_index() == 0 else None
        if self._path:
            rows = [row for row in read_metrics(path) if row["step"] <= step]
            # Replaced as a whole: a run killed here has either the old file or the new one.
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(map(_line, rows)))
            os.replace(temporary, path)
        self._tensorboard = tensorboardX.SummaryWriter(
            str(tensorboard_directory), purge_step=step + 1, write_to_disk=self._path is not None
        )

    def write(self, row: dict[str, float]) -> None:
        """Writes a row, which has its "step"; in the .jsonl file it is when this returns."""
        if self._path:
            with self._path.open("a") as file:
                file.write(_line(row))
        for name, value in row.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what TensorBoard has not yet."""
        self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the complete rows of a metrics file, none if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def plot_losses(rows: list[dict[str, float]], path: Path) -> None:
    """Draws training and validation loss over steps into a .png."""
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points), style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _line(row: dict[str, float]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
