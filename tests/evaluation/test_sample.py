import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.data import load_tokenizer
from gdn2_jax.evaluation import sample, sample_text
from gdn2_jax.models import LanguageModel, ModelConfig


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=257,
        d_model=16,
        num_layers=1,
        num_heads=1,
        head_dim=16,
        mlp_dim=32,
        dtype="float32",
        implementation="recurrent",
    )
    variables = jax.jit(LanguageModel(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return config, variables["params"]


def test_streamed_text_is_the_returned_one(model):
    tokenizer, stream = load_tokenizer("bytes"), io.StringIO()
    options = {"max_new_tokens": 20, "batch_size": 2, "seed": 1}
    streamed = sample_text(*model, tokenizer, "über ", stream=stream, **options)
    assert stream.getvalue() == streamed[0].rstrip("\N{REPLACEMENT CHARACTER}")
    assert streamed[0].startswith("über ") and streamed[0] != streamed[1]
    assert sample_text(*model, tokenizer, "über ", **options) == streamed


def test_characters_are_streamed_when_their_last_byte_is_there(monkeypatch):
    """Tokens of a model that continues with a euro sign, byte by byte."""
    written = []

    def generate(config, params, prompt, *, on_token, **_):
        columns = [prompt]
        for byte in "€x".encode():
            on_token(np.array([byte]))
            written.append(stream.getvalue())
            columns.append([[byte]])
        return np.concatenate(columns, axis=1)

    monkeypatch.setattr(sample, "generate", generate)
    stream = io.StringIO()
    texts = sample_text(None, None, load_tokenizer("bytes"), "a", max_new_tokens=4, stream=stream)
    assert written == ["a", "a", "a€", "a€x"]
    assert texts == ["a€x"]


def test_sample_begins_at_the_beginning_of_a_document(monkeypatch):
    prompts = []

    def generate(config, params, prompt, **_):
        prompts.append(prompt)
        return prompt

    monkeypatch.setattr(sample, "generate", generate)
    sample_text(None, None, load_tokenizer("bytes"), "ab", max_new_tokens=1, batch_size=2)
    np.testing.assert_array_equal(prompts[0], [[256, 97, 98]] * 2)


def test_batch_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        sample_text(*model, load_tokenizer("bytes"), "", max_new_tokens=1, batch_size=0)
