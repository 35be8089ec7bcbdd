"""The paper's optimizer: clipping, AdamW, warm-up and cosine; other schedules beside it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gdn2_jax.training.config import OptimizerConfig


def schedule_borders(config: OptimizerConfig, microsteps: int) -> Int[np.ndarray, "3"]:
    """Returns the microsteps W, D and M at which warm-up, the time at the peak and the run end.

    Args:
      config: shares of warm-up and decay.
      microsteps: M, microbatches of the whole run.

    Returns:
      For `scheduled_rate`. It can be traced, so that another number of steps compiles nothing anew.
    """
    warmup = int(config.warmup * microsteps)
    decay = {
        "cosine": warmup,
        "constant": microsteps,
        "wsd": microsteps - int(config.decay * microsteps),
    }
    return np.array([warmup, decay[config.schedule], microsteps], np.int32)


def scheduled_rate(
    config: OptimizerConfig,
    borders: Int[Array | np.ndarray, "3"],
    accumulation: int,
    step: Int[Array, ""] | int,
) -> Float[Array, ""]:
    """Returns the learning rate of the optimizer step s = 0, 1, ...

    The released trainer advances its schedule eta(i) with every microbatch and reads it once per
    optimizer step, at the last of its G microbatches: step s uses eta((s + 1) G - 1), where

        eta(i) = peak i / W                              for i < W,
        eta(i) = peak                                    for W <= i < D,
        eta(i) = peak - (peak - end) f((i - D) / (M - D))   for D <= i <= M,

    f(x) = (1 - cos(pi x)) / 2 in "cosine", where D = W, and x in "wsd".

    Args:
      config: peak, end and schedule.
      borders: W, D and M.
      accumulation: G, microbatches of an optimizer step.
      step: s.

    Returns:
      The rate in float32.
    """
    warmup, decay, last = borders
    i = (step + 1) * accumulation - 1
    peak = jnp.float32(config.learning_rate)
    end = peak * config.final_learning_rate
    rising = peak * (i / jnp.maximum(warmup, 1)).astype(jnp.float32)
    x = jnp.clip((i - decay) / jnp.maximum(last - decay, 1), 0, 1).astype(jnp.float32)
    gone = (1 - jnp.cos(jnp.pi * x)) / 2 if config.schedule == "cosine" else x
    falling = peak if config.schedule == "constant" else peak - (peak - end) * gone
    return jnp.where(i < warmup, rising, falling)


def decay_mask(params: Any, kind: str) -> Any:
    """Returns which parameters of a `LanguageModel` decay; `OptimizerConfig.decay_mask` has the kinds."""

    def decays(path, _) -> bool:
        names = [key.key for key in path]
        if kind == "exclude_A_log_dt_bias":
            # D is Mamba's skip, which its layers mark as well.
            return names[-1] not in ("A_log", "dt_bias", "D")
        if kind == "matrices_only":
            # Layers are stacked, so ranks do not tell a matrix from a vector.
            return names[-1] in ("kernel", "embedding") and "conv1d" not in names[-2]
        return True

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    config: OptimizerConfig, learning_rate: Float[Array, ""] | float
) -> optax.GradientTransformation:
    """Returns clipping by the global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            # A function, as the state of the optimizer then counts its steps.
            lambda count: learning_rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            mu_dtype=config.mean_dtype,
            weight_decay=config.weight_decay,
            mask=lambda params: decay_mask(params, config.decay_mask),
        ),
    )
