"""Sampling from a language model; with constant memory per token if it has no full attention."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.language_model import LanguageModel

# A prompt is read in pieces, so that few programs serve all lengths: one of a power of two tokens,
# or several of the longest.
_SHORTEST_PIECE, _LONGEST_PIECE = 16, 4096
# Steps between two looks of the host.
_MOST_STEPS = 256
# With `on_token` the host looks about as often as a reader sees.
_SECONDS_BETWEEN_LOOKS = 0.1


def generate(
    config: ModelConfig,
    params: dict,
    prompt: Int[Array, "B P"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | None = None,
    on_token: Callable[[np.ndarray], np.ndarray | None] | None = None,
) -> Int[np.ndarray, "B P+N"] | list[Int[np.ndarray, "L"]]:
    """Continues each row of `prompt`.

    The prompt runs through the chunkwise form in pieces, then every token is one step of the
    recurrence. Rows do not see each other: greedy tokens are those of the row alone. A program is
    compiled for each batch size, and for each length of a piece: 16, 32, ..., 4096; with full
    attention also for each such length of the whole text.

    Args:
      config: the model's configuration.
      params: its parameters, as in `model.apply({"params": params}, ...)`.
      prompt: token ids: an array, or a list of rows that may differ in length.
      max_new_tokens: number N of tokens to add.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens only.
      top_p: sample among the most likely tokens that together first reach this probability.
      seed: of the random numbers; the same seed gives the same tokens, however many are asked for.
      eos: a row ends with this token.
      on_token: called with each new column [B] of tokens, soon after it is known. It may return
        which rows [B] end with it. Of rows that have ended a column holds `eos`, or 0 without one.

    Returns:
      For an array, the prompt and N new tokens, int32; rows that have ended go on with `eos`, or 0
      without one. For a list, the list of each row's prompt and new tokens until it ended.

    Raises:
      ValueError: an argument is malformed or out of range, or the logits are NaN or infinite.
    """
    rows = _checked_rows(prompt, config.vocab_size)
    _check_arguments(config, max_new_tokens, temperature, top_k, top_p, eos)
    length = _in_pieces(max(map(len, rows)))
    if config.mixer.cache_grows:
        config = dataclasses.replace(config, context_length=_in_pieces(length + max_new_tokens))
    state = _read_prompt(config, params, rows, length)
    key = jax.random.key(seed % 2**32)
    sampling = Sampling.of(temperature, top_k, top_p)
    filler = 0 if eos is None else eos
    end = np.int32(-1 if eos is None else eos)  # No token is -1.

    new = np.full((len(rows), max_new_tokens), filler, np.int32)
    lengths = np.full(len(rows), max_new_tokens)
    ended = np.zeros(len(rows), bool)
    known, steps = 0, _MOST_STEPS if on_token is None else 1
    while known < max_new_tokens and not ended.all():
        before = time.monotonic()
        steps = min(steps, max_new_tokens - known)
        state, columns, count, broken = _decode(
            config, params, state, sampling, key, end, known, steps
        )
        for column in np.asarray(columns)[: int(count)]:
            column = np.where(ended, filler, column)
            new[:, known] = column
            known += 1
            ends = column == end
            if on_token is not None and (asked := on_token(column)) is not None:
                ends |= np.asarray(asked, bool)
            lengths[ends & ~ended] = known
            ended |= ends
            if ended.all():
                break
        broken = np.flatnonzero(np.asarray(broken) & ~ended)
        if broken.size and known < max_new_tokens:
            raise ValueError(
                f"params: expected weights that give finite logits, got NaN or infinity for new "
                f"token {known} of row {broken[0]}"
            )
        state = state._replace(ended=jnp.array(ended))
        if on_token is not None and time.monotonic() - before < _SECONDS_BETWEEN_LOOKS / 2:
            steps = min(2 * steps, _MOST_STEPS)
    if isinstance(prompt, list | tuple):
        return [np.concatenate([row, new[i, : lengths[i]]]) for i, row in enumerate(rows)]
    return np.concatenate([np.stack(rows), new], axis=1)


class Sampling(NamedTuple):
    """How a token is drawn: scalars that a compiled program reads when it runs.

    Attributes:
      temperature: as in `generate`.
      top_k: as there; a number too large for any vocabulary if there is no such limit.
      top_p: as there; infinity if there is no such limit.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]

    @classmethod
    def of(cls, temperature: float, top_k: int | None, top_p: float | None) -> "Sampling":
        """Takes the arguments of `generate`."""
        every = np.iinfo(np.int32).max
        # Sums of probabilities may exceed 1 before the last one.
        top_p = math.inf if top_p is None or top_p == 1 else top_p
        return cls(np.float32(temperature), np.int32(top_k or every), np.float32(top_p))


class _State(NamedTuple):
    """What the next step needs to know; `logits` are of the next token."""

    cache: dict
    logits: Float[Array, "B vocab"]
    ended: Bool[Array, "B"]


