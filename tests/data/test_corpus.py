import json
import os

import numpy as np
import pytest
import tokenizers

from gdn2_jax.data import DataConfig, prepare, train_tokenizer
from gdn2_jax.data import corpus as corpus_module
from gdn2_jax.data.store import is_intact

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
    return sorted((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_every_document_is_in_one_part_of_the_split(corpus, tokenizer):
    c = corpus(tokenizer=tokenizer)
    train, validation = (texts_of(part, c.tokenizer) for part in (c.train, c.validation))
    assert sorted(train + validation) == sorted(TEXTS)
    assert not set(train) & set(validation)
    share = sum(map(len, validation)) / sum(map(len, TEXTS))
    assert 0.2 <= share < 0.25
    assert c.train.store.num_bytes == sum(map(len, train))


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
    small, large = corpus(validation_fraction=0.2), corpus(validation_fraction=0.5)
    small, large = (set(texts_of(c.validation, c.tokenizer)) for c in (small, large))
    assert small < large


def test_copies_of_a_document_stay_on_one_side(corpus, tmp_path):
    texts = TEXTS[:8] * 6
    (tmp_path / "copies.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    c = corpus(paths=(str(tmp_path / "copies.jsonl"),), validation_fraction=0.3)
    train, validation = (texts_of(part, c.tokenizer) for part in (c.train, c.validation))
    assert len(train) + len(validation) == 48
    assert not set(train) & set(validation)


def test_no_fraction_means_no_validation(corpus):
    c = corpus(validation_fraction=0)
    assert c.validation is None
    assert texts_of(c.train, c.tokenizer) == TEXTS


def test_validation_keeps_its_order_and_training_is_shuffled_by_the_seed(corpus):
    c, other = corpus(seed=0), corpus(seed=1)
    assert c.validation.seed is other.validation.seed is None
    assert (c.train.seed, other.train.seed) == (0, 1)
    assert (c.train[0]["inputs"] != other.train[0]["inputs"]).any()


def test_resets_at_documents_reach_both_parts(corpus):
    for reset in (False, True):
        c = corpus(reset_at_documents=reset, sequence_length=60)
        for part in (c.train, c.validation):
            assert (part[0]["segment_ids"].max() > 1) == reset


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
            patch.setattr("gdn2_jax.data.corpus.read_documents", None)
            second = corpus(tokenizer=tokenizer, seed=3, sequence_length=16)
        assert second.digest == first.digest
        np.testing.assert_array_equal(second.train.store.tokens, first.train.store.tokens)
        assert second.tokenizer.vocab_size == first.tokenizer.vocab_size
        text = TEXTS[0]
        assert second.tokenizer.encode(text).tolist() == first.tokenizer.encode(text).tolist()
    assert len(cache_entries(tmp_path)) == 2


def test_a_changed_file_is_read_anew_even_with_its_old_size_and_time(corpus, tmp_path):
    first = corpus()
    path = tmp_path / "corpus.jsonl"
    stat = path.stat()
    path.write_text(path.read_text().replace("document 7:", "DOCUMENT 7:"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = corpus()
    assert path.stat().st_size == stat.st_size
    assert second.digest != first.digest
    texts = texts_of(second.train, second.tokenizer) + texts_of(second.validation, second.tokenizer)
    assert any(text.startswith("DOCUMENT 7:") for text in texts)


@pytest.mark.parametrize(
    "changes",
    [{"tokenizer": "train:300"}, {"validation_fraction": 0.3}, {"text_field": "other"}],
)
def test_whatever_changes_the_tokens_changes_the_digest(corpus, tmp_path, changes):
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps({"text": t, "other": t[::-1]}) + "\n" for t in TEXTS))
    paths = (str(path),)
    assert corpus(paths=paths).digest != corpus(paths=paths, **changes).digest


@pytest.mark.parametrize("name", ["train.tokens", "validation.offsets.npy", "tokenizer.json"])
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


def test_a_failed_preparation_leaves_nothing_in_the_cache(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("gdn2_jax.data.corpus.seal", lambda directory: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            corpus()
    assert cache_entries(tmp_path) == []


def test_an_entry_that_another_process_wrote_first_is_used(corpus, tmp_path, monkeypatch):
    build = corpus_module._build

    def build_twice(*arguments):
        build(*arguments)
        build(*arguments)

    monkeypatch.setattr(corpus_module, "_build", build_twice)
    assert len(corpus().train) > 0
    assert len(cache_entries(tmp_path)) == 1


def test_an_empty_corpus_is_an_error(corpus, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="the corpus is empty"):
        corpus(paths=(str(tmp_path / "empty.txt"),))


def test_one_document_cannot_be_split_and_the_ways_out_are_named(corpus, tmp_path):
    (tmp_path / "one.txt").write_text("one long document\n\nwith parts\n\nand more parts" * 9)
    paths = (str(tmp_path / "one.txt"),)
    with pytest.raises(ValueError, match=r"(?s)validation_fraction=0.2 .* document_separator"):
        corpus(paths=paths)
    assert len(corpus(paths=paths, document_separator="\n\n").validation) > 0
    assert len(corpus(paths=paths, validation_fraction=0).train) > 0


@pytest.mark.parametrize(("sequence_length", "part"), [(1000, "validation"), (100_000, "train")])
def test_a_part_smaller_than_one_sequence_is_named(corpus, sequence_length, part):
    message = f"too small: in the {part} part .* needs {sequence_length + 1} tokens"
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
