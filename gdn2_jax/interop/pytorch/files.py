"""Files of tensors: safetensors, .pt and .bin, one or many, read and written a tensor at a time."""

import contextlib
import errno
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from gdn2_jax.files import replacing, write_text
from gdn2_jax.interop.pytorch.pickled import list_pickled, read_pickled, write_pickled

FileFormat = Literal["safetensors", "bin"]

_STEMS: dict[FileFormat, str] = {"safetensors": "model", "bin": "pytorch_model"}
_PICKLED = (".pt", ".pth", ".bin")
# Of torch.compile, of DDP and DataParallel, of FSDP, of activation checkpointing.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class StoredTensor(NamedTuple):
    """A tensor; `read` reads or computes its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """Size of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a file, or of a directory with one file or an index of several.

    Args:
      path: a .safetensors, .pt, .pth or .bin file, an .index.json, or a directory with the names
        that Hugging Face gives them.

    Returns:
      Each tensor, to be read when needed. What a safetensors file holds once under several names,
      by its metadata, has all of them.

    Raises:
      FileNotFoundError: there is no such file, or the index names one that is missing.
      ValueError: a file is damaged or holds something else, or the index and its files disagree.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_of_directory(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.name.endswith(".index.json"):
        return _open_file(path)
    weight_map = _weight_map(path)
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not (path.parent / name).is_file()]:
        raise FileNotFoundError(f"{path} names files that do not exist: {', '.join(missing)}")
    tensors, found = {}, {}
    for file in files:
        opened = _open_file(path.parent / file)
        tensors |= opened
        # The index may leave out the other names of a tensor.
        shared = _other_names(path.parent / file).keys() - weight_map.keys()
        found |= dict.fromkeys(opened.keys() - shared, file)
    if found != weight_map:
        wrong = sorted(name for name, _ in found.items() ^ weight_map.items())
        raise ValueError(f"{path} and its files disagree on where these are: {', '.join(wrong)}")
    return tensors


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, StoredTensor],
    *,
    file_format: FileFormat = "safetensors",
    shard_bytes: int = 5 * 2**30,
    under: str | None = None,
    on_tensor: Callable[[str, StoredTensor], None] = lambda name, tensor: None,
) -> list[Path]:
    """Writes tensors, with at most one file's worth of them in memory.

    Args:
      path: a .safetensors, .pt, .pth or .bin file, or a directory, created if missing, which then
        gets one file, or several and their index.
      tensors: in the order in which they are written.
      file_format: of the files in a directory.
      shard_bytes: a directory's files hold at most so much, or one tensor.
      under: key of the dict in which a .pt, .pth or .bin file holds the tensors; None for none.
      on_tensor: called with each tensor before it is read.

    Returns:
      The files written. Each appears when it is complete, the index last; if one fails, or
      Ctrl-C stops the writing, those before it are removed.

    Raises:
      FileExistsError: the file, or one in the directory, is there already.
      ValueError: there are no tensors, or one has a dtype that the files do not hold, or there is
        no such format.
    """
    path = Path(path)
    if file_format not in _STEMS:
        raise ValueError(f"file_format: expected one of {', '.join(_STEMS)}, got {file_format!r}")
    if not tensors:
        raise ValueError("tensors: expected at least one, got none")
    for name, tensor in tensors.items():
        if tensor.dtype not in _SAFETENSORS_DTYPES.values():
            raise ValueError(f"{name}: expected a float of 16, 32 or 64 bits, got {tensor.dtype}")
    if names_a_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, tensors, under, on_tensor)
        return [path]
    path.mkdir(parents=True, exist_ok=True)
    if taken := [file.name for file in path.iterdir() if _is_weights(file)]:
        raise FileExistsError(f"{path} has weights already: {', '.join(sorted(taken))}")
    stem = _STEMS[file_format]
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        files = [f"{stem}.{file_format}"]
    else:
        count = len(shards)
        files = [f"{stem}-{i:05}-of-{count:05}.{file_format}" for i in range(1, count + 1)]
    with contextlib.ExitStack() as undo:
        for file, shard in zip(files, shards, strict=True):
            _write_file(path / file, shard, under, on_tensor)
            undo.callback((path / file).unlink)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.bytes for tensor in tensors.values())},
                "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
            }
            files.append(f"{stem}.{file_format}.index.json")
            write_text(path / files[-1], json.dumps(index, indent=2) + "\n")
        undo.pop_all()
    return [path / file for file in files]


