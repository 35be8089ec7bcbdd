import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gdn2_jax.data import load_tokenizer, train_tokenizer
from gdn2_jax.data.tokenizer import TextTokenizer, describe_losses

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "naïve café 東京 🙂"] * 5
TRAINED = train_tokenizer(TEXTS, 300)


LONG = " ".join(f"word {i} isn't {i**5}, naïve: 東京\n\n  (x)" for i in range(400))


def word_level(vocabulary):
    """A Hugging Face tokenizer that knows whole words only."""
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


@given(st.text())
def test_bytes_come_back_as_the_same_text(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_have_257_entries_and_the_last_ends_a_document():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([104, 256, 105, 300]) == "hi"
    assert tokenizer.decode([104, 0xC3]) == "h\ufffd"


@given(st.text())
def test_a_trained_tokenizer_gives_any_text_back(text):
    assert TRAINED.decode(TRAINED.encode(text)) == text


def test_a_trained_tokenizer_has_merges_and_no_more_entries_than_asked_for():
    assert 257 < TRAINED.vocab_size <= 300
    assert len(TRAINED.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert max(TRAINED.encode(TEXTS[0])) < TRAINED.vocab_size


def test_training_is_reproducible():
    again = train_tokenizer(TEXTS, 300)
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text), TRAINED.encode(text))


def test_a_batch_encodes_as_its_texts_do_one_by_one():
    for tokenizer in (TRAINED, load_tokenizer("bytes")):
        for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_special_tokens_are_read_as_such_on_demand_only():
    for tokenizer in (TRAINED, load_tokenizer("bytes")):
        text, end = "a<|endoftext|> b<|endoftext|>", tokenizer.end_of_document
        assert end not in tokenizer.encode(text)
        expected = [*tokenizer.encode("a"), end, *tokenizer.encode(" b"), end]
        ids = tokenizer.encode(text, special_tokens=True)
        assert ids.tolist() == expected and ids.dtype == np.int32
        assert end not in tokenizer.encode(text)


@pytest.mark.parametrize("tokenizer", [TRAINED, load_tokenizer("bytes")], ids=["bpe", "bytes"])
def test_a_saved_tokenizer_loads_as_the_same(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.end_of_document == tokenizer.end_of_document
    np.testing.assert_array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


@pytest.mark.parametrize("tokenizer", [TRAINED, load_tokenizer("bytes")], ids=["bpe", "bytes"])
def test_a_full_disk_keeps_the_file_of_before_and_is_told_by_its_name(
    tmp_path, tokenizer, file_size_limit
):
    path = tmp_path / "tokenizer.json"
    path.write_text("before")
    with file_size_limit(10), pytest.raises(OSError, match="File too large.*tokenizer.json"):
        tokenizer.save(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_document_that_spells_the_end_token_does_not_end():
    ids = TRAINED.encode("a<|endoftext|>b")
    assert TRAINED.end_of_document not in ids
    assert TRAINED.decode(ids) == "a<|endoftext|>b"


def test_a_tokenizer_json_keeps_its_ids_and_adds_no_token(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = word_level({"<unk>": 0, "</s>": 1, "hello": 5, "world": 70})
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    assert loaded.encode("hello world moon").tolist() == [5, 70, 0]
    assert [ids.tolist() for ids in loaded.encode_batch(["hello", "hello world"])] == [[5], [5, 70]]
    assert loaded.end_of_document == 1
    assert loaded.vocab_size == 71  # the greatest id counts, not the number of entries


def test_the_end_token_can_be_named_and_must_exist(tmp_path):
    path = tmp_path / "tokenizer.json"
    word_level({"<unk>": 0, "stop": 1}).save(str(path))
    assert load_tokenizer(path, "stop").end_of_document == 1
    with pytest.raises(
        ValueError, match="end_of_document: expected .*, got a tokenizer without halt"
    ):
        load_tokenizer(path, "halt")
    with pytest.raises(ValueError, match=r"without <\|endoftext\|> or </s>"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "none"}}', "\xff"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"tokenizer: expected a tokenizer.json, got {path}"):
        load_tokenizer(path)


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(FileNotFoundError, match='expected "bytes", "train:N" or .* got byte$'):
        load_tokenizer("byte")


def test_training_reads_no_more_characters_than_its_limit(monkeypatch):
    monkeypatch.setattr("gdn2_jax.data.tokenizer._TRAINING_CHARACTERS", 16)
    tokenizer = train_tokenizer(["xyxyxyxy", "xyxyxyxy" + "pqpqpqpq" * 9, "pqpqpqpq" * 9], 300)
    assert len(tokenizer.encode("xyxyxyxy")) < 8
    assert len(tokenizer.encode("pqpqpqpq")) == 8


def byte_level_bpe(pattern, normalizer=None):
    """A byte-level BPE trained on LONG, with another pattern of pre-tokens."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([LONG], trainer)
    return TextTokenizer(tokenizer)


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "tokenizer",
    [load_tokenizer("bytes"), TRAINED, byte_level_bpe(LLAMA_3)],
    ids=["bytes", "gpt-2", "llama-3"],
)
def test_a_text_cut_where_the_tokenizer_says_has_the_tokens_of_the_whole(tokenizer):
    cuts = set()
    for end in range(500, len(LONG), 61):
        cut = tokenizer.last_cut(LONG[:end])
        assert end - 500 < cut <= end
        cuts.add(cut)
    pieces = [LONG[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(LONG)])]
    whole = tokenizer.encode(LONG)
    np.testing.assert_array_equal(np.concatenate(tokenizer.encode_batch(pieces)), whole)


def test_a_text_is_not_cut_where_tokens_cross_every_border():
    assert TRAINED.last_cut("x" * 5000) == 0
    # As SentencePiece's: words begin with their space, and so does each text.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "▁": 1, "a": 2}, []))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    assert TextTokenizer(tokenizer).last_cut("a " * 1000) == 0
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    assert TextTokenizer(tokenizer).last_cut("a " * 1000) == 0


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (load_tokenizer("bytes"), "é", [1, 1]),
        (TextTokenizer(word_level({"<unk>": 0, "</s>": 1, "a": 2})), " a  東京 a ", [2, 8, 3]),
        (TextTokenizer(word_level({"<unk>": 0, "</s>": 1})), "  ", []),
    ],
)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, text, expected):
    ((ids, lengths),) = tokenizer.encode_with_bytes([text])
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert (lengths.tolist(), lengths.dtype) == (expected, np.int32)


@given(st.text(min_size=1))
def test_the_bytes_of_a_trained_tokenizers_tokens_add_up(text):
    ((ids, lengths),) = TRAINED.encode_with_bytes([text])
    assert len(ids) == len(lengths)
    assert lengths.sum() == len(text.encode())
    assert (lengths >= 0).all()


def test_text_that_does_not_come_back_is_shown():
    lossy = TextTokenizer(word_level({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}))
    assert describe_losses(lossy, ["a", "a b"]) == ""
    assert "1 of 2 samples" in describe_losses(lossy, ["a", "a c b"])
    assert "'a c b', which becomes 'a <unk> b'" in describe_losses(lossy, ["a", "a c b"])


def test_one_unbroken_word_is_learnt_from_in_linear_time():
    """Ten times the time of a run of words would be far from the square's thousandfold."""
    word = "".join(np.random.default_rng(0).choice(list("abcd"), 200_000))
    tokenizer = train_tokenizer([word], 600)
    assert len(tokenizer.encode(word[:1000])) < 400
    spaces = train_tokenizer([" " * 200_000 + "a"], 270)
    assert spaces.decode(spaces.encode(" " * 300)) == " " * 300
