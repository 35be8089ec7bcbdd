"""Sampling from a language model; with constant memory per token if it has no full attention."""

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypedDict, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gdn2_jax.fields import require
from gdn2_jax.layers.parts import merge_projections
from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.session import Session, checked_rows, in_pieces, read, start_session
from gdn2_jax.models.token_step import kernels_serve, prepared, settled, token_step

# Steps between two looks of the host.
_MOST_STEPS = 256
# With `on_token` the host looks about as often as a reader sees.
_SECONDS_BETWEEN_LOOKS = 0.1


class GenerationOptions(TypedDict, total=False):
    """How `generate` and `continue_session` draw tokens, and when a row ends.

    Attributes:
      temperature: divides the logits, 1 by default; 0 takes the most likely token.
      top_k: sample among the k most likely tokens only.
      top_p: sample among the most likely tokens that together first reach this probability.
      seed: of the random numbers, 0 by default; the same seed gives the same tokens, however many are
        asked for.
      eos: a row ends with this token.
      on_token: called with each new column [B] of tokens, soon after it is known. It may return
        which rows [B] end with it. Of rows that have ended a column holds `eos`, or 0 without one.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    eos: int | None
    on_token: Callable[[np.ndarray], np.ndarray | list[bool] | None] | None


def generate(
    config: ModelConfig,
    params: dict,
    prompt: Int[Array | np.ndarray, "B P"] | Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    **options: Unpack[GenerationOptions],
) -> Int[np.ndarray, "B PN"] | list[Int[np.ndarray, "L"]]:
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
      **options: see `GenerationOptions`.

    Returns:
      For an array, the prompt and N new tokens, int32; rows that have ended go on with `eos`, or 0
      without one. For a list, the list of each row's prompt and new tokens until it ended.

    Raises:
      ValueError: an argument is malformed or out of range, or the logits are NaN or infinite.
    """
    rows = checked_rows(prompt, config.vocab_size)
    _check_options(config, max_new_tokens, options)
    if config.mixer.cache_grows:
        length = in_pieces(max(map(len, rows)))
        config = dataclasses.replace(config, context_length=in_pieces(length + max_new_tokens))
    session = start_session(config, params, rows)
    new, _ = continue_session(config, params, session, max_new_tokens=max_new_tokens, **options)
    if isinstance(prompt, list | tuple):
        return [np.concatenate(pair) for pair in zip(rows, new, strict=True)]
    columns = np.full((len(rows), max_new_tokens), options.get("eos") or 0, np.int32)
    for row, tokens in zip(columns, new, strict=True):
        row[: len(tokens)] = tokens
    return np.concatenate([np.stack(rows), columns], axis=1)


def continue_session(
    config: ModelConfig,
    params: dict,
    session: Session,
    *,
    max_new_tokens: int,
    **options: Unpack[GenerationOptions],
) -> tuple[list[Int[np.ndarray, "N"]], Session]:
    """Continues each row of a session; see `generate` for arguments and errors.

    Returns:
      The new tokens of each row until it ended, and the session after them. All its rows have read
      the same number of tokens: a row that ended early has read `eos` or 0 since then. The session
      may have read some tokens that `on_token` did not get. The session that was given must not be
      used again.
    """
    _check_options(config, max_new_tokens, options)
    key = jax.random.key(options.get("seed", 0) % 2**32)
    sampling = Sampling.of(options)
    eos, on_token = options.get("eos"), options.get("on_token")
    filler = 0 if eos is None else eos
    end = np.int32(-1 if eos is None else eos)  # No token is -1.

    form = _form(config, params, session)
    batch = session.logits.shape[0]
    new = np.full((batch, max_new_tokens), filler, np.int32)
    lengths = np.full(batch, max_new_tokens)
    ended = np.zeros(batch, bool)
    known, steps = 0, _MOST_STEPS if on_token is None else 1
    while known < max_new_tokens and not ended.all():
        before = time.monotonic()
        steps = min(steps, max_new_tokens - known)
        session, columns, count, broken = _decode(
            config, form, params, session, jnp.array(ended), sampling, key, end, known, steps
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
        if on_token is not None and time.monotonic() - before < _SECONDS_BETWEEN_LOOKS / 2:
            steps = min(2 * steps, _MOST_STEPS)
    return [row[:length] for row, length in zip(new, lengths, strict=True)], session


def _form(
    config: ModelConfig, params: dict, session: Session
) -> Literal["kernels", "merged", "apart"]:
    """How a token is computed: by few kernels, else by modules, projections of an input merged."""
    weights, kept = (
        [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)] for tree in (params, session)
    )
    # Columns that are split over devices would move between them.
    if not all(x.is_fully_replicated for x in weights):
        return "apart"
    devices = set().union(*(x.devices() for x in weights + kept))
    if len(devices) == 1 and kernels_serve(config, len(session.logits)):
        capability = getattr(devices.pop(), "compute_capability", None)
        if capability == "9.0" or config.implementation == "pallas":
            return "kernels"
    return "merged"