def _in_pieces(length: int) -> int:
    """The length of `length` tokens after padding: of one piece, or of several of the longest."""
    if length > _LONGEST_PIECE:
        return -(-length // _LONGEST_PIECE) * _LONGEST_PIECE
    return max(_SHORTEST_PIECE, 2 ** (length - 1).bit_length())


def _read_prompt(config, params, rows: list[np.ndarray], length: int) -> _State:
    """The state after the prompts, whose padding on the left is a document of its own."""
    tokens = np.zeros((len(rows), length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        segment_ids[i, length - len(row) :] = 1
    cache = _empty_cache(config, len(rows))
    for start in range(0, length, _LONGEST_PIECE):
        piece = slice(start, start + _LONGEST_PIECE)
        cache, logits = _read(config, params, cache, tokens[:, piece], segment_ids[:, piece])
    return _State(cache, logits, jnp.zeros(len(rows), bool))


@functools.partial(jax.jit, static_argnames=("config", "batch"))
def _empty_cache(config, batch) -> dict:
    model = LanguageModel(config, decode=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((batch, 1), jnp.int32))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["cache"])


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _read(config, params, cache, tokens, segment_ids=None) -> tuple[dict, Float[Array, "B vocab"]]:
    """The cache after some tokens, and the logits of the next one."""
    logits, updated = LanguageModel(config, decode=True).apply(
        {"params": params, "cache": cache}, tokens, segment_ids, last_only=True, mutable=["cache"]
    )
    return updated["cache"], logits[:, -1]


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _decode(config, params, state, sampling, key, eos, known, steps):
    """Up to `steps` tokens more than the `known` ones.

    Stops early when all rows have ended, and before a token of which the logits are not finite.

    Returns:
      The state, the tokens [_MOST_STEPS, B], how many of these there are, and the rows whose
      logits are not finite.
    """
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(state.ended.size))

    def broken(state):
        return ~jnp.isfinite(jnp.max(state.logits, axis=-1))

    def goes_on(carry):
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.ended) & ~jnp.any(broken(state) & ~state.ended)

    def body(carry):
        step, state, columns = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows, known + step)
        token = _draw(state.logits, sampling, keys)
        token = jnp.where(state.ended, jnp.maximum(eos, 0), token)
        cache, logits = _read(config, params, state.cache, token[:, None])
        state = _State(cache, logits, state.ended | (token == eos))
        return step + 1, state, columns.at[step].set(token)

    columns = jnp.zeros((_MOST_STEPS, state.ended.size), jnp.int32)
    step, state, columns = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, columns))
    return state, columns, step, broken(state)


def _draw(logits: Float[Array, "B vocab"], sampling: Sampling, keys) -> Int[Array, "B"]:
    temperature, top_k, top_p = sampling
    vocab_size = logits.shape[-1]

    def truncated(logits):
        descending = jnp.sort(logits, axis=-1, descending=True)
        least = jnp.take(descending, jnp.minimum(top_k, vocab_size) - 1, axis=-1)[:, None]
        likely = descending >= least
        probabilities = jax.nn.softmax(descending, axis=-1, where=likely)
        likely &= jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        least = jnp.min(jnp.where(likely, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < least, -jnp.inf, logits)

    def sampled(logits):
        # The greatest is 0 first, so that no temperature makes it infinite.
        logits = logits - jnp.max(logits, axis=-1, keepdims=True)
        logits /= jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
        limited = (top_k < vocab_size) | (top_p < 1)
        logits = jax.lax.cond(limited, truncated, lambda logits: logits, logits)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def greedy(logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, sampled, greedy, logits)


def _checked_rows(prompt, vocab_size: int) -> list[Int[np.ndarray, "P"]]:
    if isinstance(prompt, list | tuple):
        rows = [np.asarray(row) for row in prompt]
        if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
            shapes = [row.shape for row in rows]
            raise ValueError(f"prompt: expected rows of token ids, got rows of shapes {shapes}")
        dtype = np.result_type(*rows)
    else:
        rows = np.asarray(prompt)
        if rows.ndim != 2 or rows.size == 0:
            raise ValueError(
                f"prompt: expected a non-empty array [B P], or a list of rows, "
                f"got shape {rows.shape}"
            )
        dtype = rows.dtype
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"prompt: expected integers, got {dtype}")
    least, greatest = min(row.min() for row in rows), max(row.max() for row in rows)
    if least < 0 or greatest >= vocab_size:
        raise ValueError(f"prompt: expected ids in [0, {vocab_size}), got {least} to {greatest}")
    return [row.astype(np.int32) for row in rows]


def _check_arguments(config, max_new_tokens, temperature, top_k, top_p, eos) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k: expected None or 1 to {config.vocab_size}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected None or a number in (0, 1], got {top_p}")
    if eos is not None and not 0 <= eos < config.vocab_size:
        raise ValueError(f"eos: expected None or 0 to {config.vocab_size - 1}, got {eos}")
