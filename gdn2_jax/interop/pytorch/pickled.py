"""PyTorch's .pt and .bin files, read and written without PyTorch.

Such a file is a zip archive: `data.pkl` pickles a dict whose tensors name a storage each, and
`data/KEY` holds the numbers of storage KEY. The reader builds nothing but dicts of tensors, so a
file from a stranger can run no code.
"""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _STORAGES.items()}


class PickledTensor(NamedTuple):
    """A tensor as the pickle describes it.

    Attributes:
      storage: key of its storage.
      offset: of its first number in the storage, counted in numbers.
      stride: of the tensor, counted in numbers.
    """

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def list_pickled(path: Path) -> dict[str, PickledTensor]:
    """Returns the tensors of a state dict, alone in the file or under "model" or "state_dict".

    Raises:
      ValueError: the file is not a zip archive of PyTorch, or pickles something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = _Unpickler(io.BytesIO(archive.read(_member(archive, "data.pkl")))).load()
    except Exception as error:  # A damaged pickle can raise any.
        raise ValueError(
            f"{path} is not a file of torch.save since PyTorch 1.6: {error}"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = content if isinstance(content, Mapping) else {}
    others = [name for name, value in tensors.items() if not isinstance(value, PickledTensor)]
    if not tensors or others:
        got = f"other things under {others}" if others else f"a {type(content).__name__}"
        raise ValueError(f"{path}: expected a dict of tensors, got {got}")
    return dict(tensors)


def read_pickled(path: Path, tensor: PickledTensor) -> np.ndarray:
    """Reads the numbers of a tensor.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = _member(archive, f"data/{tensor.storage}")
            numbers = np.frombuffer(archive.read(member), tensor.dtype)
        strides = [stride * tensor.dtype.itemsize for stride in tensor.stride]
        # Checks that the tensor stays within its storage.
        return np.ndarray(
            tensor.shape, tensor.dtype, numbers, tensor.offset * tensor.dtype.itemsize, strides
        )
    except Exception as error:  # As above.
        raise ValueError(f"{path} is damaged: {error}") from error


def write_pickled(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]],
    under: str | None = None,
) -> None:
    """Writes a state dict, a tensor at a time.

    Args:
      path: of the file.
      tensors: shape, dtype and numbers of each.
      under: key of the state dict in the pickled dict; None pickles the state dict itself.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle(tensors, under))
        archive.writestr("archive/byteorder", "little")
        for key, (_, _, read) in enumerate(tensors.values()):
            # Parts of more than 2 GiB need the flag from the start.
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as member:
                array = np.asarray(read(), order="C")
                member.write(array.reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _member(archive: zipfile.ZipFile, name: str) -> str:
    """The member's full name: the archive's one folder is named after the file."""
    for candidate in archive.namelist():
        if candidate.partition("/")[2] == name:
            return candidate
    raise zipfile.BadZipFile(f"it has no {name}")


def _rebuild(storage, offset, shape, stride, *_) -> PickledTensor:
    key, dtype = storage
    return PickledTensor(key, dtype, offset, tuple(shape), tuple(stride))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a floating-point tensor")
        return known[module, name]

    def persistent_load(self, pid: tuple) -> tuple[str, np.dtype]:
        _, dtype, key, *_ = pid
        return key, dtype


def _pickle(tensors, under: str | None) -> bytes:
    """What torch.save would pickle: written opcode by opcode, as its classes are not here."""

    def text(value: str) -> bytes:
        encoded = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded

    def integer(value: int) -> bytes:
        # With a sign bit to spare, as LONG1 is two's complement.
        encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return pickle.LONG1 + bytes([len(encoded)]) + encoded

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def grouped(*values: bytes) -> bytes:
        return pickle.MARK + b"".join(values) + pickle.TUPLE

    def tensor(key: int, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
        stride = [int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape))]
        size = integer(int(np.prod(shape, dtype=int)))
        storage = grouped(
            text("storage"), named("torch", _NAMES[dtype]), text(str(key)), text("cpu"), size
        )
        hooks = named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = grouped(
            storage + pickle.BINPERSID,
            integer(0),
            grouped(*map(integer, shape)),
            grouped(*map(integer, stride)),
            pickle.NEWFALSE,
            hooks,
        )
        return named("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE

    items = b"".join(
        text(name) + tensor(key, shape, np.dtype(dtype)) + pickle.SETITEM
        for key, (name, (shape, dtype, _)) in enumerate(tensors.items())
    )
    content = pickle.EMPTY_DICT + items
    if under is not None:
        content = pickle.EMPTY_DICT + text(under) + content + pickle.SETITEM
    return pickle.PROTO + b"\x02" + content + pickle.STOP
