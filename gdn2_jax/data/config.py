"""What a data set is made of: one dataclass, filled from the command line or by hand."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass


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
        for name in ("paths", "validation_paths"):
            value = getattr(self, name)
            if type(value) is str:
                raise ValueError(f"{name} must be a tuple of strings, got the string {value!r}")
            if "" in value:
                raise ValueError(f"{name}: expected files or directories, got an empty name")
        if not self.text_field:
            raise ValueError("text_field must not be empty")
        if not self.tokenizer:
            raise ValueError('tokenizer must be "bytes", "train:N" or a path, got ""')
        if self.trained_vocab_size is not None and self.trained_vocab_size < 257:
            raise ValueError(
                "tokenizer must be train:N with N >= 257 (256 bytes and the end of document), "
                f"got {self.tokenizer!r}"
            )
        if self.end_of_document and (
            self.tokenizer == "bytes" or self.trained_vocab_size is not None
        ):
            raise ValueError(
                f"end_of_document is for a tokenizer.json; {self.tokenizer!r} has its own"
            )
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {self.sequence_length}")
        if not (math.isfinite(self.validation_fraction) and 0 <= self.validation_fraction < 1):
            raise ValueError(
                f"validation_fraction must be in [0, 1), got {self.validation_fraction}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}")
        if not self.cache_directory:
            raise ValueError("cache_directory must not be empty")

    @property
    def validates(self) -> bool:
        """Whether there is text for validation."""
        return bool(self.validation_paths) or self.validation_fraction > 0

    @property
    def separator(self) -> str:
        r"""`document_separator`, where \n, \r, \t and \\ have become what they stand for."""
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
