"""Losses and continuations of many token sequences, in few compiled shapes, on all local devices."""

import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from gdn2_jax.data import Tokenizer
from gdn2_jax.evaluation.readouts import token_results
from gdn2_jax.evaluation.sample import continue_rows
from gdn2_jax.fields import require
from gdn2_jax.models import ModelConfig

# Sequences are padded to a power of two tokens, at least to this one.
_SHORTEST = 64


class LocalModel(NamedTuple):
    """A language model and copies of its parameters on several devices, each for other batches."""

    config: ModelConfig
    copies: tuple[Any, ...]


def on_local_devices(
    config: ModelConfig, params: Any, devices: Sequence[jax.Device] | None = None
) -> LocalModel:
    """Copies parameters to devices, to all local ones by default."""
    devices = jax.local_devices() if devices is None else devices
    return LocalModel(config, tuple(jax.device_put(params, device) for device in devices))


class TokenLosses(NamedTuple):
    """What a model makes of the scored tokens of a sequence.

    Attributes:
      losses: negative log-likelihood of each, in nats.
      hits: whether the model's first guess is right.
    """

    losses: Float[np.ndarray, " N"]
    hits: Bool[np.ndarray, " N"]


def score_tokens(
    model: LocalModel,
    sequences: Sequence[Sequence[int]],
    counts: Sequence[int],
    *,
    batch_size: int,
    progress: str | None = None,
) -> list[TokenLosses]:
    """Scores the last tokens of each sequence, given those before.

    Sequences are padded on their right, which no causal model sees, to the next power of two tokens,
    so that one program serves each such length. They do not see each other: a result depends on
    the batch by rounding only.

    Args:
      model: from `on_local_devices`.
      sequences: token ids.
      counts: how many tokens at the end of each are scored; fewer than it has.
      batch_size: sequences at once on a device.
      progress: name of a progress bar; None shows none.

    Returns:
      The losses of each sequence, in their order.

    Raises:
      ValueError: there is a sequence in which no token stands before those to be scored.
    """
    for sequence, count in zip(sequences, counts, strict=True):
        fewer = f"fewer than the {len(sequence)} tokens of the sequence"
        require("counts", 0 <= count < len(sequence), fewer, count)
    results: list[Any] = [None] * len(sequences)

    def length(i: int) -> int:
        return max(_SHORTEST, 2 ** (len(sequences[i]) - 2).bit_length())

    def score(params, batch):
        # One shape for all batches of a length; what fills the last one is thrown away.
        tokens = np.zeros((min(batch_size, len(sequences)), length(batch[0]) + 1), np.int32)
        for row, i in zip(tokens, batch):
            row[: len(sequences[i])] = sequences[i]
        return jax.device_get(token_results(model.config, params, tokens[:, :-1], tokens[:, 1:]))

    for batch, (losses, hits) in _on_devices(
        model, score, _batches(len(sequences), length, batch_size), progress
    ):
        for row, i in enumerate(batch):
            end = len(sequences[i]) - 1
            scored = slice(end - counts[i], end)
            results[i] = TokenLosses(losses[row, scored], hits[row, scored])
    return results


def continue_prompts(
    model: LocalModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    progress: str | None = None,
    **sampling: Any,
) -> list[str]:
    """Returns how a model continues prompts, up to the end of the document or a stop string.

    Args:
      model: from `on_local_devices`.
      tokenizer: of the model.
      prompts: token ids.
      max_new_tokens: as in `gdn2_jax.models.generate`.
      batch_size: prompts at once on a device.
      stop: strings before which a text ends.
      progress: name of a progress bar; None shows none.
      **sampling: for `gdn2_jax.models.generate`, such as temperature; the likeliest tokens by default.
    """
    results: list[Any] = [None] * len(prompts)
    size = min(batch_size, len(prompts))

    def generate(params, batch):
        rows = [prompts[i] for i in batch]
        rows += rows[:1] * (size - len(rows))
        options = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "stop": stop} | sampling
        return continue_rows(model.config, params, tokenizer, rows, **options)

    def length(i: int) -> int:
        return 2 ** (len(prompts[i]) - 1).bit_length()

    for batch, texts in _on_devices(
        model, generate, _batches(len(prompts), length, batch_size), progress
    ):
        for i, text in zip(batch, texts):
            results[i] = text
    return results


def _batches(count: int, length: Callable[[int], int], batch_size: int) -> list[list[int]]:
    """Numbers of sequences of one length each, the longest first: they need the most memory."""
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(length(i), []).append(i)
    return [
        groups[size][start : start + batch_size]
        for size in sorted(groups, reverse=True)
        for start in range(0, len(groups[size]), batch_size)
    ]


def _on_devices(
    model: LocalModel,
    work: Callable[[Any, list[int]], Any],
    batches: list[list[int]],
    progress: str | None,
) -> Iterator[tuple[list[int], Any]]:
    """Runs `work` on each batch, on the first free device; yields the batch and the result."""
    free: queue.SimpleQueue = queue.SimpleQueue()
    for copy in model.copies:
        free.put(copy)

    def run(batch):
        params = free.get()
        try:
            (device,) = jax.tree.leaves(params)[0].devices()
            with jax.default_device(device):
                return work(params, batch)
        finally:
            free.put(params)

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=sum(map(len, batches)), desc=progress, disable=progress is None)
        )
        pool = stack.enter_context(ThreadPoolExecutor(len(model.copies)))
        for batch, result in zip(batches, pool.map(run, batches), strict=True):
            bar.update(len(batch))
            yield batch, result