class Sampling(NamedTuple):
    """How a token is drawn: scalars that a compiled program reads when it runs.

    Attributes:
      temperature: as in `GenerationOptions`.
      top_k: as there; a number too large for any vocabulary if there is no such limit.
      top_p: as there; infinity if there is no such limit.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]

    @classmethod
    def of(cls, options: GenerationOptions) -> "Sampling":
        """Takes the options of `generate`."""
        top_k = options.get("top_k") or np.iinfo(np.int32).max
        top_p = options.get("top_p")
        # Sums of probabilities may exceed 1 before the last one.
        top_p = math.inf if top_p is None or top_p == 1 else top_p
        temperature = options.get("temperature", 1.0)
        return cls._make((np.float32(temperature), np.int32(top_k), np.float32(top_p)))


@functools.partial(jax.jit, static_argnames=("config", "form"), donate_argnames=("session",))
def _decode(config, form, params, session, ended, sampling, key, eos, known, steps):
    """Up to `steps` tokens more than the `known` ones.

    Stops early when all rows have ended, and before a token whose logits are not finite.

    Returns:
      The session, the tokens [_MOST_STEPS, B], how many of these there are, and the rows whose
      logits are not finite.
    """
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(ended.size))
    params = nn.unbox(params)
    by_kernels = form == "kernels"
    if form != "apart":
        params = merge_projections(params, config.dtype)
    if config.unroll:
        # A slice of stacked weights would be copied at every step.
        params = {**params, "layers": _unstacked(params["layers"])}
        cache = settled(session.cache) if by_kernels else session.cache
        session = session._replace(cache={"layers": _unstacked(cache["layers"])})
    if by_kernels:
        params = prepared(config, params)

    def broken(session):
        return ~jnp.isfinite(jnp.max(session.logits, axis=-1))

    def goes_on(carry):
        step, session, ended, _ = carry
        return (step < steps) & ~jnp.all(ended) & ~jnp.any(broken(session) & ~ended)

    def body(carry):
        step, session, ended, columns = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows, known + step)
        token = _draw(session.logits, sampling, keys)
        token = jnp.where(ended, jnp.maximum(eos, 0), token)
        if by_kernels:
            session = token_step(config, params, session.cache, token[:, None])
        else:
            session = read(config, _stacked(params), _stacked(session.cache), token[:, None])
            if config.unroll:
                session = session._replace(cache={"layers": _unstacked(session.cache["layers"])})
        return step + 1, session, ended | (token == eos), columns.at[step].set(token)

    columns = jnp.zeros((_MOST_STEPS, ended.size), jnp.int32)
    carry = (jnp.int32(0), session, ended, columns)
    step, session, _, columns = jax.lax.while_loop(goes_on, body, carry)
    session = session._replace(cache=_stacked(session.cache))
    return session, columns, step, broken(session)


def _unstacked(tree):
    """A list of the trees of the layers, whose arrays are stacked in `tree`."""
    (length,) = {x.shape[0] for x in jax.tree.leaves(tree)}
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(length)]


def _stacked(tree):
    """`tree` with its list of layers as one tree again: XLA takes a layer's slice for its part."""
    if isinstance(layers := tree["layers"], list):
        return tree | {"layers": jax.tree.map(lambda *parts: jnp.stack(parts), *layers)}
    return tree


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


def _check_options(config: ModelConfig, max_new_tokens: int, options: GenerationOptions) -> None:
    unknown = options.keys() - GenerationOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"options: expected those of GenerationOptions, got {', '.join(unknown)}")
    top_k, top_p, eos = (options.get(name) for name in ("top_k", "top_p", "eos"))
    for name, value in {"max_new_tokens": max_new_tokens, "top_k": top_k, "eos": eos}.items():
        try:
            value is None or operator.index(value)
        except TypeError:
            hint = "; on_token may end rows by other rules" if name == "eos" else ""
            raise ValueError(f"{name}: expected a whole number, got {value!r}{hint}") from None
    require("max_new_tokens", max_new_tokens >= 1, "at least 1", max_new_tokens)
    temperature = options.get("temperature", 1.0)
    size = config.vocab_size
    require("temperature", 0 <= temperature < math.inf, "a finite number >= 0", temperature)
    require("top_k", top_k is None or 1 <= top_k <= size, f"None or 1 to {size}", top_k)
    require("top_p", top_p is None or 0 < top_p <= 1, "None or a number in (0, 1]", top_p)
    require("eos", eos is None or 0 <= eos < size, f"None or 0 to {size - 1}", eos)
