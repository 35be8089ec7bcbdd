"""Texts or token ids from .array_record files, whose records say nothing of their own form."""

import functools
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Integer

# Number of records that are read at once.
_RECORDS = 1024

_NPY = b"\x93NUMPY"

# tensorflow/core/example/example.proto, as far as it tells the fields' numbers and types apart. An
# entry of a map is a message of its key and value.
_EXAMPLE = {
    "BytesList": [("value", 1, "bytes", True)],
    "FloatList": [("value", 1, "float", True)],
    "Int64List": [("value", 1, "int64", True)],
    "Feature": [
        ("bytes_list", 1, "BytesList", False),
        ("float_list", 2, "FloatList", False),
        ("int64_list", 3, "Int64List", False),
    ],
    "Entry": [("key", 1, "bytes", False), ("value", 2, "Feature", False)],
    "Features": [("feature", 1, "Entry", True)],
    "Example": [("features", 1, "Features", False)],
}


def read_array_record(path: Path, feature: str) -> Iterator[str | Integer[np.ndarray, " N"] | None]:
    """Yields the text or the token ids of each record.

    A record is a tf.train.Example, whose `feature` holds one text or a list of token ids, or it is
    what `numpy.save` writes of an array of token ids.

    Args:
      path: the file.
      feature: name of the feature; where an Example has none, its text is None.

    Raises:
      ValueError: if the file is damaged, or a record has another form; names the file and record.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        # The library reports no error for another kind of file: it finds no records.
        if not count:
            raise ValueError(f"{path}: not an .array_record file, or one without records")
        for start in range(0, count, _RECORDS):
            records = reader.read(start, min(start + _RECORDS, count))
            for number, record in enumerate(records, start):
                yield _content(f"{path}: record {number}", record, feature)
        reader.close()
    except (RuntimeError, OSError, IndexError) as error:
        raise ValueError(f"{path}: expected a whole .array_record file, got {error}") from error


def _content(name: str, record: bytes, feature: str) -> str | Integer[np.ndarray, " N"] | None:
    if record.startswith(_NPY):
        try:
            return np.load(io.BytesIO(record), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{name}: expected a whole array of numbers, got {error}") from error
    from google.protobuf.message import DecodeError

    try:
        example = _example_type().FromString(record)
    except DecodeError:
        example = None
    if example is None or not example.features.feature:
        raise ValueError(
            f"{name}: expected a tf.train.Example, or token ids as numpy.save writes them, got "
            f"{record[:20]!r}"
        )
    features = {entry.key: entry.value for entry in example.features.feature}
    value = features.get(feature.encode())
    if value is None:
        return None
    texts, ids = value.bytes_list.value, value.int64_list.value
    if len(texts) == 1:
        try:
            return texts[0].decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: expected UTF-8 text as {feature!r}, got {error.reason}"
            ) from error
    if texts or value.float_list.value:
        raise ValueError(f"{name}: expected one text or token ids as {feature!r}")
    return np.array(ids, np.int64)


@functools.cache
def _example_type() -> type:
    """The message class of tf.train.Example, without TensorFlow."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example", package="e", syntax="proto3")
    for message, fields in _EXAMPLE.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = declared.field.add(name=name, number=number, label=3 if repeated else 1)
            if kind in _EXAMPLE:
                field.type_name = f".e.{kind}"
            else:
                field.type = field.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("e.Example"))
