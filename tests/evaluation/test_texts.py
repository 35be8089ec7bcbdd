"""Perplexity of texts in windows, against the losses of windows that are written out."""

import math

import jax
import numpy as np
import pytest

from gdn2_jax.data import load_tokenizer
from gdn2_jax.evaluation import on_local_devices, readouts, text_perplexity
from gdn2_jax.evaluation.texts import Window, windows

BYTES = load_tokenizer("bytes")


@pytest.mark.parametrize(
    ("tokens", "length", "stride", "expected"),
    [
        (7, 3, 3, [Window(0, 4, 3), Window(3, 7, 3)]),
        (6, 3, 3, [Window(0, 4, 3), Window(2, 6, 2)]),
        (6, 4, 2, [Window(0, 3, 2), Window(0, 5, 2), Window(1, 6, 1)]),
        (3, 9, 9, [Window(0, 3, 2)]),
        (1, 9, 9, []),
    ],
)
def test_windows_score_each_token_once(tokens, length, stride, expected):
    assert list(windows(tokens, length, stride)) == expected


@pytest.mark.parametrize("stride", [0, 4])
def test_a_stride_beyond_the_window_is_refused(stride):
    with pytest.raises(ValueError, match=f"^stride: expected 1 to 3, .*got {stride}"):
        list(windows(9, 3, stride))


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils", reason='needs pip install ".[eval]"')
    for tokens in range(2, 30):
        theirs = [
            utils.make_disjoint_window(window)
            for window in utils.get_rolling_token_windows(list(range(1, tokens)), 0, 8, 1)
        ]
        text = list(range(tokens))
        ours = [
            (text[w.start : w.stop - w.count], text[w.stop - w.count : w.stop])
            for w in windows(tokens, 8, 8)
        ]
        assert ours == theirs


@pytest.mark.parametrize("stride", [None, 20])
def test_losses_are_those_of_the_windows(hybrid, stride):
    texts = ["".join(chr(97 + i * i % 23) for i in range(100)), "ü b"]
    result = text_perplexity(
        on_local_devices(*hybrid, jax.local_devices()[:2]),
        BYTES,
        texts,
        length=40,
        stride=stride,
        batch_size=2,
    )
    losses, read = [], []
    for text in texts:
        tokens = np.array([[256, *text.encode()]])
        for window in windows(tokens.size, 40, stride or 40):
            inputs = tokens[:, window.start : window.stop]
            loss, _ = readouts.token_results(*hybrid, inputs[:, :-1], inputs[:, 1:])
            losses += np.asarray(loss, np.float64)[0, -window.count :].tolist()
            read += range(inputs.size - window.count, inputs.size)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert result.total.tokens == len(losses) == num_bytes
    assert result.total.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.total.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result.total.bits_per_byte == pytest.approx(np.mean(losses) / math.log(2), abs=1e-5)
    assert result.word_perplexity == pytest.approx(math.exp(np.sum(losses) / 3), rel=1e-3)
    assert result.ends == [1, 2, 4, 8, 16, 32, 64]
    assert sum(result.counts) == len(losses)
    chosen = [loss for loss, n in zip(losses, read) if 16 < n <= 32]
    assert result.losses[5] == pytest.approx(np.mean(chosen), abs=1e-5)


def test_a_long_text_without_spaces_is_one_word_of_infinite_perplexity(hybrid):
    model = on_local_devices(*hybrid, jax.local_devices()[:2])
    result = text_perplexity(model, BYTES, ["q" * 300], length=40, batch_size=2)
    assert result.total.loss * 300 > math.log(1.7e308)
    assert result.word_perplexity == math.inf and math.isfinite(result.total.perplexity)


def test_texts_without_tokens_are_refused(hybrid):
    model = on_local_devices(*hybrid, jax.local_devices()[:1])
    with pytest.raises(ValueError, match="^texts: expected at least one token, got none"):
        text_perplexity(model, BYTES, [""], length=4)
