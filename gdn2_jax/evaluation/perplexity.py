"""How well a model predicts held-out text."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gdn2_jax.data import Excerpt, PackedSequences, validation_batches
from gdn2_jax.models import Batch, ModelConfig, next_token_loss
from gdn2_jax.parallel import batch_reader, on_mesh, put_batch


class Perplexity(NamedTuple):
    """The result of an evaluation.

    Attributes:
      loss: mean cross-entropy of a token, in nats.
      perplexity: its exponential.
      bits_per_byte: the same loss per byte of the text evaluated, which compares across tokenizers.
      tokens: evaluated.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    @classmethod
    def of(cls, total: float, tokens: int, num_bytes: float) -> "Perplexity":
        """Takes the sum of the tokens' losses, their number, and the bytes they stand for."""
        loss = total / tokens
        return cls(loss, exponential(loss), total / math.log(2) / num_bytes, tokens)


def evaluate_perplexity(
    config: ModelConfig,
    params: Any,
    sequences: PackedSequences,
    *,
    mesh: Mesh,
    batch_size: int,
    max_batches: int | None = None,
    summed_losses: Callable | None = None,
) -> Perplexity:
    """Evaluates a model on packed sequences, each from an empty state.

    Args:
      config: the model's configuration.
      params: its parameters.
      sequences: such as `gdn2_jax.data.prepare(config).validation`; documents are kept apart if
        they are so there.
      mesh: from `gdn2_jax.parallel.make_mesh`, where the parameters lie.
      batch_size: sequences of a batch, over all processes; the mesh divides it.
      max_batches: evaluate so many batches, evenly spaced over the sequences; all if None.
      summed_losses: from `lower_evaluation`, compiled, to be spared the wait.

    Returns:
      Loss, perplexity and bits per byte.
    """
    reader = batch_reader(mesh)
    count = len(sequences) if max_batches is None else max_batches * batch_size
    excerpt = Excerpt(sequences, count)
    batches = validation_batches(
        excerpt,
        global_batch_size=batch_size,
        process_index=reader.index,
        process_count=reader.count,
    )
    if summed_losses is None:
        summed_losses = functools.partial(_summed_losses, config, mesh)
    sums = []
    for batch in batches:
        sums.append(summed_losses(params, put_batch(mesh, batch)))
    total, tokens = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
    return Perplexity.of(float(total), int(tokens), float(excerpt.target_bytes()))


def exponential(loss: float) -> float:
    """The perplexity of a loss; infinity where it is too large for a number."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def lower_evaluation(
    config: ModelConfig,
    mesh: Mesh,
    params: Any,
    batch: Batch,
) -> jax.stages.Lowered:
    """Traces the program of `evaluate_perplexity`, which takes it compiled.

    `params` and `batch` are shapes, dtypes and shardings.
    """
    return _summed_losses.lower(config, mesh, params, batch)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _summed_losses(config, mesh, params, batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the tokens' losses and their number."""
    with on_mesh(mesh):
        return next_token_loss(config, params, batch), jnp.sum(batch.weights)
