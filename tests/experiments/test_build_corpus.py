"""The corpus builder's parts that need no registry."""

import importlib
import json

import numpy as np
import pytest


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("build_corpus")


def paragraph(start, width=60):
    words = [
        f"word{(start + i) * 7919 % 1000} of a long enough sentence with number {i}."
        for i in range(60)
    ]
    return "\n".join(" ".join(words[i : i + width]) for i in range(0, 60, width))


def test_every_package_has_a_version_once(script):
    names = [package.split("=")[0] for package in script.DEBIAN.split()]
    assert len(names) == len(set(names)) > 100
    assert all("=" in package for package in script.DEBIAN.split())


def test_copies_and_rewrapped_copies_are_left_out(script):
    texts, sentences = set(), set()

    def is_new(text):
        return script.is_new(text, texts, sentences)

    assert is_new(paragraph(0)) and not is_new(paragraph(0)) and is_new(paragraph(500))
    long = "\n".join(
        f"A sentence of a document number {i} that is told at length." for i in range(40)
    )
    assert is_new(long)
    assert not is_new(long.replace(" that ", "\nthat ") + " And a few words more.")
    assert not is_new("short")


def test_lines_of_many_documents_are_left_out_and_short_ones_kept(script):
    footer = "This page was made by a generator of pages, version 1.2.3"
    texts = [f"text {i}\n{footer}\nNote" for i in range(20)]
    assert list(script.without_common_lines(texts)) == [f"text {i}\nNote\n" for i in range(20)]


@pytest.mark.parametrize("unit", ["x" * 50, "word and word\n", "a line\n\n"])
def test_a_long_text_is_cut_where_it_can_be_and_nothing_is_lost(script, unit):
    text = unit * (1_200_000 // len(unit))
    parts = list(script.without_common_lines([text]))
    assert "".join(parts).strip() == text.strip()
    assert len(parts) > 2 and max(map(len, parts)) <= 400_001


def test_token_ids_come_back_from_what_is_carried(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "PART", 5000)
    with (tmp_path / "documents.jsonl").open("w") as file:
        for i in range(20):
            file.write(json.dumps({"text": paragraph(i), "source": "package"}) + "\n")
    arguments = [str(tmp_path), "--vocab-size", "300", "--validation-fraction", "0.3"]
    assert script.main(arguments) is None
    assert "SHA-256" in capsys.readouterr().out
    facts = json.loads((tmp_path / "facts.json").read_text())
    parts = {path: np.load(path) for path in sorted(tmp_path.glob("*.npy"))}
    assert [path.stem for path in parts] == ["train-0", "train-1", "train-2", "validation-0"]
    for name in ("train", "validation"):
        tokens = [tokens for path, tokens in parts.items() if path.stem.startswith(name)]
        assert facts[name]["tokens"] == sum(map(len, tokens))
        assert {part[-1] for part in tokens} == {tokens[0][-1]}  # the end of a document
        assert {part.dtype for part in tokens} == {np.dtype(np.uint16)}
    total = sum(facts[name]["bytes"] for name in ("train", "validation"))
    assert total == sum(len(paragraph(i).encode()) for i in range(20))
    for path in parts:
        path.unlink()
    script.main([str(tmp_path), "--unpack"])
    for path, tokens in parts.items():
        np.testing.assert_array_equal(np.load(path), tokens)


def test_pages_lose_their_markup_and_other_languages_are_left_out(script, tmp_path):
    pytest.importorskip("resiliparse")
    english = "The daemon reads its configuration when it is started by the administrator. " * 20
    german = (
        "Der Dienst liest seine Einstellungen, wenn ihn der Verwalter des Rechners startet. " * 20
    )
    page = tmp_path / "page.html"
    page.write_text(f"<html><nav>menu</nav><main><p>{english}</p></main></html>")
    assert script.read(page) == english.strip() + "\n"
    page.write_text(f"<html><body><p>{german}</p></body></html>")
    assert script.read(page) is None
