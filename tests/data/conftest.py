"""Small token stores, made of documents given as lists of tokens."""

import itertools

import numpy as np
import pytest

from gdn2_jax.data.store import StoreWriter, TokenStore


@pytest.fixture(scope="session")
def make_store(tmp_path_factory):
    """A function from documents (lists of tokens below 999) to a TokenStore; 999 ends each."""
    numbers = itertools.count()
    directory = tmp_path_factory.mktemp("stores")

    def make(documents):
        name = str(next(numbers))
        writer = StoreWriter(directory, name, vocab_size=1000, end_of_document=999)
        for document in documents:
            writer.append(np.array(document, np.int32), len(document) + 1)
        writer.close()
        return TokenStore(directory, name)

    return make
