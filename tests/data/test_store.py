import json
import pickle

import numpy as np
import pytest

from gdn2_jax.data.store import StoreWriter, TokenStore, is_intact, seal

END = 999


def test_documents_stand_back_to_back_each_closed_by_the_end_token(make_store):
    store = make_store([[1, 2], [3], [4, 5, 6]])
    assert store.tokens.tolist() == [1, 2, END, 3, END, 4, 5, 6, END]
    assert store.offsets.tolist() == [0, 3, 5, 9]
    assert (store.num_tokens, store.num_documents, store.num_bytes) == (9, 3, 6)


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(2**16, 2), (2**16 + 1, 4)])
def test_the_greatest_token_fits(tmp_path, vocab_size, itemsize):
    writer = StoreWriter(tmp_path, "s", vocab_size, end_of_document=vocab_size - 1)
    writer.append("é", np.array([vocab_size - 2], np.int32))
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


def test_any_flipped_byte_missing_or_added_file_breaks_the_seal(tmp_path):
    writer = StoreWriter(tmp_path, "s", 1000, END)
    writer.append("text", np.arange(4))
    writer.close()
    assert not is_intact(tmp_path)
    seal(tmp_path)
    assert is_intact(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert not is_intact(tmp_path), path
        path.unlink()
        assert not is_intact(tmp_path), path
        path.write_bytes(content)
        assert is_intact(tmp_path)
    (tmp_path / "more").write_text(json.dumps(1))
    assert not is_intact(tmp_path)
