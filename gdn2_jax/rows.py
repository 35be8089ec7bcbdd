"""Rows of measurements: files of JSON lines, and tables for the terminal and for Markdown."""

import json
import logging
import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


def append_row(path: Path | None, row: dict[str, Any]) -> None:
    """Writes a row to the end of a file, which is made if missing; None: to no file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path, number: str | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a file, none if it does not exist.

    A last line that is incomplete is left out: it may be on its way. Damaged lines are left out
    with a warning.

    Args:
      path: of the file.
      number: a field; a line where it is no number counts as damaged.
    """
    if not path.exists():
        return []
    rows, damaged = [], []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for place, line in enumerate(lines, start=1):
        try:
            row = dict(json.loads(line))
            if number is not None:
                row[number] + 0
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            damaged.append(place)
    if damaged:
        message = "%s: left out damaged lines, %d in number: %s"
        numbers = textwrap.shorten(", ".join(map(str, damaged)), 60)
        logging.getLogger(__name__).warning(message, path, len(damaged), numbers)
    return rows


def source_commit() -> str:
    """Returns $GDN2_JAX_COMMIT, which a copy of a working tree needs, or else git's commit."""
    given = os.environ.get("GDN2_JAX_COMMIT")
    if given or not shutil.which("git"):
        return given or "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


class Column(NamedTuple):
    """A column of a table that is printed row by row: rich draws only whole tables.

    Attributes:
      name: at its top.
      style: how `format` shows the value.
      width: in characters, or that of `name` if more; negative: text stands on the left.
    """

    name: str
    key: str
    style: str = ""
    width: int = 0

    def fit(self, text: str) -> str:
        """Fills a text up to the column's width."""
        width = max(abs(self.width), len(self.name))
        return text.ljust(width) if self.width < 0 else text.rjust(width)


def format_header(columns: Iterable[Column]) -> str:
    """Returns the line of the names."""
    return "  ".join(column.fit(column.name) for column in columns)


def format_row(columns: Iterable[Column], row: dict[str, Any]) -> str:
    """Returns the line of a row, "-" where it has no value, and its "error" behind."""
    cells = []
    for column in columns:
        value = row.get(column.key)
        value = str(value) if isinstance(value, bool) else value
        cells.append(column.fit("-" if value is None else format(value, column.style)))
    return "  ".join([*cells, row.get("error", "")]).rstrip()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return "\n".join([head, "|---" * len(header) + "|", *lines])


def renew_table(page: Path, rows: Path, table: str) -> None:
    """Puts the table of a file of rows into a page that has a place for it; says so if it has.

    The place lies between the whole lines `<!-- table of FOLDER/FILE -->` and
    `<!-- end of FOLDER/FILE -->`, which name the file and its folder.
    """
    name = f"{rows.resolve().parent.name}/{rows.name}"
    start, end = f"<!-- table of {name} -->", f"<!-- end of {name} -->"
    text = page.read_text() if page.exists() else ""
    # Whole lines: prose may quote them.
    place = re.compile(f"^{re.escape(start)}$.*?^{re.escape(end)}$", re.DOTALL | re.MULTILINE)
    renewed, count = place.subn(lambda _: f"{start}\n\n{table}\n\n{end}", text, count=1)
    if count:
        page.write_text(renewed)
        print(f"table in {page}")
