"""Flags for every test; JAX reads them when its first backend starts.

Eight simulated CPU devices, and no optimisation by LLVM: the suite is mostly compilation, which
that makes several times faster.
"""

import os

os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )
)
