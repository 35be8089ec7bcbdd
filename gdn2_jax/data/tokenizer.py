"""Text to token ids and back: bytes, or any Hugging Face tokenizer.json."""

import functools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from gdn2_jax.files import write_text

_END_OF_DOCUMENT = "<|endoftext|>"
_USUAL_ENDS = (_END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")

# Where a long document may be cut for encoding: between words at best. The looks around keep to the
# characters whose pre-tokens are apart in the usual patterns.
_CUTS = tuple(
    re.compile(pattern) for pattern in (r"[^\W_](?= [^\W_])", r"\S(?=\s)", r"[^\w\s](?=\w)")
)
_WINDOW = 128
_SEARCHED = 4096
_TRIED = 8

# Longer runs without white space are cut before merges are learnt, whose time grows with the square.
_LONGEST_WORD = 256

# More text than this hardly changes the merges.
_TRAINING_CHARACTERS = 2**28


@runtime_checkable
class Tokenizer(Protocol):
    """What the data, the trainer and the sampler need of a tokenizer."""

    vocab_size: int
    """One more than the greatest token id."""

    end_of_document: int
    """The token that stands after each document."""

    def encode(self, text: str, special_tokens: bool = False) -> Int32[np.ndarray, " N"]:
        """Returns the tokens of a text, with no token added.

        With `special_tokens` the names of special tokens in the text stand for these tokens;
        otherwise they are text like any other.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " N"]]:
        """Encodes many texts at once."""
        ...

    def encode_with_bytes(
        self, texts: Sequence[str]
    ) -> list[tuple[Int32[np.ndarray, " N"], Int32[np.ndarray, " N"]]]:
        """Encodes many texts; returns with each one's tokens the UTF-8 bytes each token is for."""
        ...

    def byte_lengths(self) -> Int32[np.ndarray, " vocab_size"]:
        """Returns the UTF-8 bytes that each token is for, as far as that holds for all texts."""
        ...

    def last_cut(self, text: str) -> int:
        """Returns the last place near the end where both sides of `text` can be encoded apart.

        Their tokens are then those of the whole. 0 if there is no such place.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the tokens; special tokens and unknown ids give no text."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes a file that `load_tokenizer` reads."""


class ByteTokenizer:
    """The 256 byte values of UTF-8 text, and token 256 at the end of each document.

    A byte-level BPE without merges gives the same ids, hundreds of times slower.
    """

    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str, special_tokens: bool = False) -> Int32[np.ndarray, " N"]:
        """Returns the bytes of a text; the special token is called <|endoftext|>."""
        if special_tokens:
            first, *others = (self.encode(part) for part in text.split(_END_OF_DOCUMENT))
            end = np.array([self.end_of_document], np.int32)
            return np.concatenate([first, *(part for ids in others for part in (end, ids))])
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " N"]]:
        """Encodes many texts."""
        return [self.encode(text) for text in texts]

    def encode_with_bytes(
        self, texts: Sequence[str]
    ) -> list[tuple[Int32[np.ndarray, " N"], Int32[np.ndarray, " N"]]]:
        """Encodes many texts; each token is for one byte."""
        return [(ids, np.ones_like(ids)) for ids in self.encode_batch(texts)]

    def byte_lengths(self) -> Int32[np.ndarray, " vocab_size"]:
        """Returns one for each byte and nothing for the end of a document."""
        return np.array([1] * 256 + [0], np.int32)

    def last_cut(self, text: str) -> int:
        """Returns the length of a text: bytes are encoded apart everywhere."""
        return len(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the bytes; parts that are not UTF-8 become U+FFFD."""
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        """Writes a file that `load_tokenizer` reads."""
        write_text(Path(path), json.dumps({"type": "bytes"}))


class TextTokenizer:
    """A `tokenizers.Tokenizer`, with a token chosen as the end of a document.

    Raises:
      ValueError: if the tokenizer has no such token.
    """

    def __init__(self, tokenizer, end_of_document: str = ""):
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        candidates = (end_of_document,) if end_of_document else _USUAL_ENDS
        known = [token for token in candidates if token in vocabulary]
        if not known:
            raise ValueError(
                f"end_of_document: expected the name of the token that ends a document, got a "
                f"tokenizer without {' or '.join(candidates)}"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The name of a special token in a document must stay text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.end_of_document = vocabulary[known[0]]
        # Ids need not be dense, and the model's table must hold the greatest.
        self.vocab_size = max(vocabulary.values()) + 1

    def encode(self, text: str, special_tokens: bool = False) -> Int32[np.ndarray, " N"]:
        """Returns the tokens of a text, with no token added."""
        tokenizer = self._reader_of_special_tokens if special_tokens else self._tokenizer
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _reader_of_special_tokens(self):
        tokenizer = type(self._tokenizer).from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " N"]]:
        """Encodes many texts in parallel."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_bytes(
        self, texts: Sequence[str]
    ) -> list[tuple[Int32[np.ndarray, " N"], Int32[np.ndarray, " N"]]]:
        """Encodes many texts in parallel; returns with each one's tokens the bytes of each token.

        A character that is spread over several tokens counts for the first; what no token stands
        for, such as white space that the tokenizer drops, counts for the next, or the last.
        """
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int32), _byte_lengths(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def byte_lengths(self) -> Int32[np.ndarray, " vocab_size"]:
        """Returns the bytes of each token: exact for byte-level BPE and SentencePiece's tokens."""
        lengths = np.zeros(self.vocab_size, np.int32)
        decoder = self._tokenizer.decoder
        byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if byte_level:  # a character for each byte
                lengths[number] = len(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                lengths[number] = 1
            else:
                lengths[number] = len(token.replace("▁", " ").removeprefix("##").encode())
        for number, token in self._tokenizer.get_added_tokens_decoder().items():
            lengths[number] = 0 if token.special else len(token.content.encode())
        lengths[self.end_of_document] = 0
        return lengths

    def last_cut(self, text: str) -> int:
        """Returns the last place found where the tokens of both sides are those of the whole.

        A window around the place is encoded as one and as two. Without a pre-tokenizer, which keeps
        tokens within words, that would prove nothing of the text beyond.
        """
        if self._tokenizer.pre_tokenizer is None:
            return 0
        start = max(_WINDOW, len(text) - _SEARCHED)
        for pattern in _CUTS:
            places = [match.end() for match in pattern.finditer(text, start, len(text) - _WINDOW)]
            for place in places[: -_TRIED - 1 : -1]:
                left, right = text[place - _WINDOW : place], text[place : place + _WINDOW]
                whole, first, second = self.encode_batch([left + right, left, right])
                if np.array_equal(whole, np.concatenate([first, second])):
                    return place
        return 0

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the tokens, without the special ones."""
        return self._tokenizer.decode([int(i) for i in ids])

    def save(self, path: str | Path) -> None:
        """Writes a Hugging Face tokenizer.json."""
        write_text(Path(path), self._tokenizer.to_str(pretty=True))


def load_tokenizer(name: str | Path, end_of_document: str = "") -> Tokenizer:
    """Returns the tokenizer "bytes", or the one in a file.

    Args:
      name: "bytes", or the path of a Hugging Face tokenizer.json or of a file that `save` wrote.
      end_of_document: the token that ends a document; empty: the usual names are tried.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not a tokenizer, or has no token for the end of a document.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f'tokenizer: expected "bytes", "train:N" or the path of a tokenizer.json, got {name}'
        )
    import tokenizers

    try:
        text = path.read_text(encoding="utf-8")
        if json.loads(text).get("type") == "bytes":
            return ByteTokenizer()
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"tokenizer: expected a tokenizer.json, got {name} ({error})") from error
    return TextTokenizer(tokenizer, end_of_document)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Trains a byte-level BPE, which encodes every text without loss.

    Args:
      documents: the text to learn from; the first 2**28 characters are read.
      vocab_size: entries, with the 256 bytes and the end of a document. A small corpus may yield
        fewer: see the result's `vocab_size`.

    Returns:
      The trained tokenizer.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_training_texts(documents, _TRAINING_CHARACTERS), trainer)
    return TextTokenizer(tokenizer)


