"""Model FLOPs of a token, and what devices can do: together the model-FLOP utilisation."""

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


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token; a multiply-add counts two.

    Three forwards, where a forward is 2 for each weight of a matrix product, 6 d_k d_v for each
    value head's recurrence (read at the erase address, write, read at the query), and
    4 d_model for each key that an attention query sees. What an implementation spends beyond
    this, on chunks or on recomputation, does not count.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
    weights = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "kernel"
    )
    attention_layers = config.num_layers // 2 if config.hybrid else 0
    if config.mixer == "sliding_window_attention":
        attention_layers = config.num_layers
    value_heads = config.num_value_heads or config.num_heads
    recurrence = 6 * value_heads * config.head_dim**2 * config.expand_v
    window = min(config.window_size, sequence_length)
    # The first `window` queries see 1, 2, ..., the others `window` keys.
    keys = window - window * (window - 1) / (2 * sequence_length)
    forward = (
        2 * weights
        + (config.num_layers - attention_layers) * recurrence
        + attention_layers * 4 * config.d_model * keys
    )
    return 3 * forward


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by JAX's name for it, None if not known."""
    names = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(names, key=len)] if names else None
