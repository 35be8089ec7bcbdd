import gzip
import json
import os
import sysconfig
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from gdn2_jax.data.sources import PIECE, find_files, read_pieces


def read(*paths, notes=None, **options):
    """The documents, each joined from its pieces."""
    notes = [] if notes is None else notes
    documents, begun = [], []
    files = find_files([str(path) for path in paths], notes.append)
    for piece in read_pieces(files, note=notes.append, **options):
        assert len(piece.content) <= PIECE
        begun.append(piece.content)
        if piece.ends:
            documents.append("".join(begun))
            begun = []
    assert not begun
    return documents


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\r\nline\n".encode())
    assert read(tmp_path / "a.txt") == ["é\r\nline\n"]


def test_a_separator_cuts_a_text_file_into_documents_and_empty_ones_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("one<|end|>two<|end|><|end|>")
    assert read(tmp_path, document_separator="<|end|>") == ["one", "two"]


def test_each_line_of_jsonl_is_a_document(tmp_path):
    lines = [json.dumps({"body": text}) for text in ("one", "two\nlines", "")]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    assert read(tmp_path, text_field="body") == ["one", "two\nlines"]


def test_each_row_of_parquet_is_a_document(tmp_path):
    parquet.write_table(
        pyarrow.table({"n": [1, 2], "text": ["one", "two"]}), tmp_path / "a.parquet"
    )
    assert read(tmp_path) == ["one", "two"]


