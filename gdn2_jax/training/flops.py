"""Model FLOPs of a token, and what devices can do: together the model-FLOP utilisation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from gdn2_jax.models import LanguageModel, ModelConfig

# Dense bf16 FLOP/s of one device, from the vendors' data sheets; keys begin JAX's device_kind.
_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


# Cached: every logged step asks, and counting traces the model.
@functools.cache
def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token; a multiply-add counts two.

    Three forwards, where a forward is 2 for each weight of a matrix product and what the mixers take
    (`flops` in models/mixers.py). Decays do not count, nor what an implementation spends beyond this,
    on chunks or on recomputation.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # Of all implementations the recurrence is traced the fastest.
    model = LanguageModel(dataclasses.replace(config, implementation="recurrent"))
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    weights = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "kernel"
    )
    layers = config.num_layers // len(config.mixers)
    forward = 2 * weights + sum(
        layers * mixer.flops(config.d_model, sequence_length) for mixer in config.mixers.values()
    )
    return 3 * forward


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by JAX's name for it, None if not known."""
    names = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(names, key=len)] if names else None
