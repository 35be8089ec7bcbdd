"""Small token stores, made of documents given as lists of tokens, and .array_record files."""

import io
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


@pytest.fixture(scope="session")
def write_array_record():
    """A function that writes records: bytes, arrays, or features of a tf.train.Example."""
    from array_record.python.array_record_module import ArrayRecordWriter

    def write(path, records):
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            if isinstance(record, dict):
                record = _example(record)
            elif isinstance(record, np.ndarray):
                file = io.BytesIO()
                np.save(file, record)
                record = file.getvalue()
            writer.write(record)
        writer.close()

    return write


def _example(features):
    """Protocol buffers by hand: bytes_list is field 1 of a feature, int64_list field 3."""

    def varint(number):
        return (
            bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number >> 7)
        )

    def field(number, content):
        return bytes([8 * number + 2]) + varint(len(content)) + content

    entries = b""
    for name, value in {"id": [7], **features}.items():
        if isinstance(value, str):
            value = field(1, field(1, value.encode()))
        else:
            value = field(3, field(1, b"".join(varint(int(i)) for i in value)))
        entries += field(1, field(1, name.encode()) + field(2, value))
    return field(1, entries)
