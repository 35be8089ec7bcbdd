"""What a data set is made of: one dataclass, filled from the command line or by hand."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gdn2_jax.fields import check_types, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, tokenizer, packing and split of a training run.

    Raises:
      ValueError: if a field is out of its range (names the field).
    """

    paths: tuple[str, ...] = ()
    """.txt, .jsonl, .parquet or .array_record files, the first two also as .gz, .npy files of token
    ids, or directories of them (searched recursively). None: the sources and documentation of the
    running Python."""

    validation_paths: tuple[str, ...] = ()
    """The same for validation, in place of a fraction of the text."""

    text_field: str = "text"
    """The .jsonl field, .parquet column or .array_record feature (of a tf.train.Example) that holds
    the text, or lists of token ids."""

    document_separator: str = ""
    r"""Cuts each .txt file into documents where this string stands; \n, \r and \t may be written
    with a backslash. Empty: one document a file."""

    tokenizer: str = "bytes"
    """"bytes" (257 entries: the byte values and the end of a document); the path of a Hugging Face
    tokenizer.json; or "train:N", a byte-level BPE of N entries trained on the training documents."""

    end_of_document: str = ""
    """The token that ends each document, for a tokenizer.json. Empty: the usual names are tried."""

    sequence_length: int = 512
    """Tokens of an input sequence, T; the data is cut into blocks of T + 1 tokens."""

    validation_fraction: float = 0.05
    """Share of the text that is kept for validation: whole documents, and the ends of those of more
    than a twentieth of the text. 0: no validation."""

    reset_at_documents: bool = False
    """Whether state and attention start afresh at each document. The paper's recipe does not."""

    seed: int = 0
    """Shuffles the training documents, anew in each epoch. The split does not depend on it."""

    num_workers: int = 0
    """Processes that prepare batches. 0: a thread of the main process."""

    cache_directory: str = "~/.cache/gdn2_jax"
    """Where tokenized corpora are kept."""

    verify: bool = False
    """Whether to hash text and cache anew, rather than to trust unchanged sizes and times."""

    def __post_init__(self):
        check_types(self, "data.")
        for name in ("paths", "validation_paths"):
            value = getattr(self, name)
            given = type(value) is not str and "" not in value
            self._require(name, given, "a tuple of files and directories, none of them empty")
        for name in ("text_field", "tokenizer", "cache_directory"):
            self._require(name, getattr(self, name) != "", "a name that is not empty")
        size = self.trained_vocab_size
        expected = "train:N with N >= 257 (256 bytes and the end of document)"
        self._require("tokenizer", size is None or size >= 257, expected)
        if self.tokenizer == "bytes" or size is not None:
            expected = f"none, as the tokenizer {self.tokenizer!r} has its own"
            self._require("end_of_document", self.end_of_document == "", expected)
        self._require("sequence_length", self.sequence_length >= 1, "at least 1")
        self._require("validation_fraction", 0 <= self.validation_fraction < 1, "one in [0, 1)")
        self._require("seed", 0 <= self.seed < 2**63, "one in [0, 2**63)")
        self._require("num_workers", self.num_workers >= 0, "at least 0")

    def _require(self, name: str, fulfilled: bool, expected: str) -> None:
        require(f"data.{name}", fulfilled, expected, getattr(self, name))

    @property
    def validates(self) -> bool:
        """Whether there is text for validation."""
        return bool(self.validation_paths) or self.validation_fraction > 0

    @property
    def separator(self) -> str:
        r"""`document_separator` with the characters that \n, \r, \t and \\ stand for."""
        escapes = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
        return re.sub(r"\\([nrt\\])", lambda m: escapes[m[1]], self.document_separator)

    @property
    def trained_vocab_size(self) -> int | None:
        """N of a tokenizer "train:N", None for the other tokenizers."""
        kind, colon, size = self.tokenizer.partition(":")
        if (kind, colon) != ("train", ":"):
            return None
        return int(size) if size.isdecimal() else -1


def path_options(options: Sequence[str]) -> list[str]:
    """Rewrites a command line's paths so that each option for them stands once, with all paths.

    tyro's aliases would let the last of repeated options win without a word.

    Args:
      options: of a configuration whose `data` is a `DataConfig`; "--data" is short for
        "--data.paths".

    Raises:
      ValueError: if such an option has no path.
    """
    names = {"--data": "--data.paths", "--data.validation_paths": "--data.validation-paths"}
    others, given = [], {}
    current = None
    for option in options:
        name, equals, value = option.partition("=")
        name = names.get(name, name)
        if name in ("--data.paths", "--data.validation-paths"):
            current = given.setdefault(name, [])
            current += [value] * bool(equals)
        elif option.startswith("-") or current is None:
            others.append(option)
            current = None
        else:
            current.append(option)
    for name, values in given.items():
        if not values:
            raise ValueError(f"{name}: expected files or directories, got none")
        others += [name, *values]
    return others
