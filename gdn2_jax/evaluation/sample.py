"""Text from a model."""

from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

from gdn2_jax.data import Tokenizer
from gdn2_jax.fields import require, require_text
from gdn2_jax.models import ModelConfig, generate

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def sample_text(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    special_tokens: bool = False,
    stream: TextIO | None = None,
) -> list[str]:
    """Continues prompts; each is the beginning of a document.

    A sample ends at the end of its document, before a stop string, or after `max_new_tokens`.

    Args:
      config: the model's configuration.
      params: its parameters.
      tokenizer: of the model.
      prompts: text to continue, or several; may be empty.
      max_new_tokens: as in `gdn2_jax.models.generate`.
      batch_size: number of samples of each prompt.
      temperature: as in `generate`.
      top_k: as in `generate`.
      top_p: as in `generate`.
      seed: as in `generate`.
      stop: strings before which a sample ends.
      special_tokens: read special tokens that a prompt spells out as such, not as text.
      stream: where to write prompt and text of the first sample as it grows.

    Returns:
      The samples, each with its prompt; samples of one prompt follow each other.

    Raises:
      ValueError: if an argument is out of its range.
    """
    require("batch_size", batch_size >= 1, "at least 1", batch_size)
    strings = not isinstance(stop, str) and all(stop)
    require("stop", strings, "strings that are not empty", stop)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for prompt in prompts:
        require_text("prompts", prompt)
    prompts = [prompt for prompt in prompts for _ in range(batch_size)]
    rows = [
        [tokenizer.end_of_document, *tokenizer.encode(prompt, special_tokens)] for prompt in prompts
    ]
    if stream is not None:
        stream.write(prompts[0])
        stream.flush()
    texts = continue_rows(
        config,
        params,
        tokenizer,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        stream=stream,
    )
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def continue_rows(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    stream: TextIO | None = None,
    **options: Any,
) -> list[str]:
    """Returns the text that follows each prompt of token ids, sampled as by `sample_text`.

    Options are those of `gdn2_jax.models.generate`.
    """
    eos = tokenizer.end_of_document
    texts = [_GrowingText(tokenizer, row, stop) for row in rows]

    def write(text: str) -> None:
        if stream is not None:
            stream.write(text)
            stream.flush()

    def add(column: np.ndarray) -> list[bool]:
        for i, (text, token) in enumerate(zip(texts, column.tolist(), strict=True)):
            new = text.end() if token == eos else text.add(token)
            if i == 0:
                write(new)
        return [text.ended for text in texts]

    generate(config, params, rows, eos=eos, on_token=add, **options)
    write(texts[0].end())
    for text in texts[1:]:
        text.end()
    return [text.text for text in texts]


class _GrowingText:
    """The text of tokens that follow a prompt, up to a stop string.

    Attributes:
      text: what is certain: without bytes that do not yet make up a character, and without what
        may be the beginning of a stop string.
      ended: no token can add anything.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        # The tokens since the last but one time that they made up whole characters, and how many
        # of them there were the last time. A token's text may depend on the one before.
        self._ids, self._whole = list(prompt), len(prompt)
        self._held = ""
        self.text, self.ended = "", False

    def add(self, token: int) -> str:
        """Returns what has become certain."""
        if self.ended:
            return ""
        self._ids.append(token)
        new = self._undecided()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._ids, self._whole = self._ids[self._whole :], len(self._ids) - self._whole
        return self._take(new)

    def end(self) -> str:
        """Returns what no token can complete any more."""
        if self.ended:
            return ""
        new = self._take(self._undecided())
        if not self.ended:
            self.text, self.ended = self.text + self._held, True
            new += self._held
        return new

    def _undecided(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._whole])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _take(self, new: str) -> str:
        text = self._held + new
        found = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            new, self._held, self.ended = text[: min(found)], "", True
        else:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            new, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
