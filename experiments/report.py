"""Draws the figures and tables of the recall studies from their rows.

    python experiments/report.py                                    # experiments/results/recall
    python experiments/report.py experiments/results/recall out     # with the rows of another folder

Reads STUDY.jsonl of every folder named, the first of which gets README.md, a figure for each study and
summary.png. Rows of one run are merged: the finished one counts, or else the longest.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from recall import MIXERS, RESULTS, merged_rows, read_study
from scipy.stats import mannwhitneyu

from gdn2_jax.rows import markdown_table

KIND_NAMES = {"all": "accuracy"}
INTRO = """\
# Recall experiments

Models of two layers, equal in parameters (within 2 %) and in state, learn tasks whose answer lies in the
sequence. `python experiments/recall.py STUDY` makes the rows, `python experiments/report.py` this page. A study is a
file in `experiments/recall`: it names the task, the sizes, the learning rates and the seeds.

How to read the tables:

- No batch is seen twice. So an accuracy is that of the last window of training batches (100 steps), each measured
  before its own update. "All right" is the share of sequences whose every answer is right.
- A mixer is judged at its best learning rate, the one with the highest mean over the seeds. All learning rates are
  listed below each table.
- Numbers are means over the seeds. Brackets hold the range over the seeds.
"""
SUMMARY = """\
![Summary of all tasks](summary.png)

A panel is a task, a line is a mixer at its best learning rate: mean and range over the seeds.
"""
CLAIMS_INTRO = """\
## Claims

