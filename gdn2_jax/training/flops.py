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

    Three forwards, where a forward is 2 for each weight of a matrix product, what the recurrence
    takes (see `_recurrence`), and 4 d_model for each key that an attention query sees. What an
    implementation spends beyond this, on chunks or on recomputation, does not count.
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
    mixers = [config.mixer]
    if config.hybrid:
        mixers.append("sliding_window_attention")
    each = config.num_layers // len(mixers)
    forward = 2 * weights
    for mixer in mixers:
        if mixer == "attention":
            forward += each * _attention(config, sequence_length, sequence_length)
        elif mixer == "sliding_window_attention":
            forward += each * _attention(config, config.window_size, sequence_length)
        else:
            forward += each * _recurrence(config)
    return 3 * forward


def _recurrence(config: ModelConfig) -> float:
    """FLOPs of a layer's recurrence for one token; decays do not count.

    Delta rules read at the erase address, write, and read at the query: 6 d_k d_v for each value
    head. State-space models write and read, each of them `mimo_rank` times if MIMO: 4 d_k d_v.
    """
    if config.mixer in ("mamba2", "mamba3"):
        mimo = config.mixer == "mamba3" and config.mamba3_form == "mimo"
        rank = config.mimo_rank if mimo else 1
        return 4 * rank * config.ssm_inner_dim * config.ssm_state_dim
    value_heads = config.num_value_heads or config.num_heads
    return 6 * value_heads * config.head_dim**2 * config.expand_v


def _attention(config: ModelConfig, window_size: int, sequence_length: int) -> float:
    window = min(window_size, sequence_length)
    # The first `window` queries see 1, 2, ..., the others `window` keys.
    keys = window - window * (window - 1) / (2 * sequence_length)
    return 4 * config.d_model * keys


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by JAX's name for it, None if not known."""
    names = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(names, key=len)] if names else None
