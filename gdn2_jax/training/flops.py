"""Model FLOPs of a token, and what devices can do: together the model-FLOP utilisation."""

import math

import jax

from gdn2_jax.models import ModelConfig
from gdn2_jax.models.sizes import abstract_variables

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


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token; a multiply-add counts two.

    Three forwards, where a forward is 2 for each weight of a matrix product and what the mixers take
    (`flops` in models/mixers.py). Decays do not count, nor what an implementation spends beyond this,
    on chunks or on recomputation.
    """
    variables = abstract_variables(config, sequence_length)
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