A comparison is held where one mixer's seeds are better than the other's by the exact Mann-Whitney test (one-sided, at
most 5 %; with three seeds each this asks that all are better than all), and not held where they are worse by the same
test. ">=" asks only that the mean is not worse by more than 0.01 or 100 steps. A claim is held if all its comparisons
are, and not held if one is not. All else is undecided, and so are fewer than three seeds.
"""


class Comparison(NamedTuple):
    """That one mixer does better than another, or not worse.

    Attributes:
      metric: key of `METRICS`.
      first: the mixer that is said to be better.
      relation: ">" or, for not worse, ">=".
      second: the other mixer.
    """

    metric: str
    first: str
    relation: str
    second: str


class Metric(NamedTuple):
    """A number of a row, the larger the better, and the largest difference that counts as none."""

    value: Callable[[dict], float]
    tolerance: float
    form: Callable[[float], str] = "{:.3f}".format


NEVER = float("inf")


def steps(row: dict) -> float:
    """Minus the steps to 90 %."""
    return -(row["steps_to_90"] or NEVER)


def beyond(row: dict) -> float:
    """All right on sequences longer than those of the training, mean over the lengths."""
    return statistics.mean(test["exact"] for m, test in row["test"].items() if int(m) > 1)


METRICS = {
    "accuracy": Metric(lambda row: row["accuracy"], 0.01),
    "updated": Metric(lambda row: row["accuracy_by_kind"]["updated"], 0.01),
    "untouched": Metric(lambda row: row["accuracy_by_kind"]["untouched"], 0.01),
    "steps to 90 %": Metric(steps, 100, lambda x: "never" if x == -NEVER else f"{-x:.0f}"),
    "all right beyond the training length": Metric(beyond, 0.01),
}


class Claim(NamedTuple):
    """What has to hold at every size of a study.

    Attributes:
      text: of the claim.
      study: that tests it.
      comparisons: all of them have to hold.
      size: of the rows that count, fields of `row["size"]`.
    """

    text: str
    study: str
    comparisons: list[Comparison]
    size: Mapping[str, str] = MappingProxyType({})


BEYOND = "all right beyond the training length"
CLAIMS = [
    Claim(
        "(a) GDN-2 needs no more steps than KDA, and KDA fewer than GDN (at 1,024 tokens)",
        "mqar",
        [
            Comparison("steps to 90 %", "gdn2", ">=", "kda"),
            Comparison("steps to 90 %", "kda", ">", "gdn"),
        ],
    ),
    *(
        Claim(
            f"(b) GDN-2 ends above KDA ({where})",
            study,
            [Comparison("accuracy", "gdn2", ">", "kda")],
        )
        for study, where in (
            ("mqar", "at 2,048 tokens"),
            ("capacity_gates", "and at the limit of capacity"),
        )
    ),
    *(
        Claim(text, "capacity_gates", [Comparison("accuracy", x, ">", y) for x, y in pairs])
        for text, *pairs in (
            (
                "(b) GDN-2 ends above KDA with the same output gate",
                ("gdn2", "kda_silu"),
                ("gdn2_sigmoid", "kda"),
            ),
            (
                "a sigmoid as output gate beats SiLU",
                ("kda", "kda_silu"),
                ("gdn2_sigmoid", "gdn2"),
            ),
            (
                "one number a head is better as the mean of many gates (GDN-2, tied) than as one gate (KDA)",
                ("gdn2_tied", "kda_silu"),
                ("gdn2_tied_sigmoid", "kda"),
            ),
            (
                "two numbers a head, to erase and to write, beat one for both",
                ("gdn2_scalar_both", "gdn2_tied"),
                ("gdn2_scalar_both_sigmoid", "gdn2_tied_sigmoid"),
            ),
            (
                "a number for each channel beats one a head",
                ("gdn2", "gdn2_scalar_both"),
                ("gdn2_sigmoid", "gdn2_scalar_both_sigmoid"),
            ),
        )
    ),
    *(
        Claim(
            "(c) GDN-2 beats KDA on updated keys and loses no untouched ones",
            study,
            [
                Comparison("updated", "gdn2", ">", "kda"),
                Comparison("untouched", "gdn2", ">=", "kda"),
            ],
        )
        for study in ("reassigned", "reassigned_capacity")
    ),
    Claim(
        "(d) beyond the training length GDN-2 > KDA > GDN > Mamba-2",
        "niah_multikey_1",
        [
            Comparison(BEYOND, first, ">", second)
            for first, second in (("gdn2", "kda"), ("kda", "gdn"), ("gdn", "mamba2"))
        ],
    ),
    *(
        Claim(
            "(e) b per channel alone helps more than w per channel alone, both are best",
            study,
            [
                Comparison(metric, first, ">", second)
                for first, second in (
                    ("gdn2_scalar_write", "gdn2_scalar_erase"),
                    ("gdn2", "gdn2_scalar_write"),
                    ("gdn2", "gdn2_scalar_erase"),
                )
            ],
        )
        for study, metric in (
            ("mqar", "accuracy"),
            ("reassigned", "accuracy"),
            ("reassigned_capacity", "accuracy"),
            ("capacity_gates", "accuracy"),
            ("niah_multikey_1", BEYOND),
        )
    ),
    Claim(
        "(f) parity needs negative eigenvalues",
        "state_tracking",
        [
            Comparison("accuracy", f"{mixer}_negative", ">", mixer)
            for mixer in ("gdn2", "kda", "gdn", "deltanet")
        ],
        {"group": "parity"},
    ),
]


def main(folders: list[Path]) -> None:
    """Writes the page and its figures into the first folder."""
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"report.py: expected a folder of rows, got {folder}")
    names = sorted({path.stem for folder in folders for path in folder.glob("*.jsonl")})
    studies = {
        name: merged_rows(*(folder / f"{name}.jsonl" for folder in folders)) for name in names
    }
    sections = []
    for name, rows in studies.items():
        figure = folders[0] / f"{name}.png"
        plot(name, rows, figure)
        sections += section(name, rows, figure.name)
    page = [INTRO]
    # Calibrations test no claim.
    if studies := {n: rows for n, rows in studies.items() if read_study(n).in_summary}:
        plot_summary(studies, folders[0] / "summary.png")
        page += [SUMMARY, CLAIMS_INTRO, *claims_table(studies), ""]
    else:
        page += ["No study has rows yet but calibrations: all claims are undecided.", ""]
    page += sections
    (folders[0] / "README.md").write_text("\n".join(page).rstrip() + "\n")
    print(f"wrote {folders[0] / 'README.md'} and its figures")


def claims_table(studies: dict[str, list[dict]]) -> list[str]:
    """A line for each claim and size."""
    lines = []
    for claim in CLAIMS:
        rows = [
            row
            for row in studies.get(claim.study, [])
            if row["finished"] and claim.size.items() <= row["size"].items()
        ]
        for mixers in groups(rows).values():
            judged = [
                judge(mixers, c) for c in claim.comparisons if {c.first, c.second} <= {*mixers}
            ]
            if not judged:
                continue
            verdicts = {verdict for verdict, _ in judged}
            total = (
                "held"
                if verdicts == {"held"} and len(judged) == len(claim.comparisons)
                else "undecided"
            )
            total = "not held" if "not held" in verdicts else total
            ((row, *_), *_), *_ = (rates.values() for rates in mixers.values())
            figures = "; ".join(text for _, text in judged)
            lines.append([claim.text, f"{claim.study}, {size_name(row)}", f"**{total}**", figures])
    return markdown_table(("claim", "where", "verdict", "figures"), lines).splitlines()


def judge(mixers: dict, comparison: Comparison) -> tuple[str, str]:
    """The verdict on a comparison, and its figures."""
    value, tolerance, form = METRICS[comparison.metric]
    first, second = (
        [*map(value, best(mixers[mixer], value))] for mixer in (comparison.first, comparison.second)
    )
    better, worse = (
        mannwhitneyu(first, second, alternative=side, method="exact").pvalue < 0.0501
        for side in ("greater", "less")
    )
    if comparison.relation == ">=":
        close = statistics.mean(first) + tolerance >= statistics.mean(second)
        better = max(first) > -NEVER and close
    verdict = "held" if better else "not held" if worse else "undecided"
    if min(len(first), len(second)) < 3:
        verdict = "undecided"
    figures = (
        f"{comparison.metric}: {comparison.first} {with_range(first, form)} "
        f"{comparison.relation} {comparison.second} {with_range(second, form)} ({verdict})"
    )
    return verdict, figures


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
    """The steps, length and varied sizes, by which a study's panels differ."""
    return (row["length"], *row["size"].values(), row["all_steps"])


