"""Documents from text, .jsonl, .parquet, .array_record and .npy files, or from Python's own sources."""

import codecs
import gzip
import json
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Integer

from gdn2_jax.data.array_record import read_array_record
from gdn2_jax.data.tokenizer import Tokenizer

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".npy", ".parquet", ".array_record")

# Documents are read in pieces of so many characters or tokens, so that none has to fit into memory.
PIECE = 2**16

# Files without prose or code that a small language model could learn from, or not Python's own.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}

_BAD_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)

# Rows of a parquet file that are decoded at once.
_ROWS = 1024


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
      content: up to `PIECE` characters, or token ids of a document that was tokenized before; some
        piece of each document is not empty.
      ends: whether it is the last of its document.
    """

    content: str | Int32[np.ndarray, " N"]
    ends: bool


def find_files(
    paths: Sequence[str],
    note: Callable[[str], None],
    *,
    name: str = "data.paths",
    leave_out: Path | None = None,
) -> list[Path]:
    """Lists the files that `paths` stand for, each once.

    Directories are searched recursively, through links too, in the order of the names, for files
    with a suffix in `SUFFIXES`, in small or capital letters. Hidden files and folders, whose names
    begin with a dot, are left out, and so are the folders of runs, whose samples and metrics are no
    text to train on; all may be named themselves. No paths at all stand for the default corpus.

    Args:
      paths: files and directories.
      note: is told what a directory holds that is not read.
      name: of the option that gives them, for messages.
      leave_out: a directory that is not searched, such as the cache.

    Raises:
      FileNotFoundError: if a path does not exist.
      ValueError: if a file has another suffix, a directory has no file to read, or the running
        Python has no sources.
    """
    if not paths:
        return _default_corpus()
    files = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found, skipped = _search(path, leave_out)
            if not found:
                raise ValueError(
                    f"{name}: expected {_suffixes()} files, got none in the directory {given}"
                    + (f" (skipped: {skipped})" if skipped else "")
                )
            if skipped:
                note(f"{name}: skipped in {given}: {skipped}")
            files += found
        elif not path.exists():
            raise FileNotFoundError(
                f"{name}: expected a file or directory that exists, got {given}"
            )
        elif file_kind(path) not in SUFFIXES:
            raise ValueError(f"{name}: expected {_suffixes()} files, got {given}")
        else:
            files.append(path)
    unique = {}
    for path in files:
        unique.setdefault(path.resolve(), path.absolute())
    return list(unique.values())


def file_kind(path: Path) -> str:
    """Returns the suffix in `SUFFIXES` that tells how to read a file, ".py", or ""."""
    name = re.sub(r"-\d{5,}-of-\d{5,}$", "", path.name.lower())  # as shards are numbered
    return next((suffix for suffix in (*SUFFIXES, ".py") if name.endswith(suffix)), "")


def read_pieces(
    files: Sequence[Path],
    *,
    document_separator: str = "",
    note: Callable[[str], None] = lambda text: None,
    **options,
) -> Iterator[Piece]:
    """Yields the documents of `files` in order, piece by piece, without the empty ones.

    Args:
      files: from `find_files`.
      document_separator: as in `read_file`.
      note: is told of null texts, and of a separator that does not occur.
      **options: `text_field` and `tokenizer` of `read_file`.

    Raises:
      ValueError: as `read_file`.
    """
    cut = []
    for path in files:
        separator = {"document_separator": document_separator}
        cut.append((yield from read_file(path, note=note, **separator, **options)))
    note_missing_separator(document_separator, cut, note)


def read_file(
    path: Path,
    *,
    text_field: str = "text",
    document_separator: str = "",
    tokenizer: Tokenizer | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Generator[Piece, None, bool | None]:
    r"""Yields the documents of a file, piece by piece, without the empty ones.

    Args:
      path: from `find_files`.
      text_field: the .jsonl field, .parquet column or .array_record feature that holds the text, or
        lists of token ids. Where it is null, the record is left out.
      document_separator: cuts text files into documents; empty: one document a file. A "\n" in it
        stands for "\r\n" too.
      tokenizer: that made token ids; None if it is not known. A .npy file of them is cut into
        documents at its end of a document.
      note: is told of null texts.

    Returns:
      Whether the separator occurs; None if the file is not one that it cuts.

    Raises:
      ValueError: if the file does not hold text in the form that its suffix says; names the file
        and the line or row.
    """
    kind = file_kind(path)
    if kind.startswith(".txt"):
        return (yield from _read_text(path, document_separator))
    if kind.startswith(".jsonl"):
        texts = _without_nulls(_read_jsonl(path, text_field), path, text_field, note)
    elif kind == ".parquet":
        texts = _without_nulls(_read_parquet(path, text_field), path, text_field, note)
    elif kind == ".array_record":
        texts = _without_nulls(read_array_record(path, text_field), path, text_field, note)
    elif kind == ".npy":
        texts = [_open_npy(path)]
    else:
        texts = _read_python(path)
    for text in texts:
        yield from _pieces(text) if isinstance(text, str) else _cut_ids(path, text, tokenizer)
    return None


def note_missing_separator(
    separator: str, cut: Sequence[bool | None], note: Callable[[str], None]
) -> None:
    """Tells of a separator that occurs in none of the text files.

    Args:
      separator: the separator, or "".
      cut: what `read_file` returned, for each file.
      note: is told.
    """
    text_files = [found for found in cut if found is not None]
    if separator and text_files and not any(text_files):
        note(
            f"document_separator: {separator!r} occurs in none of the {len(text_files)} text "
            "files, so each is one document"
        )


def _default_corpus() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts)]
    if not files:
        raise ValueError(
            f"data.paths: expected files of your own, as this Python has no sources under {root}, got none"
        )
    return sorted(files)


def _search(directory: Path, leave_out: Path | None) -> tuple[list[Path], str]:
    """Returns the files to read, in order, and a description of the others."""
    found, others, hidden, apart = [], Counter(), [], []

    def note_error(error: OSError) -> None:
        apart.append(f"{error.filename} ({error.strerror})")

    seen = {os.path.realpath(path) for path in (leave_out,) if path} - {os.path.realpath(directory)}
    for folder, folders, names in os.walk(directory, onerror=note_error, followlinks=True):
        # A folder that links lead to twice, or that contains itself, is searched once.
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if "checkpoints" in folders and "config.json" in names and Path(folder) != directory:
            apart.append(f"{folder} (a run)")
            folders.clear()
            continue
        hidden += sorted(name for name in (*folders, *names) if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.is_file() and file_kind(path) in SUFFIXES:
                found.append(path)
            else:
                others["".join(path.suffixes[-2:]) or path.name] += 1
    skipped = [f"{count} {suffix}" for suffix, count in others.most_common(5)]
    skipped += ["other files"] * (len(others) > 5)
    skipped += [f"{name} (hidden)" for name in hidden[:5]]
    skipped += [f"{len(hidden) - 5} more hidden"] * (len(hidden) > 5)
    skipped += apart[:5] + [f"{len(apart) - 5} more folders"] * (len(apart) > 5)
    return sorted(found), ", ".join(skipped)


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _pieces(text: str) -> Iterator[Piece]:
    for start in range(0, len(text), PIECE):
        yield Piece(text[start : start + PIECE], start + PIECE >= len(text))


def _read_text(path: Path, separator: str) -> Generator[Piece, None, bool]:
    """Yields the pieces of a text file's documents; returns whether the separator occurs."""
    newline = re.escape("\n")
    pattern = re.escape(separator.replace("\r\n", "\n")).replace(newline, "\r?\n")
    # Before a piece goes out, a separator that begins in it must have been read to its end.
    margin = 2 * len(separator)
    found, begun, rest = False, False, ""
    for text in _decoded(path):
        rest += text
        if separator:
            *documents, rest = re.split(pattern, rest)
            for document in documents:
                yield from _pieces(document)
                if begun and not document:
                    yield Piece("", True)
                found, begun = True, False
        while len(rest) > PIECE + margin:
            yield Piece(rest[:PIECE], False)
            begun, rest = True, rest[PIECE:]
    yield from _pieces(rest)
    if begun and not rest:
        yield Piece("", True)
    return found


