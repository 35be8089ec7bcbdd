import json
import os
import re
import threading
import time
from collections import Counter

import numpy as np
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet

from gdn2_jax.data import DataConfig, load_tokenizer, prepare, train_tokenizer
from gdn2_jax.data import corpus as corpus_module
from gdn2_jax.data.cache import file_digest, file_states, is_intact
from gdn2_jax.data.sources import read_file

TEXTS = [f"document {i}: " + f"{i * 7919} " * (i % 5 + 3) for i in range(60)]


@pytest.fixture
def corpus(tmp_path):
    """A function that prepares TEXTS, with any field of the config changed."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def make(**changes):
        fields = {
            "paths": (str(path),),
            "sequence_length": 32,
            "validation_fraction": 0.2,
            "cache_directory": str(tmp_path / "cache"),
        }
        return prepare(DataConfig(**{**fields, **changes}))

    return make


def texts_of(sequences, tokenizer):
    store = sequences.store
    bounds = zip(store.offsets[:-1], store.offsets[1:])
    assert (store.tokens[store.offsets[1:] - 1] == tokenizer.end_of_document).all()
    return [tokenizer.decode(store.tokens[start : stop - 1]) for start, stop in bounds]


def cache_entries(tmp_path):
    return sorted(path for path in (tmp_path / "cache").iterdir() if path.is_dir())


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return (str(path),)


def held_out_bytes(corpus):
    sizes = [part.store.num_bytes for part in (corpus.train, corpus.validation)]
    return sizes[1], sum(sizes)


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_documents_are_held_out_whole_up_to_the_fraction(corpus, tokenizer):
    c = corpus(tokenizer=tokenizer)
    train, validation = (texts_of(part, c.tokenizer) for part in (c.train, c.validation))
    assert sorted(train + validation) == sorted(TEXTS)
    assert not set(train) & set(validation)
    share = sum(map(len, validation)) / sum(map(len, TEXTS))
    assert share == pytest.approx(0.2, abs=0.02)
    assert c.train.store.num_bytes == sum(map(len, train))


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("sizes", [[30_000], [1_200_000, 900, 5000, 70, 1300], [2500] * 30])
def test_about_the_fraction_is_held_out_whatever_the_documents(corpus, tmp_path, sizes, fraction):
    texts = [
        "\n".join(f"line {n} of {i}" for n in range(size // 8))[:size]
        for i, size in enumerate(sizes)
    ]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    c = corpus(
        paths=tuple(str(tmp_path / f"{i}.txt") for i in range(len(texts))),
        validation_fraction=fraction,
    )
    held_out, total = held_out_bytes(c)
    assert total == sum(map(len, texts))
    assert 0.8 * fraction < held_out / total <= 1.1 * fraction
    train, validation = (texts_of(part, c.tokenizer) for part in (c.train, c.validation))
    # A document that is divided gives its end, from the beginning of a line.
    for text in validation:
        assert text in texts or any(head + text in texts and head[-1] == "\n" for head in train)


def test_the_description_gives_documents_and_bytes_of_both_sides(corpus, tmp_path):
    c = corpus(paths=write_texts(tmp_path / "one.jsonl", ["0123456789\n" * 100]))
    assert c.description == ("training 1 document, 891 bytes; validation 1 document, 209 bytes")
    assert corpus(validation_fraction=0).description.endswith(" bytes; no validation")


def test_validation_paths_take_the_place_of_the_fraction(corpus, tmp_path):
    paths = write_texts(tmp_path / "held.jsonl", [*TEXTS[:2], "another" * 9])
    held = corpus(validation_paths=paths, validation_fraction=0.2)
    assert texts_of(held.train, held.tokenizer) == TEXTS
    assert sorted(texts_of(held.validation, held.tokenizer)) == sorted([*TEXTS[:2], "another" * 9])
    assert held.digest == corpus(validation_paths=paths, validation_fraction=0).digest
    assert held.digest != corpus(validation_fraction=0).digest
    with pytest.raises(FileNotFoundError, match="data.validation_paths: expected .*, got nowhere"):
        corpus(validation_paths=("nowhere",))


def test_text_of_both_sides_is_told_at_each_start(corpus, tmp_path, caplog):
    paths = write_texts(tmp_path / "held.jsonl", [*TEXTS[:2], "another" * 9])
    for _ in range(2):
        caplog.clear()
        corpus(validation_paths=paths)
        assert "validation_paths: 2 of the documents are in the training text too" in caplog.text


def test_validation_is_the_same_under_other_file_names(corpus, tmp_path):
    stores = []
    for name, order in (("a", 1), ("b", -1)):
        (tmp_path / name).mkdir()
        for i, text in enumerate(TEXTS[::order]):
            (tmp_path / name / f"{i:02}.txt").write_text(text)
        stores.append(corpus(paths=(str(tmp_path / name),)).validation.store)
    for field in ("tokens", "offsets", "byte_lengths"):
        np.testing.assert_array_equal(*(getattr(store, field) for store in stores))


def test_the_split_depends_on_neither_seed_nor_tokenizer_nor_order(corpus, tmp_path):
    c = corpus()
    held_out = texts_of(c.validation, c.tokenizer)
    (tmp_path / "reversed.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in reversed(TEXTS))
    )
    for changes in (
        {"seed": 5},
        {"tokenizer": "train:300"},
        {"sequence_length": 8},
        {"paths": (str(tmp_path / "reversed.jsonl"),)},
    ):
        c = corpus(**changes)
        assert sorted(texts_of(c.validation, c.tokenizer)) == sorted(held_out), changes


def test_a_larger_fraction_holds_out_the_same_documents_and_more(corpus):
    small, large = corpus(validation_fraction=0.2), corpus(validation_fraction=0.6)
    small, large = (set(texts_of(c.validation, c.tokenizer)) for c in (small, large))
    assert small < large


def test_copies_of_a_document_stay_on_one_side(corpus, tmp_path):
    texts = TEXTS[:8] * 6
    (tmp_path / "copies.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    c = corpus(paths=(str(tmp_path / "copies.jsonl"),), validation_fraction=0.25)
    train, validation = (texts_of(part, c.tokenizer) for part in (c.train, c.validation))
    assert sorted(Counter(train + validation).values())[-8:] == [6] * 8
    assert not set(train) & set(validation)


def test_no_fraction_means_no_validation(corpus):
    c = corpus(validation_fraction=0)
    assert c.validation is None
    assert texts_of(c.train, c.tokenizer) == TEXTS


def test_validation_keeps_its_order_and_training_is_shuffled_by_the_seed(corpus):
    c, other = corpus(seed=0), corpus(seed=1)
    assert c.validation.seed is other.validation.seed is None
    assert (c.train.seed, other.train.seed) == (0, 1)
    assert (c.train[0].inputs != other.train[0].inputs).any()


def test_resets_at_documents_reach_both_parts(corpus):
    for reset in (False, True):
        c = corpus(reset_at_documents=reset, sequence_length=60)
        for part in (c.train, c.validation):
            assert (part[0].segment_ids is not None) == reset


def test_a_tokenizer_is_trained_on_training_documents_only(corpus, monkeypatch):
    seen = []

    def spy(documents, vocab_size):
        seen.extend(documents)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr("gdn2_jax.data.corpus.train_tokenizer", spy)
    c = corpus(tokenizer="train:300")
    assert seen == texts_of(c.train, c.tokenizer)


def test_a_second_preparation_reads_the_cache(corpus, tmp_path, monkeypatch):
    for tokenizer in ("bytes", "train:300"):
        first = corpus(tokenizer=tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr("gdn2_jax.data.corpus.read_pieces", None)
            second = corpus(tokenizer=tokenizer, seed=3, sequence_length=16)
        assert second.digest == first.digest
        np.testing.assert_array_equal(second.train.store.tokens, first.train.store.tokens)
        assert second.tokenizer.vocab_size == first.tokenizer.vocab_size
        text = TEXTS[0]
        assert second.tokenizer.encode(text).tolist() == first.tokenizer.encode(text).tolist()
    assert len(cache_entries(tmp_path)) == 2


def test_a_changed_file_is_read_anew_even_with_its_old_size_and_time(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("gdn2_jax.data.cache._AT_REST", -1)  # times are trusted at once
    first = corpus()
    path = tmp_path / "corpus.jsonl"
    stat = path.stat()
    time.sleep(0.02)
    path.write_text(path.read_text().replace("document 7:", "DOCUMENT 7:"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = corpus()
    assert path.stat().st_size == stat.st_size
    assert second.digest != first.digest
    texts = texts_of(second.train, second.tokenizer) + texts_of(second.validation, second.tokenizer)
    assert any(text.startswith("DOCUMENT 7:") for text in texts)


def test_files_at_rest_are_hashed_once_and_again_on_request(corpus, tmp_path, monkeypatch):
    hashed = []

    def spy(path):
        hashed.append(path.name)
        return file_digest(path)

    for module in ("corpus", "cache"):
        monkeypatch.setattr(f"gdn2_jax.data.{module}.file_digest", spy)
    first = corpus()
    assert "corpus.jsonl" in hashed
    # Files written a moment ago may be written again without another time.
    hashed.clear()
    corpus()
    assert "corpus.jsonl" in hashed and "train.tokens" in hashed
    monkeypatch.setattr("gdn2_jax.data.cache._AT_REST", -1)
    corpus()
    hashed.clear()
    assert corpus(seed=1, sequence_length=8).digest == first.digest
    assert hashed == []
    corpus(verify=True)
    assert "corpus.jsonl" in hashed and "train.tokens" in hashed


def test_damage_that_leaves_the_times_is_found_on_request(corpus, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("gdn2_jax.data.cache._AT_REST", -1)
    expected = np.array(corpus().train.store.tokens)
    corpus()
    (entry,) = cache_entries(tmp_path)
    seal = json.loads((entry / "digests.json").read_text())
    content = (entry / "train.tokens").read_bytes()
    (entry / "train.tokens").write_bytes(bytes(len(content)))
    files = sorted(path for path in entry.iterdir() if path.name != "digests.json")
    (entry / "digests.json").write_text(json.dumps(seal | {"states": file_states(files)}))
    assert not corpus().train.store.tokens.any()
    np.testing.assert_array_equal(corpus(verify=True).train.store.tokens, expected)
    assert "was damaged and is replaced" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"tokenizer": "train:300"}, {"validation_fraction": 0.3}, {"text_field": "other"}]
)
def test_whatever_changes_the_tokens_changes_the_digest(corpus, tmp_path, changes):
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps({"text": t, "other": t[::-1]}) + "\n" for t in TEXTS))
    paths = (str(path),)
    assert corpus(paths=paths).digest != corpus(paths=paths, **changes).digest


@pytest.mark.parametrize("name", ["train.tokens", "validation.offsets", "tokenizer.json"])
def test_a_damaged_cache_is_noticed_and_rebuilt(corpus, tmp_path, caplog, name):
    first = corpus()
    expected = np.array(first.train.store.tokens)
    (entry,) = cache_entries(tmp_path)
    content = bytearray((entry / name).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / name).write_bytes(content)
    second = corpus()
    assert "was damaged and is replaced" in caplog.text
    assert is_intact(entry)
    assert cache_entries(tmp_path) == [entry]
    np.testing.assert_array_equal(second.train.store.tokens, expected)


def test_a_cache_among_the_text_is_not_read(corpus, tmp_path):
    for name in ("cache", "other cache", "."):
        options = {"paths": (str(tmp_path),), "cache_directory": str(tmp_path / name)}
        assert corpus(**options).digest == corpus(**options).digest == corpus().digest


def test_a_failed_preparation_leaves_nothing_in_the_cache(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("gdn2_jax.data.corpus._write", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            corpus()
    assert cache_entries(tmp_path) == []


def test_an_empty_corpus_is_an_error(corpus, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="data.paths: expected text, got none"):
        corpus(paths=(str(tmp_path / "empty.txt"),))


def test_a_separator_may_be_typed_with_backslashes(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("one long document\n\nwith parts\n\nand more parts" * 9)
    paths = (str(tmp_path / "a.txt"),)
    typed = corpus(paths=paths, document_separator=r"\n\n")
    assert typed.digest == corpus(paths=paths, document_separator="\n\n").digest
    assert typed.train.store.num_documents > 9


def test_a_lossy_tokenizer_is_told_at_each_start(corpus, tmp_path, caplog):
    path = tmp_path / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    for _ in range(2):
        caplog.clear()
        corpus(tokenizer=str(path), sequence_length=4)
        assert re.search(
            r"tokenizer: .*json is lossy: 1 of 1 samples .*'document 0: 0 0 0", caplog.text
        )
    caplog.clear()
    corpus(tokenizer="train:300")
    assert "lossy" not in caplog.text


def test_pieces_of_a_long_document_have_the_tokens_of_the_whole(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("gdn2_jax.data.sources.PIECE", 1000)
    text = " ".join(f"word{i} {i * 7919},\n" for i in range(1000))
    paths = write_texts(tmp_path / "long.jsonl", [text, *TEXTS])
    for tokenizer in ("bytes", "train:400"):
        c = corpus(paths=paths, tokenizer=tokenizer, validation_fraction=0)
        whole = c.tokenizer.encode(text)
        np.testing.assert_array_equal(c.train.store.tokens[: len(whole)], whole)


@pytest.mark.parametrize(("sequence_length", "part"), [(1000, "validation"), (100_000, "train")])
def test_a_part_smaller_than_one_sequence_is_named(corpus, sequence_length, part):
    message = f"data.sequence_length: expected .*, got {sequence_length} in the {part} part"
    with pytest.raises(ValueError, match=message):
        corpus(sequence_length=sequence_length)


def test_a_tokenizer_file_is_used_and_its_contents_are_part_of_the_digest(corpus, tmp_path):
    trained = corpus(tokenizer="train:300")
    path = tmp_path / "tokenizer.json"
    trained.tokenizer.save(path)
    first = corpus(tokenizer=str(path))
    np.testing.assert_array_equal(first.train.store.tokens, trained.train.store.tokens)
    corpus(tokenizer="train:280").tokenizer.save(path)
    second = corpus(tokenizer=str(path))
    assert second.digest != first.digest
    assert second.train.store.num_tokens > first.train.store.num_tokens


def test_another_separator_or_end_token_changes_the_digest(corpus, tmp_path):
    (tmp_path / "text.txt").write_text("a few words, and more\n" * 50 + "and others; and\n" * 50)
    paths = {"paths": (str(tmp_path / "text.txt"),), "validation_fraction": 0}
    separated = [corpus(**paths, document_separator=separator) for separator in ("\n", ", ", "")]
    assert len({c.digest for c in separated}) == 3

    vocabulary = {"<unk>": 0, "</s>": 1, "stop": 2}
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>")).save(str(path))
    ended = [
        corpus(tokenizer=str(path), end_of_document=end, sequence_length=4).train.store.tokens[-1]
        for end in ("", "stop")
    ]
    assert ended == [1, 2]


def test_a_missing_tokenizer_is_an_error_before_anything_is_written(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer: .* got nowhere.json"):
        corpus(tokenizer="nowhere.json")
    assert not (tmp_path / "cache").exists()


def test_files_are_read_at_once_and_give_the_corpus_of_one_after_the_other(
    corpus, tmp_path, monkeypatch
):
    paths = tuple(write_texts(tmp_path / f"{i}.jsonl", [*TEXTS[i::2], None])[0] for i in range(2))
    expected = corpus(paths=paths)
    monkeypatch.setattr(corpus_module, "read_file", wait_for_another(threading.Barrier(2)))
    read = corpus(paths=paths, cache_directory=str(tmp_path / "another"))
    assert (read.digest, read.description) == (expected.digest, expected.description)
    for part in ("train", "validation"):
        stores = [getattr(c, part).store for c in (read, expected)]
        np.testing.assert_array_equal(*(store.tokens for store in stores))
    notes = [json.loads(path.read_text()) for path in tmp_path.glob("*/*/notes.json")]
    assert notes[0] == notes[1] and ["0.jsonl" in note for note in notes[0]] == [True, False]


def wait_for_another(barrier):
    """`read_file`, whose calls only go on by twos, and the first file last."""

    def read(path, **options):
        barrier.wait(timeout=20)
        if path.name == "0.jsonl":
            time.sleep(0.1)
        return (yield from read_file(path, **options))

    return read


@pytest.mark.parametrize("name", ["ids.npy", "ids.parquet", "ids.array_record"])
def test_token_ids_give_the_corpus_of_their_text(
    corpus, tmp_path, monkeypatch, write_array_record, name
):
    """Whole documents, the divided end of a long one, and the bytes of each token."""
    monkeypatch.setattr("gdn2_jax.data.sources.PIECE", 1000)
    long = " ".join(f"word {i * 7919} naïve" for i in range(100))
    paths = write_texts(tmp_path / "all.jsonl", [long, *TEXTS])
    path = str(tmp_path / "tokenizer.json")
    train_tokenizer([long, *TEXTS], 400).save(path)
    tokenizer = load_tokenizer(path)
    ids = [[*tokenizer.encode(text), tokenizer.end_of_document] for text in [long, *TEXTS]]
    if name == "ids.npy":
        np.save(tmp_path / name, np.concatenate(ids).astype(np.uint16)[:, None])
    elif name == "ids.array_record":
        # One record as numpy.save writes it, the others as TensorFlow's.
        write_array_record(tmp_path / name, [np.array(ids[0]), *({"text": i} for i in ids[1:]), {}])
    else:
        column = pyarrow.array([*ids, None], pyarrow.list_(pyarrow.int32()))
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / name)
    for fraction in (0, 0.2):
        options = {"tokenizer": path, "validation_fraction": fraction, "sequence_length": 8}
        c = corpus(paths=(str(tmp_path / name),), **options)
        if fraction:
            held_out, total = held_out_bytes(c)
            assert held_out == pytest.approx(0.2 * total, rel=0.1)
            assert c.validation.store.byte_lengths.sum() == held_out
        else:
            expected = corpus(paths=paths, **options)
            np.testing.assert_array_equal(c.train.store.tokens, expected.train.store.tokens)
            assert c.train.store.num_bytes == expected.train.store.num_bytes
            assert c.description == expected.description


def test_token_ids_that_are_none_are_named(corpus, tmp_path):
    path = tmp_path / "a.npy"
    paths = {"paths": (str(path),)}
    for ids, message in (
        (np.array([1, 257]), r"a.npy: expected token ids in \[0, 257\), .* got 257"),
        (np.array([-1]), "got -1"),
        (np.array([0.5]), "a.npy: expected token ids, got float64"),
        (np.array(["text"], object), "a.npy: expected a .npy file of numbers"),
        (np.array([256, 256]), "data.paths: expected text, got none"),
    ):
        np.save(path, ids)
        with pytest.raises(ValueError, match=message):
            corpus(**paths)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="a.npy: expected a .npy file of numbers"):
        corpus(**paths)
    np.save(path, np.arange(99))
    with pytest.raises(
        ValueError, match="tokenizer: expected the one that made the token ids .*, got train:N"
    ):
        corpus(**paths, tokenizer="train:300")
