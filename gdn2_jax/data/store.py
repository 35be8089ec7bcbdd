"""Tokenized documents on disk, read through memory maps."""

import hashlib
import json
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer

_DIGESTS = "digests.json"


class TokenStore:
    """The tokens of many documents, back to back, each document closed by its end token.

    Attributes:
      tokens: uint16 or int32 [num_tokens], mapped from disk.
      offsets: int64 [num_documents + 1]; document i is `tokens[offsets[i]:offsets[i + 1]]`.
      num_bytes: UTF-8 bytes of the text, so that a loss per token converts to bits per byte:
        `loss / log(2) * num_tokens / num_bytes`.
    """

    tokens: Integer[np.ndarray, " num_tokens"]
    offsets: Int64[np.ndarray, " num_documents_plus_1"]
    num_bytes: int

    def __init__(self, directory: Path, name: str):
        self._source = (directory, name)
        facts = json.loads((directory / f"{name}.json").read_text())
        self.num_bytes = facts["num_bytes"]
        self.tokens = np.memmap(directory / f"{name}.tokens", facts["dtype"], mode="r")
        self.offsets = np.load(directory / f"{name}.offsets.npy", mmap_mode="r")

    def __reduce__(self):
        # A worker process opens the files anew: pickling a memory map would copy the tokens.
        return TokenStore, self._source

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, their end tokens included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents, none of them empty."""
        return len(self.offsets) - 1


class StoreWriter:
    """Writes the files of one `TokenStore`, piece by piece."""

    def __init__(self, directory: Path, name: str, vocab_size: int, end_of_document: int):
        self._directory, self._name = directory, name
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<i4")
        self._end = np.array([end_of_document], self._dtype)
        self._lengths: list[int] = []
        self._num_bytes = 0
        self._file = (directory / f"{name}.tokens").open("wb")

    def append(self, text: str, tokens: Integer[np.ndarray, " N"]) -> None:
        """Adds a document: its text and the same as tokens."""
        self._file.write(tokens.astype(self._dtype).tobytes() + self._end.tobytes())
        self._lengths.append(len(tokens) + 1)
        self._num_bytes += len(text.encode())

    def close(self) -> None:
        """Writes what belongs beside the tokens."""
        self._file.close()
        offsets = np.cumsum([0, *self._lengths], dtype=np.int64)
        np.save(self._directory / f"{self._name}.offsets.npy", offsets)
        facts = {"dtype": self._dtype.str, "num_bytes": self._num_bytes}
        (self._directory / f"{self._name}.json").write_text(json.dumps(facts))


def seal(directory: Path) -> None:
    """Notes the digest of every file of `directory`, for `is_intact`."""
    (directory / _DIGESTS).write_text(json.dumps(_digests(directory)))


def is_intact(directory: Path) -> bool:
    """Whether the files of `directory` are those that `seal` saw, byte for byte."""
    try:
        return json.loads((directory / _DIGESTS).read_text()) == _digests(directory)
    except (OSError, ValueError):
        return False


def file_digest(path: Path) -> str:
    """Returns the BLAKE2b digest of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.iterdir() if path.name != _DIGESTS)
    return {path.name: file_digest(path) for path in files}
