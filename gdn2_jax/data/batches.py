"""Batches of packed sequences through grain, each process reading its own rows."""

import multiprocessing
import os
import threading
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from gdn2_jax.data.packing import Excerpt, PackedSequences
from gdn2_jax.fields import require
from gdn2_jax.models import Batch

# Sequences of an endless stream: no run reads as many, and grain's index arithmetic stays exact.
_ENDLESS = 2**48


def train_iterator(
    sequences: PackedSequences,
    *,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    start_sequence: int = 0,
    num_workers: int = 0,
) -> grain.DatasetIterator:
    """Returns an endless iterator over this process's rows of the training batches.

    Batch n of the run holds sequences `start_sequence + n * B` to `start_sequence + (n + 1) * B
    - 1`, where B is `global_batch_size`. Process p of P has the batch's rows `p * B / P` to
    `(p + 1) * B / P - 1`. So the stream does not depend on the number of processes or workers. A
    run that has consumed N sequences goes on exactly with `start_sequence=N`. The iterator's own
    `get_state` and `set_state` (for orbax) count from `start_sequence` and fit an iterator made with
    the same arguments.

    Call `close()` on the iterator when done if `num_workers` > 0. Worker processes import the
    main script, which therefore needs an `if __name__ == "__main__"`.

    Args:
      sequences: from `prepare(config).train`.
      global_batch_size: B, sequences a batch over all processes.
      process_index: p, such as `jax.process_index()`.
      process_count: P, such as `jax.process_count()`; divides B.
      start_sequence: sequences consumed before, over all processes.
      num_workers: processes that prepare batches ahead; 0: a thread.

    Returns:
      An iterator of `gdn2_jax.models.Batch`, each array [B / P, T].

    Raises:
      ValueError: if an argument is out of its range, or P does not divide B.
    """
    require("start_sequence", start_sequence >= 0, "at least 0", start_sequence)
    rows = _ProcessRows(
        sequences, global_batch_size, process_index, process_count, start_sequence, None
    )
    return _iterate(rows, num_workers)


def validation_batches(
    sequences: PackedSequences | Excerpt,
    *,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Returns an iterator over one epoch: every sequence once.

    The last batch is filled up with rows of weight 0. Every process sees the same number of
    batches. The other arguments and the iterator are those of `train_iterator`.

    Raises:
      ValueError: if an argument is out of its range, or the processes do not divide the batch.
    """
    rows = _ProcessRows(
        sequences, global_batch_size, process_index, process_count, 0, len(sequences)
    )
    return _iterate(rows, num_workers=0)


@dataclass(frozen=True)
class _ProcessRows(grain.sources.RandomAccessDataSource):
    """The rows that one process reads, in order; rows past `stop_sequence` have weight 0.

    grain's slice would take every P-th row, but a process reads the rows of each batch that the
    mesh gives it. grain's `repeat` would repeat one order, but each epoch has another.
    """

    sequences: PackedSequences | Excerpt
    global_batch_size: int
    process_index: int
    process_count: int
    start_sequence: int
    stop_sequence: int | None

    def __post_init__(self):
        size, count, index = self.global_batch_size, self.process_count, self.process_index
        require("global_batch_size", size >= 1, "at least 1", size)
        divides = count >= 1 and size % count == 0
        require("process_count", divides, f"a divisor of global_batch_size {size}", count)
        require("process_index", 0 <= index < count, f"one in [0, {count})", index)

    @property
    def local_batch_size(self) -> int:
        return self.global_batch_size // self.process_count

    def __len__(self) -> int:
        if self.stop_sequence is None:
            return _ENDLESS
        batches = -(-(self.stop_sequence - self.start_sequence) // self.global_batch_size)
        return batches * self.local_batch_size

    def __getitem__(self, row: int) -> Batch:
        batch, row = divmod(row, self.local_batch_size)
        row += batch * self.global_batch_size + self.process_index * self.local_batch_size
        index = self.start_sequence + row
        if self.stop_sequence is not None and index >= self.stop_sequence:
            padding = self.sequences[self.start_sequence]
            return padding._replace(weights=np.zeros_like(padding.weights))
        return self.sequences[index]


def _iterate(rows: _ProcessRows, num_workers: int) -> grain.DatasetIterator:
    require("num_workers", num_workers >= 0, "at least 0", num_workers)
    if not flags.FLAGS.is_parsed():
        # grain hands absl's flags to its workers, which absl allows only after parsing.
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(rows).batch(rows.local_batch_size)
    # grain's defaults (16 threads, 500 elements) are meant for single records, not for batches.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    if num_workers:
        workers = grain.multiprocessing.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_end_with_parent)
        # Batches come through pipes: shared memory would outlive a killed run in /dev/shm.
        dataset = grain.experimental.WithOptionsIterDataset(
            dataset, grain.experimental.DatasetOptions(min_shm_size=2**62)
        )
    return iter(dataset)


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """Lets a worker process end when a killed parent could not tell it to."""

    def wait():
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
