import dataclasses
import pickle

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gdn2_jax.data import PackedSequences
from gdn2_jax.data.packing import block_order
from gdn2_jax.models import Batch

END = 999
T = 7

documents_of_any_size = st.lists(
    st.lists(st.integers(0, END - 1), max_size=12), min_size=1, max_size=12
)


def block(sequence):
    """The T + 1 tokens that a sequence was made of."""
    assert sequence.inputs[1:].tolist() == sequence.targets[:-1].tolist()
    return [*sequence.inputs.tolist(), int(sequence.targets[-1])]


def epoch_tokens(sequences, epoch):
    n = len(sequences)
    return [token for i in range(epoch * n, (epoch + 1) * n) for token in block(sequences[i])]


def packed_tokens(sequences, epoch):
    """An epoch's tokens as they were packed, before the blocks were shuffled."""
    n = len(sequences)
    blocks = [block(sequences[i]) for i in range(epoch * n, (epoch + 1) * n)]
    order = block_order(n, sequences.seed, epoch)
    return [token for i in np.argsort(order) for token in blocks[i]]


def split_at_ends(tokens):
    documents = [[]]
    for token in tokens:
        if token == END:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


@given(documents_of_any_size, st.integers(1, 20), st.integers(0, 3))
def test_without_a_seed_sequences_are_the_documents_cut_in_order(make_store, documents, t, epoch):
    stream = [token for document in documents for token in [*document, END]]
    assume(len(stream) > t)
    sequences = PackedSequences(make_store(documents), t)
    whole = len(stream) // (t + 1) * (t + 1)
    assert len(sequences) == whole // (t + 1)
    assert epoch_tokens(sequences, epoch) == stream[:whole]


@given(documents_of_any_size, st.integers(1, 20), st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_an_epoch_holds_every_document_once_whole_and_in_order(
    make_store, documents, t, seed, epoch
):
    # The first token tells which document it is.
    documents = [[i, *document] for i, document in enumerate(documents)]
    total = sum(len(document) + 1 for document in documents)
    assume(total > t)
    tokens = packed_tokens(PackedSequences(make_store(documents), t, seed=seed), epoch)
    assert len(tokens) == total // (t + 1) * (t + 1)

    *whole, last = split_at_ends(tokens)
    names = [document[0] for document in whole]
    assert len(set(names)) == len(names)
    assert all(document == documents[document[0]] for document in whole)
    if last:
        assert last[0] not in names
        assert last == documents[last[0]][: len(last)]


@given(documents_of_any_size, st.integers(1, 20), st.booleans(), st.data())
def test_a_sequence_does_not_depend_on_those_read_before(make_store, documents, t, reset, data):
    assume(sum(len(document) + 1 for document in documents) > t)
    sequences = PackedSequences(make_store(documents), t, seed=1, reset_at_documents=reset)
    fresh = PackedSequences(make_store(documents), t, seed=1, reset_at_documents=reset)
    indices = data.draw(st.lists(st.integers(0, 5 * len(sequences)), min_size=1, max_size=5))
    in_order = [sequences[i] for i in range(max(indices) + 1)]
    for i in indices:
        for row, expected in zip(fresh[i], in_order[i]):
            np.testing.assert_array_equal(row, expected)


@given(documents_of_any_size, st.integers(1, 20))
def test_with_resets_each_document_in_a_row_has_its_number(make_store, documents, t):
    assume(sum(len(document) + 1 for document in documents) > t)
    sequences = PackedSequences(make_store(documents), t, seed=3, reset_at_documents=True)
    for i in range(2 * len(sequences)):
        number, expected = 1, []
        for token in sequences[i].inputs.tolist():
            expected.append(number)
            number += token == END
        assert sequences[i].segment_ids.tolist() == expected


def test_rows_have_the_lengths_and_dtypes_of_the_contract(make_store):
    for reset in (False, True):
        row = PackedSequences(make_store([[1, 2]] * 9), T, reset_at_documents=reset)[0]
        ids = ((T,), "int32")
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), row)
        assert shapes == Batch(ids, ids, ((T,), "float32"), ids if reset else None)
        assert row.weights.tolist() == [1] * T


def test_epochs_and_seeds_differ_in_the_order_of_documents(make_store):
    store = make_store([[i] for i in range(50)])
    first, other = (PackedSequences(store, T, seed=seed) for seed in (0, 1))
    orders = [epoch_tokens(first, epoch) for epoch in range(3)] + [epoch_tokens(other, 0)]
    assert len({tuple(order) for order in orders}) == 4
    assert sorted(orders[0]) != orders[0]


def test_blocks_of_a_long_document_are_spread_over_the_epoch(make_store):
    sequences = PackedSequences(make_store([range(500), range(500, 900)]), T, seed=0)
    halves = [sequences[i].inputs[0] < 500 for i in range(len(sequences))]
    changes = np.count_nonzero(np.diff(halves))
    assert changes > len(sequences) / 4, halves
    orders = {tuple(block_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_of_blocks_never_changes_between_versions():
    assert block_order(8, 42, 0).tolist() == [0, 2, 6, 3, 5, 4, 7, 1]
    assert block_order(8, 42, 7).tolist() == [1, 7, 6, 5, 4, 2, 3, 0]


def test_the_order_of_documents_never_changes_between_versions(make_store):
    sequences = PackedSequences(make_store([[i] for i in range(8)]), 15, seed=42)
    assert epoch_tokens(sequences, 0)[::2] == [7, 1, 6, 4, 3, 5, 0, 2]
    assert epoch_tokens(sequences, 7)[::2] == [6, 7, 4, 5, 2, 0, 1, 3]


def test_the_sequence_length_can_be_changed_on_the_same_store(make_store):
    sequences = PackedSequences(make_store([[1, 2, 3]] * 10), T)
    longer = dataclasses.replace(sequences, sequence_length=19)
    assert (len(sequences), len(longer)) == (5, 2)
    assert longer[0].inputs.shape == (19,)


def test_packed_sequences_survive_pickling(make_store):
    sequences = PackedSequences(make_store([[i] for i in range(50)]), T, 5)
    copy = pickle.loads(pickle.dumps(sequences))
    assert block(copy[11]) == block(sequences[11])


def test_documents_shorter_than_one_block_are_an_error(make_store):
    store = make_store([[1, 2, 3], [4]])
    assert len(PackedSequences(store, 5)) == 1
    message = "^sequence_length: expected .* less than the documents' 6 tokens, got 6"
    with pytest.raises(ValueError, match=message):
        PackedSequences(store, 6)
    with pytest.raises(ValueError, match="^sequence_length: expected at least 1 .*, got 0"):
        PackedSequences(store, 0)


def test_a_negative_index_is_an_error(make_store):
    with pytest.raises(IndexError, match="counted from 0, got -1"):
        PackedSequences(make_store([[1, 2, 3]]), 2)[-1]
