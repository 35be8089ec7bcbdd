"""Eight simulated CPU devices for every test; JAX reads the flag when its first backend starts."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
