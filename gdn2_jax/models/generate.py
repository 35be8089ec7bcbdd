"""Sampling from a language model; with constant memory per token if it has no full attention."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.language_model import LanguageModel


def generate(
    config: ModelConfig,
    params: dict,
    prompt: Int[Array, "B P"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> Int[Array, "B P+N"]:
    """Continues each row of `prompt`.

    The prompt runs through the chunkwise form at once, then every token is one step of the
    recurrence.

    Args:
      config: the model's configuration.
      params: its parameters, as in `model.apply({"params": params}, ...)`.
      prompt: token ids, all rows equally long.
      max_new_tokens: number N of tokens to add.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens only.
      top_p: sample among the most likely tokens that together first reach this probability.
      seed: of the random numbers; the same seed gives the same tokens.
      on_token: called with each new column [B] of tokens as soon as it is known.

    Returns:
      The prompt and the new tokens, int32.

    Raises:
      ValueError: an argument is malformed or out of range.
    """
    prompt = _checked_prompt(prompt, config.vocab_size)
    _check_arguments(config, max_new_tokens, temperature, top_k, top_p)
    if config.mixer == "attention":  # The one mixer whose cache grows with the text.
        length = prompt.shape[1] + max_new_tokens
        config = dataclasses.replace(config, context_length=length)
    sampling = Sampling(float(temperature), top_k, top_p)
    keys = jax.random.split(jax.random.key(seed), max_new_tokens)
    token, cache = _prefill(config, sampling, params, prompt, keys[0])
    if on_token is None:
        new = _scan_steps(config, sampling, params, cache, token, keys[1:])
    else:
        columns = [token]
        on_token(np.asarray(token))
        for key in keys[1:]:
            token, cache = _step(config, sampling, params, cache, token, key)
            columns.append(token)
            on_token(np.asarray(token))
        new = jnp.stack(columns, axis=1)
    return jnp.concatenate([prompt, new], axis=1)


class Sampling(NamedTuple):
    """How a token is drawn; the arguments of `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def _prefill(config, sampling, params, prompt, key) -> tuple[Int[Array, "B"], dict]:
    """The first new token and the cache after the prompt."""
    return _advance(config, sampling, {"params": params}, prompt, key)


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames=("cache",))
def _step(config, sampling, params, cache, token, key) -> tuple[Int[Array, "B"], dict]:
    variables = {"params": params, "cache": cache}
    return _advance(config, sampling, variables, token[:, None], key)


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def _scan_steps(config, sampling, params, cache, token, keys) -> Int[Array, "B N"]:
    """`token` and one more for each key."""

    def body(carry, key):
        token, cache = carry
        return _step(config, sampling, params, cache, token, key), token

    (last, _), tokens = jax.lax.scan(body, (token, cache), keys)
    return jnp.concatenate([tokens, last[None]]).T


def _advance(config, sampling, variables, tokens, key) -> tuple[Int[Array, "B"], dict]:
    model = LanguageModel(config, decode=True)
    logits, updated = model.apply(variables, tokens, last_only=True, mutable=["cache"])
    return _draw(logits[:, -1], sampling, key), updated["cache"]


def _draw(logits: Float[Array, "B vocab"], sampling: Sampling, key) -> Int[Array, "B"]:
    temperature, top_k, top_p = sampling
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _checked_prompt(prompt, vocab_size: int) -> Int[Array, "B P"]:
    prompt = np.asarray(prompt)
    if prompt.ndim != 2 or prompt.size == 0 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"prompt: expected a non-empty integer array [B P], "
            f"got shape {prompt.shape} of {prompt.dtype}"
        )
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(
            f"prompt: expected ids in [0, {vocab_size}), got {prompt.min()} to {prompt.max()}"
        )
    return jnp.asarray(prompt, jnp.int32)


def _check_arguments(config, max_new_tokens, temperature, top_k, top_p) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k: expected None or 1 to {config.vocab_size}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected None or a number in (0, 1], got {top_p}")
