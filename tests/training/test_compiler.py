from types import SimpleNamespace

import jax
import jax.numpy as jnp

from gdn2_jax.training.step import compiler_options


def test_options_are_for_several_gpus_alone_and_xla_knows_them():
    gpus = [SimpleNamespace(platform="gpu")] * 2
    assert compiler_options(gpus[:1], True) is None
    assert compiler_options(gpus, False) is None
    assert compiler_options(jax.devices(), True) is None
    options = compiler_options(gpus, True)
    assert options["xla_gpu_enable_latency_hiding_scheduler"]
    # An unknown option would be an error.
    assert jax.jit(jnp.sin, compiler_options=options)(0.0) == 0
