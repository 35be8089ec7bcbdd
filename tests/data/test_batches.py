import contextlib
import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from gdn2_jax.data import PackedSequences, train_iterator, validation_batches
from gdn2_jax.models import Batch

T = 7
BATCH = 4


@pytest.fixture(scope="module")
def sequences(make_store):
    """23 sequences an epoch, over documents of 1 to 9 tokens and the end."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 900, size=n % 9 + 1).tolist() for n in range(31)]
    return PackedSequences(make_store(documents), T, seed=0, reset_at_documents=True)


def take(count, iterator):
    with contextlib.closing(iterator):
        return list(itertools.islice(iterator, count))


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    equal = functools.partial(np.testing.assert_array_equal, strict=True)
    for batch, reference in zip(actual, expected):
        jax.tree.map(equal, batch, reference)


def stacked(rows):
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def joined(parts):
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def test_batches_hold_the_sequences_in_order_epoch_after_epoch(sequences):
    batches = take(20, train_iterator(sequences, global_batch_size=BATCH))
    assert 20 * BATCH > 3 * len(sequences)
    expected = [stacked([sequences[BATCH * n + row] for row in range(BATCH)]) for n in range(20)]
    assert_same(batches, expected)


def test_batches_have_the_shapes_and_dtypes_of_the_contract(sequences):
    (batch,) = take(1, train_iterator(sequences, global_batch_size=BATCH))
    ids = ((BATCH, T), "int32")
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), batch)
    assert shapes == Batch(ids, ids, ((BATCH, T), "float32"), ids)


def test_sequences_without_segments_make_batches_without(sequences):
    whole = dataclasses.replace(sequences, reset_at_documents=False)
    (batch,) = take(1, train_iterator(whole, global_batch_size=BATCH))
    assert batch.segment_ids is None and batch.inputs.shape == (BATCH, T)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_the_slices_of_all_processes_make_up_the_global_batches(sequences, process_count):
    expected = take(12, train_iterator(sequences, global_batch_size=BATCH, start_sequence=3))
    slices = [
        take(
            12,
            train_iterator(
                sequences,
                global_batch_size=BATCH,
                start_sequence=3,
                process_index=index,
                process_count=process_count,
            ),
        )
        for index in range(process_count)
    ]
    assert_same([joined(parts) for parts in zip(*slices)], expected)


def test_the_position_resumes_the_stream_after_any_batch(sequences):
    expected = take(16, train_iterator(sequences, global_batch_size=BATCH))
    for done in range(16):
        resumed = train_iterator(sequences, global_batch_size=BATCH, start_sequence=done * BATCH)
        assert_same(take(16 - done, resumed), expected[done:])


def test_the_position_holds_for_another_batch_size(sequences):
    (first,) = take(1, train_iterator(sequences, global_batch_size=6, start_sequence=10))
    (second,) = take(1, train_iterator(sequences, global_batch_size=3, start_sequence=13))
    np.testing.assert_array_equal(first.inputs[3:], second.inputs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_give_the_same_stream_and_grains_own_state_resumes_it(sequences, num_workers):
    arguments = {"global_batch_size": BATCH, "start_sequence": 5}
    expected = take(12, train_iterator(sequences, **arguments))
    arguments["num_workers"] = num_workers
    with contextlib.closing(train_iterator(sequences, **arguments)) as iterator:
        assert_same([next(iterator) for _ in range(3)], expected[:3])
        state = json.loads(json.dumps(iterator.get_state()))
        assert_same(list(itertools.islice(iterator, 9)), expected[3:])
        iterator.set_state(state)
        assert_same(list(itertools.islice(iterator, 9)), expected[3:])
    fresh = train_iterator(sequences, **arguments)
    fresh.set_state(state)
    assert_same(take(9, fresh), expected[3:])


def test_grains_checkpoint_handler_saves_and_restores_the_stream(sequences, tmp_path):
    handler = grain.checkpoint.CheckpointHandler()
    iterator = train_iterator(sequences, global_batch_size=BATCH)
    next(iterator)
    handler.save(tmp_path, item=iterator)
    restored = handler.restore(tmp_path, item=train_iterator(sequences, global_batch_size=BATCH))
    assert_same(take(3, restored), take(3, iterator))


@pytest.mark.parametrize(
    ("batch_size", "process_count"), [(4, 1), (4, 2), (23, 1), (24, 1), (24, 4), (50, 2)]
)
def test_validation_gives_every_sequence_once_and_fills_up_with_weight_zero(
    sequences, batch_size, process_count
):
    rows = [[] for _ in range(process_count)]
    for index in range(process_count):
        for batch in validation_batches(
            sequences,
            global_batch_size=batch_size,
            process_index=index,
            process_count=process_count,
        ):
            assert batch.inputs.shape == (batch_size // process_count, T)
            rows[index].append(batch)
    assert len({len(batches) for batches in rows}) == 1
    all_rows = joined([joined(parts) for parts in zip(*rows)])
    n = len(sequences)
    assert len(all_rows.inputs) == -(-n // batch_size) * batch_size
    real = jax.tree.map(lambda x: x[:n], all_rows)
    assert_same([real], [stacked([sequences[i] for i in range(n)])])
    assert (all_rows.weights[n:] == 0).all()
    assert (all_rows.segment_ids >= 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size: expected at least 1, got 0"),
        ({"process_count": 3}, "process_count: expected a divisor of global_batch_size 4, got 3"),
        ({"process_count": 0}, "process_count: expected a divisor"),
        ({"process_index": 1}, r"process_index: expected one in \[0, 1\), got 1"),
        ({"process_index": -1}, r"process_index: expected one in \[0, 1\), got -1"),
        ({"num_workers": -1}, "num_workers: expected at least 0, got -1"),
        ({"start_sequence": -1}, "start_sequence: expected at least 0, got -1"),
    ],
)
def test_an_argument_out_of_range_is_named(sequences, arguments, message):
    arguments = {"global_batch_size": BATCH, **arguments}
    with pytest.raises(ValueError, match=message):
        train_iterator(sequences, **arguments)
    if not arguments.keys() & {"start_sequence", "num_workers"}:
        with pytest.raises(ValueError, match=message):
            validation_batches(sequences, **arguments)


@pytest.mark.slow
def test_workers_end_with_a_killed_run_and_leave_no_shared_memory(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
            import multiprocessing, time
            from gdn2_jax.data import DataConfig, prepare, train_iterator

            if __name__ == "__main__":
                config = DataConfig(
                    paths=("text.txt",), validation_fraction=0, sequence_length=64,
                    cache_directory="cache",
                )
                iterator = train_iterator(
                    prepare(config).train, global_batch_size=2, num_workers=2
                )
                for _ in range(4):
                    next(iterator)
                print(*[child.pid for child in multiprocessing.active_children()], flush=True)
                time.sleep(60)
        """)
    )
    (tmp_path / "text.txt").write_text("some text " * 1000)
    before = _shared_memory()
    run = subprocess.Popen([sys.executable, script], cwd=tmp_path, stdout=subprocess.PIPE)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    assert _shared_memory() <= before
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.time() + 20
    while (alive := [pid for pid in workers if _is_alive(pid)]) and time.time() < deadline:
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive, "workers outlived the run"


def _shared_memory():
    """Names of the segments of Python's shared memory (none where they are not files)."""
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose new parent does not reap it has ended too.
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return True
