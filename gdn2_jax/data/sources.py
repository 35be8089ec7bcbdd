"""Documents from .txt, .jsonl and .parquet files, or from the running Python installation."""

import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = (".txt", ".jsonl", ".parquet")

# Not prose nor code that a language model of this size could learn from, or not Python's own.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


def find_files(paths: Sequence[str]) -> list[Path]:
    """Lists the files that `paths` stand for, each once.

    Directories are searched recursively, in the order of the names, for files with a suffix in
    `SUFFIXES`. No paths at all stand for the default corpus.

    Raises:
      FileNotFoundError: if a path does not exist.
      ValueError: if a file has another suffix, a directory has no file to read, or the running
        Python has no sources.
    """
    if not paths:
        return _default_corpus()
    files = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not found:
                raise ValueError(f"paths: the directory {name} has no {_suffixes()} file")
            files += found
        elif not path.exists():
            raise FileNotFoundError(f"paths: {name} does not exist")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"paths: {name} is not a {_suffixes()} file")
        else:
            files.append(path)
    return list(dict.fromkeys(path.resolve() for path in files))


def read_documents(
    files: Sequence[Path], *, text_field: str = "text", document_separator: str = ""
) -> Iterator[str]:
    """Yields the documents of `files` in order, without the empty ones.

    Args:
      files: from `find_files`.
      text_field: the .jsonl field or .parquet column that holds the text.
      document_separator: cuts .txt files into documents; empty: one document a file.

    Raises:
      ValueError: if a file does not hold text in the form that its suffix says; names the file
        and the line or row.
    """
    for path in files:
        if path.suffix == ".jsonl":
            documents = _read_jsonl(path, text_field)
        elif path.suffix == ".parquet":
            documents = _read_parquet(path, text_field)
        elif path.suffix == ".py":
            documents = _read_python(path)
        else:
            documents = _read_text(path, document_separator)
        yield from (document for document in documents if document)


def _default_corpus() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts)]
    if not files:
        raise ValueError(f"paths: this Python has no sources under {root}; name files of your own")
    return sorted(files)


def _read_text(path: Path, separator: str) -> list[str]:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    return text.split(separator) if separator else [text]


def _read_python(path: Path) -> list[str]:
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        # The language reference, in one dictionary of strings.
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    try:
        return [path.read_bytes().decode()]
    except UnicodeDecodeError:
        return []


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not a line of JSON ({error})") from error
            text = record.get(field) if type(record) is dict else None
            if type(text) is not str:
                raise ValueError(f"{path}:{number}: expected an object with a string {field!r}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{path}:{number}: {field!r} is not Unicode ({error})") from error
            yield text


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    names = table.schema_arrow.names
    if column not in names:
        raise ValueError(f"{path}: expected a column {column!r}, found {', '.join(names)}")
    row = 0
    for batch in table.iter_batches(columns=[column]):
        for text in batch.column(0).to_pylist():
            if type(text) is not str:
                raise ValueError(f"{path}: row {row}: expected a string {column!r}, got {text!r}")
            row += 1
            yield text


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
