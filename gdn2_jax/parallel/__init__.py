"""Meshes and shardings."""

from gdn2_jax.parallel.mesh import data_mesh

__all__ = ["data_mesh"]
