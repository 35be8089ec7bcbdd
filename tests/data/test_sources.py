import json
import sysconfig
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from gdn2_jax.data.sources import find_files, read_documents


def read(*paths, **options):
    return list(read_documents(find_files([str(path) for path in paths]), **options))


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


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="paths: .*nothing.txt does not exist"):
        read(tmp_path / "nothing.txt")


def test_a_file_of_another_suffix_is_named_with_those_expected(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(ValueError, match=r"a\.md is not a \.txt, \.jsonl or \.parquet file"):
        read(tmp_path / "a.md")


def test_a_directory_without_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"paths: the directory {tmp_path} has no"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "not a line of JSON"),
        (b'{"text": "\xff"}', "not a line of JSON"),
        (b'{"body": "x"}', "expected an object with a string 'text'"),
        (b'{"text": 3}', "expected an object with a string 'text'"),
        (b'["text"]', "expected an object with a string 'text'"),
        (rb'{"text": "\ud800"}', "'text' is not Unicode"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_by_file_and_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: {message}"):
        read(tmp_path)


def test_a_text_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text .*position 3"):
        read(tmp_path)


def test_a_bad_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: not a parquet file"):
        read(path)
    parquet.write_table(pyarrow.table({"body": ["one"], "n": [1]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: expected a column 'text', found body, n"):
        read(path)
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: row 1: expected a string 'text', got None"):
        read(path)


def test_the_default_corpus_is_the_running_pythons_own_sources_and_documentation():
    files = find_files([])
    assert files == find_files([]) == sorted(files)
    root = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(root).as_posix() for path in files}
    assert {"ast.py", "asyncio/tasks.py"} <= names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)

    documents = list(read_documents(files))
    assert len(documents) > 300
    assert 2e6 < sum(map(len, documents)) < 1e8
    assert (root / "ast.py").read_text() in documents
    assert any(
        text.startswith('The "import" statement') or '"import" statement' in text[:80]
        for text in documents
    )