def size_name(row: dict) -> str:
    """The same for people."""
    return ", ".join([f"{row['length']} tokens", *(f"{k} {v}" for k, v in row["size"].items())])


def accuracy(row: dict) -> float:
    """Of a run."""
    return row["accuracy"]


def best(rates: dict[float, list[dict]], value: Callable[[dict], float] = accuracy) -> list[dict]:
    """The seeds of the learning rate with the highest mean, among those with the most seeds."""
    most = max(map(len, rates.values()))
    of_most = (rows for rows in rates.values() if len(rows) == most)
    # The accuracy decides between rates that are equal otherwise.
    return max(of_most, key=lambda rows: [statistics.mean(map(f, rows)) for f in (value, accuracy)])


def with_range(values: list[float], form: Callable[[float], str] = "{:.3f}".format) -> str:
    """Mean and range."""
    if not values:
        return "-"
    low, mean, high = (form(f(values)) for f in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def best_table(rows: list[dict]) -> list[str]:
    """A line for each mixer and size, at its best learning rate."""
    kinds = list(rows[0]["accuracy_by_kind"])
    names = [KIND_NAMES.get(kind, kind) for kind in kinds]
    columns = ["size", "mixer", *names, "steps to 90 %", "steps", "rate", "seeds", "M tokens/s"]
    lines = []
    for mixers in groups(rows).values():
        for mixer, rates in mixers.items():
            runs = best(rates)
            passed = [row["steps_to_90"] for row in runs if row["steps_to_90"]]
            steps = with_range(passed, "{:.0f}".format)
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
                    with_range([row["steps"] for row in runs], "{:.0f}".format),
                    f"{runs[0]['learning_rate']:g}",
                    str(len(runs)),
                    f"{statistics.mean(row['tokens_per_second'] for row in runs) / 1e6:.2f}",
                ]
            )
    return markdown_table(columns, lines).splitlines()


def test_table(rows: list[dict]) -> list[str]:
    """A line for each mixer and size: all questions right on longer sequences."""
    multiples = sorted({int(multiple) for row in rows for multiple in row["test"]})
    if not multiples:
        return []
    columns = ["all right at", "mixer", *(f"{multiple}x" for multiple in multiples)]
    lines = []
    for mixers in groups(rows).values():
        for mixer, rates in mixers.items():
            runs = [row for row in best(rates) if row["test"]]
            if runs:
                exact = ([row["test"][str(m)]["exact"] for row in runs] for m in multiples)
                lines.append([size_name(runs[0]), mixer, *map(with_range, exact)])
    return [*markdown_table(columns, lines).splitlines(), ""]


