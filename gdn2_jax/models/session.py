"""What a model has read so far, kept to go on from: in memory, in a file, row by row.

Of a recurrent model it has the same size after any number of tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from gdn2_jax.files import replacing
from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.language_model import LanguageModel

# A prompt is read in pieces, so that few programs serve all lengths: one of a power of two tokens,
# or several of the longest.
_SHORTEST_PIECE, _LONGEST_PIECE = 16, 4096


class Session(NamedTuple):
    """Texts that a model has read, one a row.

    Attributes:
      cache: the model's "cache" collection, whose arrays are [layers, B, ...].
      logits: of the next token of each row.
    """

    cache: dict
    logits: Float[Array, "B vocab"]


def start_session(
    config: ModelConfig,
    params: dict,
    prompts: Int[Array | np.ndarray, "B P"] | Sequence[Sequence[int] | np.ndarray],
) -> Session:
    """Reads prompts, which may differ in length; rows do not see each other.

    Args:
      config: the model's configuration; `context_length` is what full attention can hold.
      params: its parameters.
      prompts: token ids, as for `generate`.

    Raises:
      ValueError: the prompts are malformed or too long for `context_length`.
    """
    rows = checked_rows(prompts, config.vocab_size, name="prompts")
    length = in_pieces(max(map(len, rows)))
    if config.mixer.cache_grows and length > config.context_length:
        raise ValueError(
            f"context_length: expected at least {length}, the prompts' length in pieces, "
            f"got {config.context_length}"
        )
    return _read_rows(config, params, empty_cache(config, len(rows)), rows, length)


def extend_session(
    config: ModelConfig,
    params: dict,
    session: Session,
    tokens: Int[Array | np.ndarray, "B T"] | Sequence[Sequence[int] | np.ndarray],
) -> Session:
    """Reads more tokens in each row.

    `session` itself must not be used again.

    Args:
      config: the model's configuration.
      params: its parameters.
      session: of B rows.
      tokens: ids, as an array or as a list of rows. An array is read in one call; each T compiles
        a program. Rows of a list may differ in length and be empty. They are read in pieces of
        4096, 2048, ..., 1 tokens, the largest that still fit; each size compiles a program.

    Raises:
      ValueError: the tokens are malformed, or not of as many rows.
    """
    rows = checked_rows(tokens, config.vocab_size, name="tokens", may_be_empty=True)
    if len(rows) != len(session.logits):
        raise ValueError(f"tokens: expected {len(session.logits)} rows, got {len(rows)}")
    lengths = np.array([len(row) for row in rows])
    if (lengths == lengths[0]).all() and lengths[0]:
        return read(config, params, session.cache, np.stack(rows))
    starts, piece = np.zeros_like(lengths), _LONGEST_PIECE
    while (starts < lengths).any():
        takes_part = lengths - starts >= piece
        if not takes_part.any():
            piece //= 2
            continue
        block = np.zeros((len(rows), piece), np.int32)
        for row in np.flatnonzero(takes_part):
            block[row] = rows[row][starts[row] : starts[row] + piece]
        session = _read_some(config, params, session, block, takes_part)
        starts += piece * takes_part
    return session


def sessions_along(
    config: ModelConfig,
    params: dict,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Sequence[int],
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
) -> Iterator[Session]:
    """Yields the session after each given position of one text, for example for a prefix cache.

    All is read once. A program is compiled for each distance between neighbouring positions.

    Args:
      config: the model's configuration.
      params: its parameters.
      tokens: ids; what is behind the last position is not read.
      positions: numbers of tokens, ascending, such as range(N, T + 1, N), or the ends of the documents
        of a packed row.
      segment_ids: document of each token, at least 1; None for one document. A session goes on with
        the document of its last token.

    Raises:
      ValueError: the tokens are malformed, or the positions do not ascend from 1 to T.
    """
    rows = np.stack(checked_rows(np.asarray(tokens), config.vocab_size, name="tokens"))
    ids = None if segment_ids is None else np.asarray(segment_ids, np.int32)
    bounds = [0, *positions]
    if any(a >= b for a, b in pairwise(bounds)) or bounds[-1] > rows.shape[1]:
        raise ValueError(
            f"positions: expected ascending ones of 1 to {rows.shape[1]}, got {list(positions)}"
        )
    cache = empty_cache(config, len(rows))
    for start, stop in pairwise(bounds):
        documents = None if ids is None else ids[:, start:stop]
        session = read(config, params, cache, rows[:, start:stop], documents)
        # The next span overwrites it.
        cache = jax.tree.map(jnp.copy, session.cache)
        yield session


def replace_row(
    config: ModelConfig,
    params: dict,
    session: Session,
    row: int,
    prompt: Sequence[int] | np.ndarray,
) -> Session:
    """Starts a row anew with another prompt; the other rows stay as they are.

    `session` itself must not be used again.

    Raises:
      ValueError: there is no such row, or the prompt is malformed.
    """
    if not 0 <= row < len(session.logits):
        raise ValueError(f"row: expected 0 to {len(session.logits) - 1}, got {row}")
    return put_rows(session, [row], start_session(config, params, [prompt]))


def take_rows(session: Session, rows: Sequence[int]) -> Session:
    """Returns a session of some rows; of one row several times, to continue it in several ways.

    Raises:
      ValueError: there is no such row.
    """
    chosen = _checked_places(rows, len(session.logits))
    cache = jax.tree.map(lambda x: x[:, chosen], session.cache)
    return Session(cache, session.logits[chosen])


def put_rows(session: Session, rows: Sequence[int], other: Session) -> Session:
    """Puts the rows of another session in the place of some rows; the others stay as they are.

    `session` itself must not be used again.

    Args:
      session: of several rows.
      rows: numbers of rows of `session`, one for each row of `other`.
      other: of the same model, such as a saved session, after any number of tokens.

    Raises:
      ValueError: there is no such row, or `other` has another number of rows or is of another model.
    """
    places = _checked_places(rows, len(session.logits))
    if len(set(rows)) != len(rows) or len(rows) != len(other.logits):
        raise ValueError(
            f"rows: expected {len(other.logits)} different ones, as many as other has, got {list(rows)}"
        )

    def kinds(tree):
        return jax.tree.map(lambda x: (x.shape[0], *x.shape[2:], x.dtype.name), tree)

    if kinds(session.cache) != kinds(other.cache):
        raise ValueError("other: expected a session of the same model, got a cache of other arrays")
    return _with_rows(session, places, other)


def save_session(path: str | Path, config: ModelConfig, session: Session) -> None:
    """Writes a session, as a whole or not at all."""
    content = {"config": _identity(config), "session": jax.device_get(session)._asdict()}
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(serialization.msgpack_serialize(content))


def load_session(path: str | Path, config: ModelConfig) -> Session:
    """Reads what `save_session` wrote, with a model of the same configuration.

    Raises:
      ValueError: the file is damaged, or its session is of another model.
    """
    try:
        content: Any = serialization.msgpack_restore(Path(path).read_bytes())
        there, session = content["config"], content["session"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"path: expected a session, got {path} ({error})") from error
    here = _identity(config)
    for name in here | there:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"config: expected that of the session, with {name} {there.get(name)}, "
                f"got {here.get(name)}"
            )
    return Session(**jax.tree.map(jnp.asarray, session))


def _identity(config: ModelConfig) -> dict[str, str]:
    """What a session depends on, by field."""
    free = ("param_dtype", "remat", "unroll", "loss_blocks", "implementation")
    fields = flatten_dict(dataclasses.asdict(config), sep=".")
    return {name: repr(value) for name, value in fields.items() if name not in free}


def in_pieces(length: int) -> int:
    """The length of `length` tokens after padding: of one piece, or of several of the longest."""
    if length > _LONGEST_PIECE:
        return -(-length // _LONGEST_PIECE) * _LONGEST_PIECE
    return max(_SHORTEST_PIECE, 2 ** (length - 1).bit_length())


def _read_rows(config, params, cache, rows: list[np.ndarray], length: int) -> Session:
    """Reads prompts; their padding on the left is a document of its own."""
    tokens = np.zeros((len(rows), length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        segment_ids[i, length - len(row) :] = 1
    for start in range(0, length, _LONGEST_PIECE):
        piece = slice(start, start + _LONGEST_PIECE)
        # Without documents kernels serve that know none. After padding, its document would go on.
        # Short pieces have documents with padding and without, so that one program serves both.
        ids = segment_ids[:, max(0, start - 1) : piece.stop]
        whole = length >= _LONGEST_PIECE and ids.all()
        documents = None if whole else segment_ids[:, piece]
        session = read(config, params, cache, tokens[:, piece], documents)
        cache = session.cache
    return session


@functools.partial(jax.jit, static_argnames=("config", "batch"))
def empty_cache(config: ModelConfig, batch: int) -> dict:
    """The cache of rows that have read nothing."""
    model = LanguageModel(config, decode=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((batch, 1), jnp.int32))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["cache"])


def _checked_places(rows: Sequence[int], count: int) -> Int[Array, "N"]:
    if not len(rows) or not all(0 <= row < count for row in rows):
        raise ValueError(f"rows: expected some of 0 to {count - 1}, got {list(rows)}")
    return jnp.asarray(rows)


@functools.partial(jax.jit, donate_argnames=("session",))
def _with_rows(session: Session, rows, other: Session) -> Session:
    cache = jax.tree.map(lambda x, y: x.at[:, rows].set(y), session.cache, other.cache)
    return Session(cache, session.logits.at[rows].set(other.logits))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("session",))
def _read_some(config, params, session: Session, tokens, takes_part) -> Session:
    """The session after some tokens in the rows that take part; the others stay as they are."""

    def chosen(new, old, axis):
        shape = [1] * new.ndim
        shape[axis] = len(takes_part)
        return jnp.where(takes_part.reshape(shape), new, old)

    new = read(config, params, session.cache, tokens)
    cache = jax.tree.map(lambda x, y: chosen(x, y, 1), new.cache, session.cache)
    return Session(cache, chosen(new.logits, session.logits, 0))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def read(
    config: ModelConfig,
    params: dict,
    cache: dict,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Session:
    """The session after some tokens."""
    results: Any = LanguageModel(config, decode=True).apply(
        {"params": params, "cache": cache}, tokens, segment_ids, last_only=True, mutable=["cache"]
    )
    logits, updated = results
    return Session(updated["cache"], logits[:, -1])


def checked_rows(
    prompt, vocab_size: int, name: str = "prompt", may_be_empty: bool = False
) -> list[Int[np.ndarray, "P"]]:
    """The rows of a prompt as arrays; raises a ValueError that names it if it is malformed."""
    if isinstance(prompt, list | tuple):
        rows = [np.asarray(row) for row in prompt]
        if may_be_empty:  # NumPy takes an empty list for floats.
            rows = [row.astype(np.int32) if row.shape == (0,) else row for row in rows]
        if not rows or any(row.ndim != 1 or row.size < (not may_be_empty) for row in rows):
            shapes = [row.shape for row in rows]
            raise ValueError(f"{name}: expected rows of token ids, got rows of shapes {shapes}")
        dtype = np.result_type(*rows)
    else:
        rows = np.asarray(prompt)
        if rows.ndim != 2 or rows.size == 0:
            raise ValueError(
                f"{name}: expected a non-empty array [B P], or a list of rows, "
                f"got shape {rows.shape}"
            )
        dtype = rows.dtype
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{name}: expected integers, got {dtype}")
    ids = np.concatenate(rows)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(
            f"{name}: expected ids in [0, {vocab_size}), got {ids.min()} to {ids.max()}"
        )
    return [row.astype(np.int32) for row in rows]
