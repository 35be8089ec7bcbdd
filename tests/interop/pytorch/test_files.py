"""Files of tensors are read and written a tensor at a time, and damaged ones are refused."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gdn2_jax.interop.pytorch import StoredTensor, open_tensors, write_tensors

# Made by torch 2.14.1.
SAVED_BY_TORCH = Path(__file__).with_name("saved_by_torch.pt")


def stored(arrays):
    return {name: StoredTensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "b.transposed": rng.normal(size=(4, 6)).astype(ml_dtypes.bfloat16).T,
        "c.scalar": np.array(2.5, np.float16),
        "d.double": rng.normal(size=(2, 2, 2)),
    }


def assert_same(tensors, arrays):
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        read = tensors[name].read()
        assert tensors[name].shape == read.shape == array.shape
        assert tensors[name].dtype == read.dtype == array.dtype
        np.testing.assert_array_equal(read, array, err_msg=name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth", "a.bin"])
def test_a_file_gives_back_what_was_written(tmp_path, arrays, name):
    assert write_tensors(tmp_path / name, stored(arrays)) == [tmp_path / name]
    assert_same(open_tensors(tmp_path / name), arrays)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_directory_gets_shards_of_the_size_asked_for(tmp_path, arrays, file_format):
    files = write_tensors(tmp_path, stored(arrays), file_format=file_format, shard_bytes=110)
    assert len(files) == 3 and files[-1].name.endswith(f".{file_format}.index.json")
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    held = [list(open_tensors(file)) for file in files[:-1]]
    assert held == [["a.weight", "b.transposed", "c.scalar"], ["d.double"]]
    assert_same(open_tensors(tmp_path), arrays)
    assert_same(open_tensors(files[-1]), arrays)


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_small_model_is_one_file(tmp_path, arrays, file_format):
    (file,) = write_tensors(tmp_path / "new", stored(arrays), file_format=file_format)
    assert file.name in ("model.safetensors", "pytorch_model.bin")
    assert_same(open_tensors(tmp_path / "new"), arrays)


def test_files_of_pytorch_are_read_without_it():
    tensors = open_tensors(SAVED_BY_TORCH)
    base = np.arange(12, dtype=np.float32)
    expected = {
        "whole": base.reshape(3, 4),
        "transposed": base.reshape(3, 4).T,
        "shared": base[4:10].reshape(2, 3),
        "bf16": np.array([1.5, -2.25], ml_dtypes.bfloat16),
        "half": np.array([[0.5]], np.float16),
        "double": np.array(0.1),
        "parameter": np.array([7, 8], np.float32),
    }
    assert_same(tensors, expected)


def test_pytorch_reads_what_was_written(tmp_path, arrays):
    torch = pytest.importorskip("torch")
    write_tensors(tmp_path / "a.pth", stored(arrays), under="model")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    for name, array in arrays.items():
        assert loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name].double().numpy(), array.astype(np.float64))


def test_the_pickle_of_what_was_written_has_the_parts_of_pytorchs(tmp_path, arrays):
    write_tensors(tmp_path / "a.pt", stored(arrays), under="model")

    def members(path):
        with zipfile.ZipFile(path) as archive:
            assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
            return {name.partition("/")[2] for name in archive.namelist()}

    assert members(tmp_path / "a.pt") <= members(SAVED_BY_TORCH)
    assert {"data.pkl", "byteorder", "version", "data/0", "data/3"} <= members(tmp_path / "a.pt")


def test_no_import_of_pytorch_and_no_other_heavy_one():
    code = "import sys, gdn2_jax.interop.pytorch; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    ran = tmp_path / "ran"
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", f"cpathlib\nPath.touch\n(cpathlib\nPath\n(V{ran}\ntRtR.")
    with pytest.raises(ValueError, match="pathlib"):
        open_tensors(tmp_path / "evil.pt")
    assert not ran.exists()


def test_nothing_is_overwritten(tmp_path, arrays):
    write_tensors(tmp_path, stored(arrays))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="model.safetensors"):
        write_tensors(tmp_path, stored(arrays), file_format="bin")
    with pytest.raises(FileExistsError, match="model.safetensors"):
        write_tensors(tmp_path / "model.safetensors", stored(arrays))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_write_that_dies_leaves_no_file_that_can_be_taken_for_weights(tmp_path, arrays):
    def fail():
        raise RuntimeError("killed")

    tensors = stored(arrays) | {"z": StoredTensor((200,), np.dtype(np.float32), fail)}
    with pytest.raises(RuntimeError, match="killed"):
        write_tensors(tmp_path / "m", tensors, file_format="bin", shard_bytes=300)
    with pytest.raises(FileNotFoundError, match="neither"):
        open_tensors(tmp_path / "m")


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_write_stopped_by_ctrl_c_can_be_started_again(tmp_path, arrays, file_format):
    def stop(name, tensor):
        if name == "d.double":  # In the second of two files.
            raise KeyboardInterrupt

    options = {"file_format": file_format, "shard_bytes": 110}
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path, stored(arrays), on_tensor=stop, **options)
    assert not list(tmp_path.iterdir())
    write_tensors(tmp_path, stored(arrays), **options)
    assert_same(open_tensors(tmp_path), arrays)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_full_disk_is_told_with_the_file_and_leaves_none(tmp_path, arrays, name, file_size_limit):
    with file_size_limit(300), pytest.raises(OSError, match=name):
        write_tensors(tmp_path / name, stored(arrays))
    assert not list(tmp_path.iterdir())


def test_files_may_be_read_by_all_whom_the_umask_allows(tmp_path, arrays):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path, stored(arrays))
    modes = [(tmp_path / name).stat().st_mode for name in ("model.safetensors", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("indexed", [False, True])
def test_tied_weights_stored_once_have_all_their_names(tmp_path, indexed):
    """As safetensors.torch.save_model leaves them."""
    weight = np.ones((3, 2), np.float32)
    metadata = {"format": "pt", "lm_head.weight": "embed.weight", "embed.weight": "lm_head.weight"}
    save_file({"embed.weight": weight}, tmp_path / "model.safetensors", metadata)
    if indexed:
        index = {"weight_map": {"embed.weight": "model.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(open_tensors(tmp_path), {"embed.weight": weight, "lm_head.weight": weight})


def test_an_index_whose_files_are_missing_or_differ_is_refused(tmp_path, arrays):
    *shards, index = write_tensors(tmp_path, stored(arrays), shard_bytes=110)
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = shards[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="disagree .*ghost"):
        open_tensors(tmp_path)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        open_tensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not an index"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 64])
def test_damaged_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a"):
        open_tensors(tmp_path / name)


def test_whatever_is_damaged_in_a_pickled_file_is_told_by_its_name(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.pt"
    with zipfile.ZipFile(SAVED_BY_TORCH) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    refused = 0
    for i in range(300):
        # A byte of the file, or one of the pickle in an archive that is whole.
        content = np.frombuffer(SAVED_BY_TORCH.read_bytes() if i % 2 else members[pickled], "u1")
        content = content.copy()
        content[rng.integers(content.size)] ^= rng.integers(1, 256)
        if i % 2:
            path.write_bytes(content.tobytes())
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, member in (members | {pickled: content.tobytes()}).items():
                    archive.writestr(name, member)
        try:
            for tensor in open_tensors(path).values():
                tensor.read()
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_other_things_are_named(tmp_path, arrays):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        open_tensors(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="neither"):
        open_tensors(tmp_path)
    with pytest.raises(ValueError, match="^file_format: expected one of .* got 'gguf'"):
        write_tensors(tmp_path / "new", stored(arrays), file_format="gguf")
    with pytest.raises(ValueError, match="at least one"):
        write_tensors(tmp_path / "a.pt", {})
    with pytest.raises(ValueError, match="^i: expected a float.*int32"):
        write_tensors(tmp_path / "a.pt", stored({"i": np.zeros(2, np.int32)}))
    with zipfile.ZipFile(tmp_path / "list.pt", "w") as archive:
        archive.writestr("list/data.pkl", pickle.dumps([1]))
    with pytest.raises(ValueError, match="expected a dict of tensors, got a list"):
        open_tensors(tmp_path / "list.pt")
    save_file({"i": np.zeros(2, np.int32)}, tmp_path / "i.safetensors")
    with pytest.raises(ValueError, match="i is I32"):
        open_tensors(tmp_path / "i.safetensors")
