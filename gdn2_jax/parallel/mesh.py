"""The devices of a run as a mesh."""

import jax
from jax.sharding import AxisType, Mesh


def data_mesh() -> Mesh:
    """Returns a mesh of all devices along one axis, "data", over which batches are split.

    The axis is Auto: the compiler places the collectives from the shardings of inputs and outputs.
    """
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