def without_wrappers(name: str) -> str:
    """A tensor's name without what torch.compile and parallel wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by their names without wrappers.

    Raises:
      ValueError: two of them then have one name.
    """
    found = {}
    for name, tensor in tensors.items():
        short = without_wrappers(name)
        if short in found:
            raise ValueError(f"tensors: expected one {short}, got one more as {name}")
        found[short] = tensor
    return found


def names_a_file(path: Path) -> bool:
    """Whether a path to write to is a file's: "gdn2_1.3B" is a directory."""
    return path.suffix in (*_PICKLED, ".safetensors")


def _is_weights(file: Path) -> bool:
    return names_a_file(file) or file.name.endswith(".index.json")


def _file_of_directory(directory: Path) -> Path:
    for file_format, stem in _STEMS.items():
        for ending in (".index.json", ""):
            path = directory / f"{stem}.{file_format}{ending}"
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"{directory} has neither model.safetensors nor pytorch_model.bin nor an index of either"
    )


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not an index of weights: {error!r}") from error


def _open_file(path: Path) -> dict[str, StoredTensor]:
    if path.suffix in _PICKLED:
        return {
            name: StoredTensor(
                tensor.shape, tensor.dtype, functools.partial(read_pickled, path, tensor)
            )
            for name, tensor in list_pickled(path).items()
        }
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors, .pt, .pth or .bin file")
    import safetensors

    tensors = {}
    try:
        with safetensors.safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(name)
                dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise ValueError(f"{path}: {name} is {view.get_dtype()}, not a plain float")
                read = functools.partial(_read_safetensor, path, name)
                tensors[name] = StoredTensor(tuple(view.get_shape()), dtype, read)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return tensors | {other: tensors[name] for other, name in _other_names(path).items()}


def _other_names(path: Path) -> dict[str, str]:
    """Returns the names of tied weights that the file leaves out, each with the name of its twin.

    safetensors.torch.save_model stores one of several tied weights and notes the others.
    """
    if path.suffix != ".safetensors":
        return {}
    import safetensors

    with safetensors.safe_open(path, "np") as file:
        names, metadata = set(file.keys()), file.metadata() or {}
    return {k: v for k, v in metadata.items() if v in names and k not in names}


def _read_safetensor(path: Path, name: str) -> np.ndarray:
    import safetensors

    # Opened for each tensor: a file that stays open keeps all its pages that were read mapped.
    with safetensors.safe_open(path, "np") as file:
        return file.get_tensor(name)


def _write_file(path: Path, tensors, under, on_tensor) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists already")

    def read(name: str) -> np.ndarray:
        on_tensor(name, tensors[name])
        return np.asarray(tensors[name].read(), order="C")

    with replacing(path) as temporary:
        if path.suffix in _PICKLED:
            numbers = {
                name: (tensor.shape, tensor.dtype, functools.partial(read, name))
                for name, tensor in tensors.items()
            }
            write_pickled(temporary, numbers, under)
        else:
            from safetensors import SafetensorError
            from safetensors.numpy import save_file

            # save_file makes a file that its owner alone can read, whatever the umask says.
            temporary.touch()
            mode = temporary.stat().st_mode
            arrays = {name: read(name) for name in tensors}
            try:
                save_file(arrays, temporary, metadata={"format": "pt"})
            except SafetensorError as error:  # of a full disk, too
                raise OSError(errno.EIO, str(error), str(temporary)) from error
            temporary.chmod(mode)


def _shards(tensors: Mapping[str, StoredTensor], limit: int) -> Iterator[dict[str, StoredTensor]]:
    # huggingface_hub has this too, but is a client of a web service: too much for eight lines.
    shard, size = {}, 0
    for name, tensor in tensors.items():
        if shard and size + tensor.bytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.bytes
    yield shard
