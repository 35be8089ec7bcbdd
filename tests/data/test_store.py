import pickle

import numpy as np
import pytest

from gdn2_jax.data.store import StoreWriter, TokenStore

END = 999


def test_documents_stand_back_to_back_each_closed_by_the_end_token(make_store):
    store = make_store([[1, 2], [3], [4, 5, 6]])
    assert store.tokens.tolist() == [1, 2, END, 3, END, 4, 5, 6, END]
    assert store.offsets.tolist() == [0, 3, 5, 9]
    assert (store.num_tokens, store.num_documents, store.num_bytes) == (9, 3, 9)


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(2**16, 2), (2**16 + 1, 4)])
def test_the_greatest_token_fits(tmp_path, vocab_size, itemsize):
    writer = StoreWriter(tmp_path, "s", vocab_size, end_of_document=vocab_size - 1)
    writer.append(np.array([vocab_size - 2], np.int32), 2)
    writer.close()
    store = TokenStore(tmp_path, "s")
    assert store.tokens.tolist() == [vocab_size - 2, vocab_size - 1]
    assert store.tokens.itemsize == itemsize
    assert store.num_bytes == 2


def test_a_pickled_store_carries_no_tokens(make_store):
    store = make_store([list(range(900))] * 10)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).tokens, store.tokens)


def test_a_document_may_come_in_pieces_and_one_of_no_text_is_left_out(tmp_path):
    writer = StoreWriter(tmp_path, "s", 1000, END)
    pieces = [([1], 1, False), ([2], 2, True), ([], 0, True), ([], 0, False), ([3], 1, True)]
    ended = [writer.append(np.array(ids, int), n, ends=ends) for ids, n, ends in pieces]
    writer.close()
    store = TokenStore(tmp_path, "s")
    assert ended == [False, True, False, False, True]
    assert store.tokens.tolist() == [1, 2, END, 3, END]
    assert store.offsets.tolist() == [0, 3, 5]
    assert store.num_bytes == 4


def test_documents_can_be_put_in_an_order_with_the_bytes_of_their_tokens(tmp_path):
    writer = StoreWriter(tmp_path, "s", 1000, END, byte_lengths=True)
    for document in ([1, 2], [3], [4, 5, 6]):
        writer.append(np.array(document), sum(document), byte_lengths=np.array(document))
    writer.close(order=np.array([2, 0, 1]))
    store = TokenStore(tmp_path, "s")
    assert store.tokens.tolist() == [4, 5, 6, END, 1, 2, END, 3, END]
    assert store.byte_lengths.tolist() == [4, 5, 6, 0, 1, 2, 0, 3, 0]
    assert store.offsets.tolist() == [0, 4, 7, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("s.byte_lengths", "s.json", "s.offsets", "s.tokens")
    ]


def test_a_store_without_documents_opens(tmp_path):
    StoreWriter(tmp_path, "s", 1000, END).close()
    assert (TokenStore(tmp_path, "s").num_tokens, TokenStore(tmp_path, "s").num_documents) == (0, 0)
