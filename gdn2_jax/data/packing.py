"""Fixed-length sequences cut from shuffled documents, each found without reading the others."""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from gdn2_jax.data.store import TokenStore
from gdn2_jax.fields import require
from gdn2_jax.models import Batch


@dataclass(frozen=True)
class PackedSequences:
    """An endless list of training sequences over a token store.

    In each epoch the documents stand back to back in a new order and are cut into blocks of T + 1
    tokens that do not overlap: inputs are tokens 0..T-1 of a block and targets tokens 1..T, as in
    the paper's recipe. Tokens after the last whole block sit the epoch out. The blocks are then
    shuffled too, so that a batch does not consist of a few long documents. Sequence i is number
    `i % len(self)` of epoch `i // len(self)`, found with one binary search over the documents'
    cumulative lengths.

    Attributes:
      store: the tokenized documents.
      sequence_length: T.
      seed: shuffles documents and blocks; None leaves them in the order of the store.
      reset_at_documents: whether `segment_ids` number the documents along the row (from 1), so
        that state and attention restart at each; otherwise there are none.

    Raises:
      ValueError: if the store holds less than one block.
    """

    store: TokenStore
    sequence_length: int
    seed: int | None = None
    reset_at_documents: bool = False

    def __post_init__(self):
        require(
            "sequence_length",
            1 <= self.sequence_length < max(2, self.store.num_tokens),
            f"at least 1 and less than the documents' {self.store.num_tokens} tokens",
            self.sequence_length,
        )

    def __len__(self) -> int:
        """Sequences of one epoch."""
        return self.store.num_tokens // (self.sequence_length + 1)

    def __getitem__(self, index: int) -> Batch:
        """Returns sequence `index` >= 0: a row of a batch, each array of shape [T].

        `inputs`, `targets` and `segment_ids` are int32, `weights` float32 (all ones).
        """
        positions, counts = self._positions(index)
        tokens = self.store.tokens[positions].astype(np.int32)
        segment_ids = None
        if self.reset_at_documents:
            documents = np.arange(1, len(counts) + 1, dtype=np.int32)
            segment_ids = np.repeat(documents, counts)[:-1]
        weights = np.ones(self.sequence_length, np.float32)
        return Batch._make((tokens[:-1], tokens[1:], weights, segment_ids))

    def target_bytes(self, index: int) -> float:
        """Returns the bytes of text that the targets of sequence `index` stand for.

        Where the store has not noted them, the mean of its tokens counts for each.
        """
        if self.store.byte_lengths is None:
            return self.sequence_length * self.store.num_bytes / self.store.num_tokens
        positions, _ = self._positions(index)
        return float(self.store.byte_lengths[positions[1:]].sum())

    def _positions(
        self, index: int
    ) -> tuple[Int64[np.ndarray, " T_plus_1"], Int64[np.ndarray, " documents"]]:
        """Where a block's tokens lie in the store, and how many are of each document."""
        if index < 0:
            raise IndexError(f"sequences are counted from 0, got {index}")
        epoch, position = divmod(int(index), len(self))
        block = block_order(len(self), self.seed, epoch)[position]
        start = block * (self.sequence_length + 1)
        stop = start + self.sequence_length + 1
        order, ends = _packed_order(self.store, self.seed, epoch)

        first = np.searchsorted(ends, start, side="right")
        last = np.searchsorted(ends, stop, side="left")
        bounds = np.clip(ends[first : last + 1], start, stop)
        counts = np.diff(bounds, prepend=start)
        # A document moves from where it stands in the epoch to where it lies in the store.
        shifts = self.store.offsets[order[first : last + 1] + 1] - ends[first : last + 1]
        return np.arange(start, stop) + np.repeat(shifts, counts), counts


@dataclass(frozen=True)
class Excerpt:
    """Sequences of one epoch, evenly spaced over it.

    Attributes:
      sequences: whose first epoch it is.
      count: how many are taken; at most all.
    """

    sequences: PackedSequences
    count: int

    def __len__(self) -> int:
        """Sequences taken."""
        return min(self.count, len(self.sequences))

    def __getitem__(self, index: int) -> Batch:
        """Returns sequence `index` of those taken, as `PackedSequences` does."""
        return self.sequences[self._place(index)]

    def target_bytes(self) -> float:
        """Returns the bytes of text that the targets of all these sequences stand for."""
        return _target_bytes(self)

    def _place(self, index: int) -> int:
        return (2 * index + 1) * len(self.sequences) // (2 * len(self))


@functools.lru_cache(maxsize=4)  # the same at each validation of a run
def _target_bytes(excerpt: Excerpt) -> float:
    places = map(excerpt._place, range(len(excerpt)))
    return sum(map(excerpt.sequences.target_bytes, places))


@functools.lru_cache(maxsize=4)
def block_order(count: int, seed: int | None, epoch: int) -> Int64[np.ndarray, " count"]:
    """Returns the order in which an epoch's blocks are read."""
    return _permutation(count, seed, epoch, stream=1)


@functools.lru_cache(maxsize=4)
def _packed_order(
    store: TokenStore, seed: int | None, epoch: int
) -> tuple[Int64[np.ndarray, " documents"], Int64[np.ndarray, " documents"]]:
    """Returns an epoch's order of the documents and where each then ends, in tokens."""
    lengths = np.diff(store.offsets)
    order = _permutation(len(lengths), seed, epoch, stream=0)
    return order, np.cumsum(lengths[order])


def _permutation(
    count: int, seed: int | None, epoch: int, stream: int
) -> Int64[np.ndarray, " count"]:
    if seed is None:
        return np.arange(count)
    # Sorting raw Philox words: NumPy keeps them the same in all its versions, unlike
    # Generator.permutation, so a run can be resumed years later.
    philox = np.random.Philox(key=(epoch << 64) + seed, counter=[0, 0, 0, stream])
    return np.argsort(philox.random_raw(count), kind="stable")
