"""Meshes and shardings: depends on nothing of ours."""

from gdn2_jax.parallel.halo import previous_tokens, with_previous_tokens
from gdn2_jax.parallel.logical import (
    as_typed,
    axis_size,
    beside,
    constrain,
    dense_product,
    explicit_sharding,
    gathered,
    on_mesh,
    param_shardings,
    partitioned,
    per_device,
)
from gdn2_jax.parallel.mesh import (
    MeshConfig,
    batch_reader,
    batch_sharding,
    batch_shards,
    make_mesh,
    put_batch,
)
from gdn2_jax.parallel.processes import greatest_of_processes, join_processes

__all__ = [
    "MeshConfig",
    "as_typed",
    "axis_size",
    "batch_reader",
    "batch_sharding",
    "batch_shards",
    "beside",
    "constrain",
    "dense_product",
    "explicit_sharding",
    "gathered",
    "greatest_of_processes",
    "join_processes",
    "make_mesh",
    "on_mesh",
    "param_shardings",
    "partitioned",
    "per_device",
    "previous_tokens",
    "put_batch",
    "with_previous_tokens",
]