def grid_table(rows: list[dict]) -> list[str]:
    """A line for each mixer and size, a column for each learning rate."""
    all_rates = sorted({row["learning_rate"] for row in rows})
    columns = ["size", "mixer", *(f"{rate:g}" for rate in all_rates)]
    lines = []
    for mixers in groups(rows).values():
        for mixer, rates in mixers.items():
            accuracies = ([row["accuracy"] for row in rates.get(rate, [])] for rate in all_rates)
            name = size_name(next(iter(rates.values()))[0])
            lines.append([name, mixer, *map(with_range, accuracies)])
    return markdown_table(columns, lines).splitlines()


def plot(name: str, rows: list[dict], path: Path) -> None:
    """Accuracy against steps, a panel for each size and kind: mean and range over seeds."""
    from matplotlib.figure import Figure

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
                (line,) = axes.plot(steps, [*map(statistics.mean, points)], color=colours()[mixer])
                low, high = [*map(min, points)], [*map(max, points)]
                axes.fill_between(steps, low, high, color=colours()[mixer], alpha=0.2, linewidth=0)
                lines[mixer] = line
                axes.set(title=f"{name}, {size_name(runs[0])}", xlabel="steps", ylim=(-0.02, 1.02))
                axes.grid(alpha=0.3)
                if column == 0:
                    axes.set(ylabel=f"{KIND_NAMES.get(kind, kind)} on fresh batches")
    figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def plot_summary(studies: dict[str, list[dict]], path: Path) -> None:
    """A panel for each study: accuracy against what the study varies, a line for each mixer."""
    from matplotlib.figure import Figure

    columns = min(4, len(studies))
    shape = (-(-len(studies) // columns), columns)
    figure = Figure(figsize=(1.2 + 3.2 * shape[1], 0.4 + 2.8 * shape[0]), layout="constrained")
    panels, lines = figure.subplots(*shape, squeeze=False, sharey=True).flatten(), {}
    for axes, (name, rows) in zip(panels, studies.items()):
        label, points = summary(rows)
        places = list(dict.fromkeys(place for of_mixer in points.values() for place in of_mixer))
        for number, (mixer, of_mixer) in enumerate(points.items()):
            means = [statistics.mean(values) for values in of_mixer.values()]
            errors = [
                [mean - min(values) for mean, values in zip(means, of_mixer.values())],
                [max(values) - mean for mean, values in zip(means, of_mixer.values())],
            ]
            beside = 0.5 * (number / len(points) - 0.5)  # so that lines do not hide each other
            x = [places.index(place) + beside for place in of_mixer]
            style = {"color": colours()[mixer], "marker": "o", "markersize": 3, "capsize": 2}
            lines[mixer] = axes.errorbar(x, means, errors, linewidth=1, **style)
        axes.set(title=name, xlabel=label, ylim=(-0.02, 1.02))
        axes.set_xticks(range(len(places)), places)
        axes.grid(alpha=0.3)
    for axes in panels[len(studies) :]:
        axes.set_axis_off()
    figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def summary(rows: list[dict]) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """What a study varies, and its values of each seed: by mixer, then by what varies."""
    points: dict[str, dict[str, list[float]]] = {}
    label = "tokens"
    for mixers in groups([row for row in rows if row["finished"]]).values():
        for mixer, rates in mixers.items():
            runs, of_mixer = best(rates), points.setdefault(mixer, {})
            if runs[0]["test"] and not runs[0]["size"]:
                label = "all right at multiples of the length"
                for multiple in runs[0]["test"]:
                    of_mixer[multiple] = [run["test"][multiple]["exact"] for run in runs]
            else:
                label = ", ".join(runs[0]["size"]) or label
                place = ", ".join(map(str, runs[0]["size"].values())) or str(runs[0]["length"])
                of_mixer[place] = [*map(accuracy, runs)]
    return label, points


def colours() -> dict[str, tuple]:
    """A mixer's, in all figures."""
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib import colormaps

    return dict(zip(MIXERS, colormaps["tab20"].colors))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[RESULTS])
    main(parser.parse_args().folders)
