"""Tokenized documents on disk, read through memory maps."""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, Integer

from gdn2_jax.files import replacing


class TokenStore:
    """The tokens of many documents, back to back, each document closed by its end token.

    Attributes:
      tokens: uint16 or int32 [num_tokens], mapped from disk.
      offsets: int64 [num_documents + 1]; document i is `tokens[offsets[i]:offsets[i + 1]]`.
      num_bytes: UTF-8 bytes of the text.
      byte_lengths: int32 [num_tokens], how many of them each token stands for, so that a loss per
        token converts to bits per byte; mapped from disk. None where they were not noted.
    """

    tokens: Integer[np.ndarray, " num_tokens"]
    offsets: Int64[np.ndarray, " num_documents_plus_1"]
    num_bytes: int
    byte_lengths: Int32[np.ndarray, " num_tokens"] | None

    def __init__(self, directory: Path, name: str):
        self._source = (directory, name)
        facts = json.loads((directory / f"{name}.json").read_text())
        self.num_bytes = facts["num_bytes"]
        self.tokens = _map(directory / f"{name}.tokens", facts["dtype"])
        self.offsets = _map(directory / f"{name}.offsets", "<i8")
        lengths = directory / f"{name}.byte_lengths"
        self.byte_lengths = _map(lengths, "<i4") if lengths.exists() else None

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

    def __init__(
        self,
        directory: Path,
        name: str,
        vocab_size: int,
        end_of_document: int,
        byte_lengths: bool = False,
    ):
        dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<i4")
        self._directory, self._name = directory, name
        self._end = np.array([end_of_document], dtype)
        self._ends: list[int] = [0]
        self._num_tokens = self._num_bytes = self._begun = 0
        self._tokens = (directory / f"{name}.tokens").open("wb")
        self._lengths = (directory / f"{name}.byte_lengths").open("wb") if byte_lengths else None

    def append(
        self,
        tokens: Integer[np.ndarray, " N"],
        num_bytes: int,
        *,
        ends: bool = True,
        byte_lengths: Int32[np.ndarray, " N"] | None = None,
    ) -> bool:
        """Adds a piece of a document; a document of no bytes is left out.

        Args:
          tokens: of the piece.
          num_bytes: UTF-8 bytes of its text.
          ends: whether its document ends with it.
          byte_lengths: bytes of each token, where the store keeps them.

        Returns:
          Whether a document was completed.
        """
        self._write(tokens, byte_lengths)
        self._begun += num_bytes
        if not (ends and self._begun):
            return False
        self._write(self._end, np.zeros(1))
        self._ends.append(self._num_tokens)
        self._num_bytes += self._begun
        self._begun = 0
        return True

    def close(self, order: Int64[np.ndarray, " documents"] | None = None) -> None:
        """Writes what belongs beside the tokens; puts the documents in an order, if given."""
        offsets = np.array(self._ends, np.int64)
        for file, dtype in ((self._tokens, self._end.dtype), (self._lengths, np.dtype("<i4"))):
            if file is not None:
                file.close()
                if order is not None:
                    _reorder(Path(file.name), dtype, offsets, order)
        if order is not None:
            offsets = np.cumsum([0, *np.diff(offsets)[order]], dtype=np.int64)
        offsets.astype("<i8").tofile(self._directory / f"{self._name}.offsets")
        facts = {"dtype": self._end.dtype.str, "num_bytes": self._num_bytes}
        (self._directory / f"{self._name}.json").write_text(json.dumps(facts))

    def _write(self, tokens, byte_lengths):
        self._tokens.write(tokens.astype(self._end.dtype).tobytes())
        self._num_tokens += len(tokens)
        if self._lengths is not None:
            self._lengths.write(byte_lengths.astype("<i4").tobytes())


def _reorder(path, dtype, offsets, order):
    old = _map(path, dtype)
    with replacing(path) as temporary, temporary.open("wb") as file:
        for document in order:
            file.write(old[offsets[document] : offsets[document + 1]].tobytes())


def _map(path, dtype):
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