def test_directories_are_read_recursively_in_the_order_of_names_and_no_file_twice(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.jsonl", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "' + name + '"}' if "json" in name else name)
    expected = ["a/y.jsonl", "a/z.txt", "b.txt"]
    assert read(tmp_path) == expected
    assert read(tmp_path, tmp_path / "b.txt") == expected


def test_a_directory_says_what_it_holds_that_is_not_read(tmp_path):
    folder = tmp_path / "folder"
    for name in ("a.TXT", "b.txt", "README.md", "x.csv", ".hidden.txt", ".ipynb_checkpoints/c.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    notes = []
    assert read(folder, notes=notes) == ["a.TXT", "b.txt"]
    (note,) = notes
    for words in ("1 .md", "1 .csv", ".hidden.txt (hidden)", ".ipynb_checkpoints (hidden)"):
        assert words in note
    assert read(folder / ".hidden.txt") == [".hidden.txt"]


def test_linked_directories_are_searched_once_and_linked_files_keep_their_suffix(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_text('{"text": "linked"}')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("elsewhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "z.jsonl").symlink_to(tmp_path / "blobs" / "0a1b")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert read(folder) == ["elsewhere", "linked"]


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n"])
def test_a_line_end_in_the_separator_matches_either_kind(tmp_path, separator):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\n\nfour")
    assert read(tmp_path, document_separator=separator) == ["one\r\ntwo", "three", "four"]


def test_a_separator_that_does_not_occur_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    notes = []
    read(tmp_path, document_separator="\n\n", notes=notes)
    assert notes == [
        "document_separator: '\\n\\n' occurs in none of the 1 text files, so each is one document"
    ]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "two"}'.encode())
    assert read(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("length", [PIECE - 1, PIECE, PIECE + 1, PIECE + 2, 3 * PIECE])
def test_long_documents_come_in_pieces_that_do_not_depend_on_the_kind_of_file(tmp_path, length):
    """Pieces end where separators, two-byte characters and the ends of documents fall."""
    text = ("é" + "x" * 998) * (length // 999 + 1)
    documents = [text[:length], "short", text[:length]]
    (tmp_path / "a.txt").write_bytes("\r\n\r\n".join(documents).encode())
    lines = [json.dumps({"text": document}) for document in documents]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    options = {"document_separator": "\n\n"}
    assert read(tmp_path / "a.txt", **options) == documents
    pieces = [
        [piece.content for piece in read_pieces([tmp_path / name], **options) if piece.content]
        for name in ("a.txt", "b.jsonl")
    ]
    assert pieces[0] == pieces[1]


def test_compressed_files_are_read_and_damage_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    assert read(tmp_path) == ["one", "two"]
    for path in (tmp_path / "a.txt.gz", tmp_path / "b.jsonl.gz"):
        content = path.read_bytes()
        for damaged in (content[:-6], b"text", content[:10] + b"\xff" * 20):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{path.name}: expected a whole \.gz file, got"):
                read(path)


def test_null_texts_are_skipped_and_counted_unless_they_are_most(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    texts = pyarrow.array(["one", None, "two"], pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        notes = []
        assert read(tmp_path / name, notes=notes) == ["one", "two"]
        assert notes == [f"{tmp_path / name}: skipped 1 of 3 records, whose 'text' is null"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: .* half .*, got null 'text' in 2 of 3"):
        read(tmp_path / "a.jsonl")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="data.paths: expected a file .* that exists, got .*nothing.txt"
    ):
        read(tmp_path / "nothing.txt")


def test_a_file_of_another_suffix_is_named_with_those_expected(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(
        ValueError, match=r"expected \.txt, \.txt\.gz, .* or \.array_record files, got .*a\.md"
    ):
        read(tmp_path / "a.md")


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "yours").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("text")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("yours"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    notes = []
    assert read(tmp_path, notes=notes) == ["text"]
    expected = f"{tmp_path / 'yours'} (Permission denied)"
    assert notes == [f"data.paths: skipped in {tmp_path}: {expected}"]


def test_a_run_among_the_texts_is_no_text(tmp_path):
    """As `--data .` finds it when the run goes on."""
    run = tmp_path / "runs" / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    for path in (
        tmp_path / "a.txt",
        run / "sample.txt",
        run / "metrics.jsonl",
        run / "config.json",
    ):
        path.write_text("text")
    notes = []
    assert read(tmp_path, notes=notes) == ["text"]
    assert notes == [f"data.paths: skipped in {tmp_path}: {run} (a run)"]


def test_a_directory_without_text_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=f"data.paths: expected .*, got none in the directory {tmp_path}"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "expected a line of JSON, got"),
        (b'{"text": "\xff"}', "expected a line of JSON, got"),
        (b'{"body": "x"}', "expected an object with a string 'text'"),
        (b'{"text": 3}', "expected an object with a string 'text'"),
        (b'["text"]', "expected an object with a string 'text'"),
        (b"[" * 100_000, "expected a line of JSON, got maximum recursion depth"),
        (rb'{"text": "\ud800"}', "expected Unicode in 'text', got"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_by_file_and_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: {message}"):
        read(tmp_path)


def test_a_text_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8 text, got .* position 3"):
        read(tmp_path)


def test_a_bad_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: expected a whole parquet file"):
        read(path)
    parquet.write_table(pyarrow.table({"body": ["one"], "n": [1]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: expected a column 'text', got body, n"):
        read(path)
    parquet.write_table(pyarrow.table({"text": [1]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: row 0: expected a string 'text', got 1"):
        read(path)


def test_a_damaged_page_of_parquet_names_its_file(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [os.urandom(50).hex() for _ in range(2000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: expected a whole parquet file, got"):
        read(path)


def test_each_record_of_array_record_is_a_document(tmp_path, write_array_record):
    path = tmp_path / "a.array_record-00000-of-00001"
    write_array_record(path, [{"text": "one"}, {"text": "naïve"}, {}])
    notes = []
    assert read(tmp_path, notes=notes) == ["one", "naïve"]
    assert notes == [f"{path}: skipped 1 of 3 records, whose 'text' is null"]
    with pytest.raises(ValueError, match="got null 'body' in 3 of 3"):
        read(path, text_field="body")
    with pytest.raises(ValueError, match="tokenizer: expected the one that made the token ids"):
        read(path, text_field="id")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff text", r"record 1: expected a tf\.train\.Example, or token ids as numpy\.save"),
        (b"\x93NUMPY", "record 1: expected a whole array of numbers"),
        (b"", r"record 1: expected a tf\.train\.Example"),
    ],
)
def test_a_bad_record_is_named_by_file_and_number(tmp_path, write_array_record, record, message):
    path = tmp_path / "a.array_record"
    write_array_record(path, [{"text": "one"}, record])
    with pytest.raises(ValueError, match=rf"a\.array_record: {message}"):
        read(path)
    path.write_bytes(b"text" * 100)
    with pytest.raises(ValueError, match=r"a\.array_record: not an \.array_record file, or one"):
        read(path)


def test_the_default_corpus_is_the_running_pythons_own_sources_and_documentation():
    files = find_files([], print)
    assert files == find_files([], print) == sorted(files)
    root = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(root).as_posix() for path in files}
    assert {"ast.py", "asyncio/tasks.py"} <= names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)

    documents = read()
    assert len(documents) > 300
    assert 2e6 < sum(map(len, documents)) < 1e8
    assert (root / "ast.py").read_text() in documents
    assert any(
        text.startswith('The "import" statement') or '"import" statement' in text[:80]
        for text in documents
    )
