"""The devices of a run as a mesh, and who reads which rows of a batch."""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from gdn2_jax.fields import check_types

AXES = ("data", "fsdp", "sequence", "tensor")
"""Of every mesh, slowest first: devices that are neighbours along "tensor" talk most."""

BATCH_AXES = ("data", "fsdp")
"""What the rows of a batch are split over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices split what; the product is the number of devices of all processes.

    Raises:
      ValueError: if a field is out of its range (names the field).
    """

    data: int | None = None
    """Rows of the batch; every device keeps all parameters. None: the devices that remain."""

    fsdp: int = 1
    """Rows of the batch, and parameters and optimizer state, gathered layer by layer for use."""

    tensor: int = 1
    """Heads, MLP channels and vocabulary."""

    sequence: int = 1
    """Spans of each sequence (context parallelism)."""

    def __post_init__(self):
        check_types(self, "mesh.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"mesh.{field.name}: expected at least 1, got {value}")


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes `AXES`.

    The axes are Auto: the compiler places the collectives from the shardings of inputs, outputs
    and constraints, except inside the layers' own shard_map.

    Args:
      config: sizes of the axes.
      devices: all devices of all processes if None.

    Raises:
      ValueError: if the sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    others = math.prod(getattr(config, axis) for axis in AXES[1:])
    data = config.data or max(1, len(devices) // others)
    if data * others != len(devices):
        sizes = " x ".join(f"{axis} {getattr(config, axis) or '(the rest)'}" for axis in AXES)
        raise ValueError(
            f"mesh: expected sizes whose product is the {len(devices)} devices, got {sizes}"
        )
    shape = (data, *(getattr(config, axis) for axis in AXES[1:]))
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


class Reader(NamedTuple):
    """Which part of every batch's rows this process reads: part `index` of `count` equal ones."""

    index: int
    count: int


def batch_reader(mesh: Mesh) -> Reader:
    """Returns this process's part of the rows.

    Processes whose devices hold spans or heads of the same rows read the same part.

    Raises:
      ValueError: if the rows of a process are not one of several equal parts.
    """
    groups = mesh.devices.reshape(batch_shards(mesh), -1)
    own = [
        i
        for i, devices in enumerate(groups)
        if any(device.process_index == jax.process_index() for device in devices)
    ]
    if own != list(range(own[0], own[0] + len(own))) or own[0] % len(own) or len(groups) % len(own):
        raise ValueError(
            f"mesh: expected data x fsdp = {len(groups)} to divide the number of processes "
            f"{jax.process_count()} or to be a multiple of it"
        )
    return Reader(own[0] // len(own), len(groups) // len(own))


def put_batch[Rows](mesh: Mesh, rows: Rows) -> Rows:
    """Puts each process's rows of a batch on the mesh: rows over `BATCH_AXES`, T over "sequence".

    Args:
      mesh: of all processes.
      rows: what the process has read, as its part in `batch_reader`: a tree of arrays [*G, n, T].

    Returns:
      The arrays of the whole batch, [*G, B, T].
    """
    count = batch_reader(mesh).count

    def put(x: Shaped[np.ndarray, "*G n T"]) -> Shaped[jax.Array, "*G B T"]:
        *leading, n, length = x.shape
        sharding = batch_sharding(mesh, len(leading))
        return jax.make_array_from_process_local_data(sharding, x, (*leading, n * count, length))

    return jax.tree.map(put, rows)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of arrays [..., B, T] on the mesh, with `leading` axes before B."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES, "sequence"))
