"""The paper's optimizer: clipping, AdamW, warm-up and cosine."""

from typing import Any

import jax
import optax

from gdn2_jax.training.config import OptimizerConfig


def learning_rate_schedule(
    config: OptimizerConfig, microsteps: int, accumulation: int
) -> optax.Schedule:
    """Returns the learning rate of each optimizer step s = 0, 1, ...

    The released trainer advances its schedule eta(i) with every microbatch and reads it once per
    optimizer step, at the last of its G microbatches: step s uses eta((s + 1) G - 1), where

        eta(i) = peak i / W                                             for i < W,
        eta(i) = end + (peak - end) (1 + cos(pi (i - W) / (M - W))) / 2   for W <= i <= M.

    Args:
      config: peak, end and the share of warm-up, W = int(warmup * M).
      microsteps: M, microbatches of the whole run.
      accumulation: G, microbatches of an optimizer step.

    Returns:
      A function of s.
    """
    eta = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=int(config.warmup * microsteps),
        decay_steps=microsteps,
        end_value=config.learning_rate * config.final_learning_rate,
    )
    return lambda step: eta((step + 1) * accumulation - 1)


def decay_mask(params: Any, kind: str) -> Any:
    """Returns a tree of bools like `params`: which parameters decay.

    Args:
      params: of a `LanguageModel`.
      kind: see `OptimizerConfig.decay_mask`.
    """

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
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns clipping by the global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            mu_dtype=config.mean_dtype,
            weight_decay=config.weight_decay,
            mask=lambda params: decay_mask(params, config.decay_mask),
        ),
    )