def describe_losses(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Describes the `texts` that decoding does not give back; "" if there are none."""
    lost = [
        (text, back) for text in texts if (back := tokenizer.decode(tokenizer.encode(text))) != text
    ]
    if not lost:
        return ""
    text, back = lost[0]
    at = len(os.path.commonprefix([text, back]))
    shown = slice(max(0, at - 10), at + 20)
    return (
        f"{len(lost)} of {len(texts)} samples of the text do not come back from their tokens, such "
        f"as {text[shown]!r}, which becomes {back[shown]!r}"
    )


def _byte_lengths(text: str, offsets: Sequence[tuple[int, int]]) -> Int32[np.ndarray, " N"]:
    """Bytes of each token, from the characters (first, last + 1) that tokens cover."""
    if not offsets:
        return np.zeros(0, np.int32)
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    return np.diff(np.cumsum([0, *widths])[ends], prepend=0).astype(np.int32)


def _training_texts(documents: Iterable[str], limit: int) -> Iterator[str]:
    for document in documents:
        text = document[:limit]
        if max(map(len, text.split()), default=0) > _LONGEST_WORD:
            text = re.sub(rf"(\S{{{_LONGEST_WORD}}})(?=\S)", r"\1\n", text)
        yield re.sub(rf"(\s{{{_LONGEST_WORD}}})\s+", r"\1", text)
        limit -= len(document)
        if limit <= 0:
            return
