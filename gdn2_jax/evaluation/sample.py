"""Text from a model."""

from typing import Any, TextIO

import numpy as np

from gdn2_jax.data import Tokenizer
from gdn2_jax.models import ModelConfig, generate


def sample_text(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    batch_size: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stream: TextIO | None = None,
) -> list[str]:
    """Continues a prompt that stands at the beginning of a document.

    Args:
      config: the model's configuration.
      params: its parameters.
      tokenizer: of the model.
      prompt: text to continue; may be empty.
      max_new_tokens: as in `gdn2_jax.models.generate`.
      batch_size: number of samples.
      temperature: as in `generate`.
      top_k: as in `generate`.
      top_p: as in `generate`.
      seed: as in `generate`.
      stream: where to write prompt and text of the first sample as it grows.

    Returns:
      The samples, each with the prompt.

    Raises:
      ValueError: if an argument is out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    ids = [tokenizer.end_of_document, *tokenizer.encode(prompt)]
    on_token = None
    if stream is not None:
        on_token = _TextStream(tokenizer, stream, ids).add
    tokens = generate(
        config,
        params,
        np.tile(np.array(ids, np.int32), (batch_size, 1)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_token=on_token,
    )
    return [tokenizer.decode(row) for row in np.asarray(tokens)]


class _TextStream:
    """Writes the text of a growing list of tokens."""

    def __init__(self, tokenizer: Tokenizer, stream: TextIO, ids: list[int]):
        self._tokenizer, self._stream, self._ids = tokenizer, stream, list(ids)
        self._length = 0
        self._write()

    def add(self, column: np.ndarray) -> None:
        self._ids.append(int(column[0]))
        self._write()

    def _write(self) -> None:
        # Bytes that do not yet make up a character decode to U+FFFD; more tokens may complete it.
        text = self._tokenizer.decode(self._ids).rstrip("\N{REPLACEMENT CHARACTER}")
        self._stream.write(text[self._length :])
        self._stream.flush()
        self._length = max(self._length, len(text))
