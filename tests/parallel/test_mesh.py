"""Who reads which rows, and where they go, without processes."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gdn2_jax.parallel import MeshConfig, batch_reader, make_mesh, put_batch


def mesh_of_processes(shape, devices_each):
    """What `batch_reader` reads of a mesh whose devices belong to several processes."""
    count = int(np.prod(shape))
    devices = [SimpleNamespace(process_index=i // devices_each) for i in range(count)]
    axes = dict(zip(("data", "fsdp", "sequence", "tensor"), shape))
    return SimpleNamespace(devices=np.array(devices).reshape(shape), shape=axes)


@pytest.mark.parametrize(
    ("shape", "devices_each", "readers"),
    [
        ((8, 1, 1, 1), 8, [(0, 1)]),
        ((4, 2, 1, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 2, 2), 4, [(0, 2), (1, 2)]),
        # Two processes hold spans of the same rows.
        ((2, 1, 4, 1), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 1, 1, 8), 4, [(0, 1), (0, 1)]),
    ],
    ids=str,
)
def test_each_process_reads_the_rows_of_its_devices(monkeypatch, shape, devices_each, readers):
    mesh = mesh_of_processes(shape, devices_each)
    for process, expected in enumerate(readers):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert batch_reader(mesh) == expected


def test_processes_that_hold_unequal_parts_are_refused():
    with pytest.raises(ValueError, match="data x fsdp = 3 to divide the number of processes"):
        batch_reader(mesh_of_processes((3, 1, 2, 1), 4))


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        (MeshConfig(), (2, 1, 16)),
        (MeshConfig(fsdp=4, sequence=2), (2, 2, 8)),
        (MeshConfig(tensor=8), (2, 8, 16)),
    ],
    ids=str,
)
def test_a_batch_is_put_with_its_rows_and_spans_split(sizes, part):
    rows = np.arange(2 * 8 * 16).reshape(2, 8, 16)
    array = put_batch(make_mesh(sizes), {"inputs": rows})["inputs"]
    assert {shard.data.shape for shard in array.addressable_shards} == {part}
    np.testing.assert_array_equal(array, rows)


def test_an_axis_left_open_takes_the_devices_that_remain():
    mesh = make_mesh(MeshConfig(sequence=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2}
    # Neighbours along "tensor" are neighbours as devices.
    assert [device.id for device in mesh.devices[0, 0, 0]] == [0, 1]