def _decoded(path: Path) -> Iterator[str]:
    """Yields a file's text, without its byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = 0
    try:
        with _open(path) as file:
            while chunk := file.read(PIECE):
                read += len(chunk)
                yield decoder.decode(chunk)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        position = read - len(error.object) + error.start
        raise ValueError(
            f"{path}: expected UTF-8 text, got {error.reason} at position {position}"
        ) from error
    except _BAD_GZIP as error:
        raise ValueError(f"{path}: expected a whole .gz file, got {error}") from error


def _read_python(path: Path) -> list[str]:
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        # The language reference, in one dictionary of strings.
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    try:
        return [path.read_bytes().decode()]
    except UnicodeDecodeError:
        return []


def _read_jsonl(path: Path, field: str) -> Iterator[str | None]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: expected a line of JSON, got {error}") from error
        if type(record) is not dict or type(record.get(field, 0)) not in (str, type(None)):
            raise ValueError(f"{path}:{number}: expected an object with a string {field!r}")
        text = record[field]
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path}:{number}: expected Unicode in {field!r}, got {error}"
            ) from error
        yield text


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            yield from file
    except _BAD_GZIP as error:
        raise ValueError(f"{path}: expected a whole .gz file, got {error}") from error


def _open_npy(path: Path) -> Integer[np.ndarray, "..."]:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected a .npy file of numbers, got {error}") from error


def _cut_ids(
    path: Path, ids: Integer[np.ndarray, "..."], tokenizer: Tokenizer | None
) -> Iterator[Piece]:
    """Yields token ids in pieces, cut into documents where they end."""
    if tokenizer is None:
        raise ValueError(
            f"tokenizer: expected the one that made the token ids of {path}, got train:N"
        )
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected token ids, got {ids.dtype}")
    ids, begun = ids.reshape(-1), False
    for start in range(0, len(ids), PIECE):
        chunk = ids[start : start + PIECE]
        for extreme in (chunk.min(), chunk.max()):
            if not 0 <= extreme < tokenizer.vocab_size:
                raise ValueError(
                    f"{path}: expected token ids in [0, {tokenizer.vocab_size}), as the tokenizer "
                    f"has, got {extreme}"
                )
        chunk = chunk.astype(np.int32)
        for part in np.split(chunk, np.flatnonzero(chunk == tokenizer.end_of_document) + 1):
            ends = bool(len(part)) and part[-1] == tokenizer.end_of_document
            part = part[:-1] if ends else part
            if len(part) or (ends and begun):
                yield Piece(part, ends)
                begun = not ends
    if begun:
        yield Piece(np.zeros(0, np.int32), True)


def _read_parquet(path: Path, column: str) -> Iterator[str | Integer[np.ndarray, " N"] | None]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if column not in names:
            raise ValueError(f"{path}: expected a column {column!r}, got {', '.join(names)}")
        kind = table.schema_arrow.field(column).type
        is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        is_list |= pyarrow.types.is_fixed_size_list(kind)
        tokens = is_list and pyarrow.types.is_integer(kind.value_type)
        row = 0
        for batch in table.iter_batches(_ROWS, columns=[column]):
            values = batch.column(0)
            if tokens:
                yield from (np.asarray(row.values) if row.is_valid else None for row in values)
                continue
            for text in values.to_pylist():
                if type(text) not in (str, type(None)):
                    raise ValueError(
                        f"{path}: row {row}: expected a string {column!r}, got {text!r:.60}"
                    )
                row += 1
                yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a whole parquet file, got {error}") from error


def _without_nulls(
    texts: Iterator[str | Integer[np.ndarray, " N"] | None],
    path: Path,
    field: str,
    note: Callable[[str], None],
) -> Iterator[str | Integer[np.ndarray, " N"]]:
    """Leaves null texts out, unless most are."""
    count = nulls = 0
    for text in texts:
        count += 1
        if text is None:
            nulls += 1
        else:
            yield text
    if 2 * nulls > count:
        raise ValueError(
            f"{path}: expected a text in at least half of the records, got null {field!r} in "
            f"{nulls} of {count}"
        )
    if nulls:
        note(f"{path}: skipped {nulls} of {count} records, whose {field!r} is null")


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
