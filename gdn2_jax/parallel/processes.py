"""Several processes as one job."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

# Variables in which launchers give the number of processes.
_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def join_processes() -> None:
    """Calls `jax.distributed.initialize` if this is one of several processes of a job.

    SLURM and Open MPI say so themselves. By hand, set JAX_NUM_PROCESSES, JAX_PROCESS_ID (0, 1, ...)
    and JAX_COORDINATOR_ADDRESS (host:port of process 0) for each. For use before any other call of
    JAX.

    Raises:
      ValueError: JAX_NUM_PROCESSES is set without the other two.
    """
    if not any(int(os.environ.get(name, "1")) > 1 for name in _COUNTS):
        return
    if "JAX_NUM_PROCESSES" not in os.environ:
        jax.distributed.initialize()
        return
    for name in ("JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"):
        if name not in os.environ:
            raise ValueError(f"{name}: expected to be set beside JAX_NUM_PROCESSES")
    jax.distributed.initialize(
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
        process_id=int(os.environ["JAX_PROCESS_ID"]),
    )


def greatest_of_processes(value: int) -> int:
    """Returns the greatest value of all processes; every process must call this."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.array(value)).max())
