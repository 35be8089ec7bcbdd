"""Draws the figures and tables of the recall studies from their rows.

    python experiments/report.py                                    # experiments/results/recall
    python experiments/report.py experiments/results/recall out     # with the rows of another folder

Reads STUDY.jsonl of every folder named, the first of which gets README.md and a figure for each study. Rows
of one run are merged: the finished one counts, or else the longest. An accuracy is the mean over seeds
of the last window at the learning rate with the best mean; in brackets is the range over seeds.
"""

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path

from recall import MIXERS, RESULTS, read_rows, read_study

KIND_NAMES = {"all": "accuracy"}


def main(folders: list[Path]) -> None:
    """Writes the page and its figures into the first folder."""
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"report.py: expected a folder of rows, got {folder}")
    names = sorted({path.stem for folder in folders for path in folder.glob("*.jsonl")})
    page = ["# Recall experiments", "", __doc__.split("\n\n")[-1].strip(), ""]
    for name in names:
        rows = read_rows(*(folder / f"{name}.jsonl" for folder in folders))
        figure = folders[0] / f"{name}.png"
        plot(name, rows, figure)
        page += section(name, rows, figure.name)
    (folders[0] / "README.md").write_text("\n".join(page).rstrip() + "\n")
    print(f"wrote {folders[0] / 'README.md'} and {len(names)} figures")


def section(name: str, rows: list[dict], figure: str) -> list[str]:
    """A study in Markdown."""
    finished = [row for row in rows if row["finished"]]
    # A cell's runs share its seconds.
    seconds = sum(row["seconds"] / row["runs_at_once"] for row in rows)
    waited = sum(row["waited_seconds"] / row["runs_at_once"] for row in rows)
    devices = ", ".join(sorted({row["device"] for row in rows}))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    cost = (
        f"{len(finished)} finished runs and {len(rows) - len(finished)} unfinished ones; "
        f"{seconds / 60:.1f} minutes of {devices}, {waited / 60:.1f} more of waiting for the "
        f"compiler; commit {commits}; rows in `{name}.jsonl`."
    )
    shows = read_study(name).shows
    return [
        f"## {name}",
        "",
        *([shows, ""] if shows else []),
        f"    python experiments/recall.py {name}",
        "",
        cost,
        "",
        f"![Accuracies of {name}]({figure})",
        "",
        *best_table(rows),
        "",
        *test_table(rows),
        "<details><summary>every learning rate</summary>",
        "",
        *grid_table(rows),
        "",
        "</details>",
        "",
    ]


def groups(rows: list[dict]) -> dict[tuple, dict[str, dict[float, list[dict]]]]:
    """Rows by size, then mixer, then learning rate; sizes and mixers in order."""
    found: dict[tuple, dict] = {}
    order = list(MIXERS)

    def place(row):
        return (*size(row), order.index(row["mixer"]), row["learning_rate"], row["seed"])

    for row in sorted(rows, key=place):
        mixers = found.setdefault(size(row), {})
        mixers.setdefault(row["mixer"], {}).setdefault(row["learning_rate"], []).append(row)
    return found


def size(row: dict) -> tuple:
    """What tells the panels of a study apart: steps, length, and the sizes that the study varies."""
    return (row["length"], *map(str, row["size"].values()), row["all_steps"])


def size_name(row: dict) -> str:
    """The same for people."""
    return ", ".join([f"{row['length']} tokens", *(f"{k} {v}" for k, v in row["size"].items())])


def best(rates: dict[float, list[dict]]) -> list[dict]:
    """The seeds of the learning rate with the highest mean, among those with the most seeds."""
    most = max(map(len, rates.values()))
    return max((rows for rows in rates.values() if len(rows) == most), key=mean_accuracy)


def mean_accuracy(rows: Iterable[dict]) -> float:
    """Over runs."""
    return statistics.mean(row["accuracy"] for row in rows)


