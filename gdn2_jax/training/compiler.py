"""XLA's options for a training step on several GPUs."""

from collections.abc import Iterable

import jax

# Start collectives early and finish them late, with computation between, also that of the next turn
# of a loop; few and large ones. Costs memory for what is on its way.
_OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 2**28,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**28,
    "xla_gpu_all_reduce_combine_threshold_bytes": 2**28,
}


def compiler_options(devices: Iterable[jax.Device], overlap: bool) -> dict[str, bool | int] | None:
    """Returns what to give `jax.jit`; None for a single device and for other platforms than GPUs.

    Args:
      devices: that the step runs on.
      overlap: hide the time of collectives behind computation.
    """
    platforms = [device.platform for device in devices]
    several_gpus = len(platforms) > 1 and platforms[0] == "gpu"
    return dict(_OVERLAP) if overlap and several_gpus else None
