import io

import numpy as np
import pytest

from gdn2_jax.data import load_tokenizer
from gdn2_jax.evaluation import sample, sample_text

BYTES = load_tokenizer("bytes")


def test_streamed_text_is_the_returned_one(hybrid):
    stream = io.StringIO()
    options = {"max_new_tokens": 20, "batch_size": 2, "seed": 1}
    streamed = sample_text(*hybrid, BYTES, "über ", stream=stream, **options)
    assert stream.getvalue() == streamed[0]
    assert streamed[0].startswith("über ") and streamed[0] != streamed[1]
    assert sample_text(*hybrid, BYTES, "über ", **options) == streamed


@pytest.fixture
def says(monkeypatch):
    """A function that makes a model of texts, one a row, ended by token 256; it returns its calls."""

    def make(*texts):
        calls = []

        def generate(config, params, prompt, *, max_new_tokens, on_token, **options):
            calls.append({"prompt": prompt, **options, "columns": 0})
            rows = [[*text.encode(), *[256] * max_new_tokens] for text in texts]
            for column in np.array([row[:max_new_tokens] for row in rows]).T:
                calls[-1]["columns"] += 1
                if all(on_token(column)):
                    break

        monkeypatch.setattr(sample, "generate", generate)
        return calls

    return make


def sampled(prompts, tokens, **options):
    return sample_text(None, None, BYTES, prompts, max_new_tokens=tokens, **options)


class Written(list):
    """A stream that lists what is written at a time."""

    write, flush = list.append, list.copy


def test_characters_are_streamed_when_their_last_byte_is_there(says):
    says("€x")
    stream = Written()
    assert sampled("a", 4, stream=stream) == ["a€x"]
    assert stream == ["a", "", "", "€", "x", ""]


def test_bytes_that_never_make_up_a_character_are_streamed_in_the_end(says):
    says("€€")
    stream = Written()
    assert sampled("a", 5, stream=stream) == ["a€\ufffd"]
    assert "".join(stream) == "a€\ufffd"


def test_a_sample_ends_at_the_end_of_its_document(says):
    calls = says("one", "three", "")
    assert sampled(["a ", "b ", "c "], 20) == ["a one", "b three", "c "]
    assert calls[0]["columns"] == len("three") + 1 and calls[0]["eos"] == 256


def test_a_sample_ends_before_a_stop_string_which_is_never_streamed(says):
    calls = says("one.\n\nTwo", "a\n", "END")
    stream = Written()
    texts = sampled(["", "", ""], 20, stop=["\n\n", "END"], stream=stream)
    assert texts == ["one.", "a\n", ""]
    assert "".join(stream) == "one." and calls[0]["columns"] == len("one.\n\n")


def test_what_only_begins_like_a_stop_string_is_text(says):
    says("aab\nc\n")
    stream = Written()
    assert sampled("", 20, stop=["\n\n", "aaab"], stream=stream) == ["aab\nc\n"]
    assert stream == ["", "", "", "aab", "", "\nc", "", "\n", ""]


def test_a_long_text_takes_time_linear_in_its_length(says):
    decoded = []

    class Counting:
        end_of_document, encode = 256, BYTES.encode

        def decode(self, ids):
            decoded.append(len(ids))
            return BYTES.decode(ids)

    says("x" * 500)
    sample_text(None, None, Counting(), "a" * 100, max_new_tokens=500)
    assert sum(decoded) < 5 * 600


def test_samples_begin_at_the_beginning_of_a_document_and_follow_their_prompts(says):
    calls = says(*"1234")
    assert sampled(["ab", "c"], 1, batch_size=2) == ["ab1", "ab2", "c3", "c4"]
    assert calls[0]["prompt"] == [[256, 97, 98]] * 2 + [[256, 99]] * 2


def test_special_tokens_of_a_prompt_are_read_on_demand(says):
    calls = says("x")
    prompt = "a<|endoftext|>"
    assert sampled(prompt, 1, special_tokens=True) == [prompt + "x"]
    assert calls[0]["prompt"] == [[256, 97, 256]]
    assert sampled(prompt, 1) == [prompt + "x"]
    assert calls[1]["prompt"] == [[256, *prompt.encode()]]


def test_prompts_of_different_lengths_are_continued_together(hybrid):
    prompts = ["a", "über and on, far beyond"]
    together = sample_text(*hybrid, BYTES, prompts, max_new_tokens=6, temperature=0)
    for prompt, text in zip(prompts, together, strict=True):
        assert [text] == sample_text(*hybrid, BYTES, prompt, max_new_tokens=6, temperature=0)


@pytest.mark.parametrize("stop", ["ab", [""]])
def test_malformed_stop_strings_are_named(stop):
    with pytest.raises(ValueError, match="^stop: expected strings .*got"):
        sampled("", 1, stop=stop)


def test_a_prompt_that_is_not_utf_8_is_named():
    with pytest.raises(ValueError, match=r"^prompts: expected UTF-8 text, got 'a\\udcfc'$"):
        sampled(["a", "a\udcfc"], 1)


def test_batch_of_nothing_is_refused(hybrid):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        sample_text(*hybrid, BYTES, "", max_new_tokens=1, batch_size=0)