def with_range(values: list[float], form: str = "{:.3f}") -> str:
    """Mean and range."""
    if not values:
        return "-"
    low, mean, high = (form.format(f(values)) for f in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def best_table(rows: list[dict]) -> list[str]:
    """A line for each mixer and size, at its best learning rate."""
    kinds = list(rows[0]["accuracy_by_kind"])
    names = [KIND_NAMES.get(kind, kind) for kind in kinds]
    columns = ["size", "mixer", *names, "steps to 90 %", "steps", "rate", "seeds", "M tokens/s"]
    lines = [columns, ["---"] * len(columns)]
    for mixers in groups(rows).values():
        for mixer, rates in mixers.items():
            runs = best(rates)
            passed = [row["steps_to_90"] for row in runs if row["steps_to_90"]]
            steps = with_range(passed, "{:.0f}")
            if passed and len(passed) < len(runs):
                steps += f", {len(passed)} of {len(runs)} seeds"
            unfinished = "" if all(row["finished"] for row in runs) else " (unfinished)"
            lines.append(
                [
                    size_name(runs[0]),
                    mixer + unfinished,
                    *(
                        with_range([row["accuracy_by_kind"][kind] for row in runs])
                        for kind in kinds
                    ),
                    steps,
                    with_range([row["steps"] for row in runs], "{:.0f}"),
                    f"{runs[0]['learning_rate']:g}",
                    str(len(runs)),
                    f"{statistics.mean(row['tokens_per_second'] for row in runs) / 1e6:.2f}",
                ]
            )
    return [f"| {' | '.join(line)} |" for line in lines]


def test_table(rows: list[dict]) -> list[str]:
    """A line for each mixer and size: all questions right on longer sequences."""
    multiples = sorted({int(multiple) for row in rows for multiple in row["test"]})
    if not multiples:
        return []
    columns = ["all right at", "mixer", *(f"{multiple}x" for multiple in multiples)]
    lines = [columns, ["---"] * len(columns)]
    for mixers in groups(rows).values():
        for mixer, rates in mixers.items():
            runs = [row for row in best(rates) if row["test"]]
            if runs:
                exact = ([row["test"][str(m)]["exact"] for row in runs] for m in multiples)
                lines.append([size_name(runs[0]), mixer, *map(with_range, exact)])
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def grid_table(rows: list[dict]) -> list[str]:
    """A line for each mixer and size, a column for each learning rate."""
    all_rates = sorted({row["learning_rate"] for row in rows})
    columns = ["size", "mixer", *(f"{rate:g}" for rate in all_rates)]
    lines = [columns, ["---"] * len(columns)]
    for mixers in groups(rows).values():
        for mixer, rates in mixers.items():
            accuracies = ([row["accuracy"] for row in rates.get(rate, [])] for rate in all_rates)
            name = size_name(next(iter(rates.values()))[0])
            lines.append([name, mixer, *map(with_range, accuracies)])
    return [f"| {' | '.join(line)} |" for line in lines]


def plot(name: str, rows: list[dict], path: Path) -> None:
    """Accuracy against steps, a panel for each size and kind: mean and range over seeds."""
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = dict(zip(MIXERS, colormaps["tab20"].colors))
    kinds, found = list(rows[0]["accuracy_by_kind"]), groups(rows)
    shape = (len(kinds), len(found))
    figure = Figure(figsize=(1 + 3.6 * shape[1], 0.6 + 3 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharey=True)
    lines = {}
    for column, mixers in enumerate(found.values()):
        for mixer, rates in mixers.items():
            runs = best(rates)
            length = max(len(row["curve"]) for row in runs)
            for number, kind in enumerate(kinds):
                axes = panels[number][column]
                # A run that had solved the task stays where it stopped.
                curves = [
                    [point[number] for point in row["curve"]]
                    + [row["curve"][-1][number]] * (length - len(row["curve"]))
                    for row in runs
                ]
                steps = [(i + 1) * runs[0]["window"] for i in range(length)]
                points = list(zip(*curves))
                (line,) = axes.plot(steps, [*map(statistics.mean, points)], color=colours[mixer])
                low, high = [*map(min, points)], [*map(max, points)]
                axes.fill_between(steps, low, high, color=colours[mixer], alpha=0.2, linewidth=0)
                lines[mixer] = line
                axes.set(title=f"{name}, {size_name(runs[0])}", xlabel="steps", ylim=(-0.02, 1.02))
                axes.grid(alpha=0.3)
                if column == 0:
                    axes.set(ylabel=f"{KIND_NAMES.get(kind, kind)} on fresh batches")
    figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[RESULTS])
    main(parser.parse_args().folders)
