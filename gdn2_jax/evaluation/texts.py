"""How well a model predicts texts of any length, read in windows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gdn2_jax.data import Tokenizer
from gdn2_jax.evaluation.perplexity import Perplexity, exponential
from gdn2_jax.evaluation.scoring import LocalModel, score_tokens
from gdn2_jax.fields import require


class Window(NamedTuple):
    """A span of a text.

    Attributes:
      start: its first token.
      stop: the token after its last one.
      count: how many tokens at its end are scored.
    """

    start: int
    stop: int
    count: int


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Yields windows that together score each token but the first exactly once.

    Each window scores the next `stride` tokens, and reads the `length` tokens before its last one.
    With `stride == length` they do not overlap, but for the last one, as in the rolling
    log-likelihoods of lm-evaluation-harness.

    Args:
      tokens: of the text; no token stands before the first, so it is not scored.
      length: tokens that the model reads of a window.
      stride: tokens scored in each.

    Raises:
      ValueError: the stride is not between 1 and the length.
    """
    require("stride", 1 <= stride <= length, f"1 to {length}, the window's length", stride)
    for first in range(1, tokens, stride):
        stop = min(first + stride, tokens)
        yield Window(max(0, stop - 1 - length), stop, stop - first)


class TextPerplexity(NamedTuple):
    """Result for texts.

    Attributes:
      total: over all texts.
      word_perplexity: exponential of the loss per word, where words are what white space divides.
      ends: numbers of tokens read, 1, 2, 4, ..., each the end of a bin.
      losses: mean loss in nats of each bin. A bin holds the tokens before which more tokens were read
        than the end of the bin before, and at most its own end.
      counts: tokens of each bin.
    """

    total: Perplexity
    word_perplexity: float
    ends: list[int]
    losses: list[float]
    counts: list[int]


def text_perplexity(
    model: LocalModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
    first: int | None = None,
    progress: str | None = None,
) -> TextPerplexity:
    """Evaluates texts, each from its beginning to its end.

    Args:
      model: from `on_local_devices`.
      tokenizer: of the model.
      texts: each a document; its end is not predicted.
      length: tokens of a window, also more than the model was trained with.
      stride: tokens scored in each window, see `windows`; `length` if None.
      batch_size: windows at once on a device.
      first: token before each text; the one that ends a document if None.
      progress: name of a progress bar; None shows none.

    Returns:
      Perplexity, bits per byte, and losses by the number of tokens read.

    Raises:
      ValueError: the texts are empty, or an argument is out of its range.
    """
    require("length", length >= 1, "at least 1", length)
    first = tokenizer.end_of_document if first is None else first
    documents = [[first, *ids.tolist()] for ids in tokenizer.encode_batch(texts)]
    rows = [
        (document[window.start : window.stop], window.count)
        for document in documents
        for window in windows(len(document), length, stride or length)
    ]
    if not rows:
        raise ValueError("texts: expected at least one token, got none")
    sequences, counts = zip(*rows, strict=True)
    scores = score_tokens(model, sequences, counts, batch_size=batch_size, progress=progress)
    losses = np.concatenate([score.losses for score in scores]).astype(np.float64)
    read = np.concatenate(
        [np.arange(len(row) - count, len(row)) for row, count in zip(sequences, counts)]
    )
    # Bin 0 is 1 token read, bin i the numbers in (2^(i-1), 2^i].
    bins = np.ceil(np.log2(read)).astype(int)
    sizes = np.bincount(bins)
    found = np.flatnonzero(sizes)
    means = np.bincount(bins, losses)[found] / sizes[found]
    total = float(losses.sum())
    num_bytes = sum(len(text.encode()) for text in texts)
    return TextPerplexity(
        Perplexity.of(total, len(losses), num_bytes),
        exponential(total / max(1, sum(len(text.split()) for text in texts))),
        (2**found).tolist(),
        means.tolist(),
        sizes[found].tolist(),
    )
