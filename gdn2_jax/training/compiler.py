"""XLA's options for a training step on several GPUs."""

from collections.abc import Iterable

import jax

# Collectives start early and finish late, with computation between, also that of the next turn of a
# loop. Pieces of 32 MB: a piece can leave once its last gradient is there, beside the backward of
# earlier layers, and no more gradients than that are copied together for it. With pieces of 256 MB
# most layers' gradients were on their way at the end of the step, and 1.4 GiB more was alive.
_PIECE = 2**25
_OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
    "xla_gpu_all_gather_combine_threshold_bytes": _PIECE,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": _PIECE,
    "xla_gpu_all_reduce_combine_threshold_bytes": _PIECE,
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
