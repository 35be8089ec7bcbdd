"""The language-model loss without the logits of all tokens at once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.language_model import LanguageModel
from gdn2_jax.ops.isolation import not_finite, replace
from gdn2_jax.parallel import constrain


class Batch(NamedTuple):
    """Sequences to train on or to evaluate: arrays, or their shapes.

    Attributes:
      inputs: token ids.
      targets: the token after each.
      weights: of the targets in the loss; 0 for padding.
      segment_ids: document of each token, non-decreasing along T; None where documents are not kept
        apart.
    """

    inputs: Int[Array, "*G B T"]
    targets: Int[Array, "*G B T"]
    weights: Float[Array, "*G B T"]
    segment_ids: Int[Array, "*G B T"] | None = None


def next_token_loss(config: ModelConfig, params: Any, batch: Batch) -> Float[Array, ""]:
    """Weighted sum of the cross-entropies of a batch's tokens [B, T], in nats.

    `config.loss_blocks` bounds the memory of the logits.

    Returns:
      sum_i weight_i (logsumexp(logits_i) - logits_i[target_i]), float32 (float64 in such models).
    """
    hidden: Any = LanguageModel(config).apply(
        {"params": params}, batch.inputs, batch.segment_ids, head=False
    )
    hidden = constrain(hidden, "batch", "sequence", None)
    with jax.named_scope("loss"):
        # Gathered over "fsdp" once, not for every block.
        kernel = constrain(params["lm_head"]["kernel"], None, "vocab")
        return cross_entropy(config.loss_blocks, hidden, kernel, batch.targets, batch.weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
    blocks: int,
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D vocab"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Weighted sum of the tokens' cross-entropies, in nats, from the inputs of the output layer.

    Tokens of weight 0 may be NaN or infinite, and the vocabulary may be split over devices: tokamax's
    `linear_softmax_cross_entropy_loss` has no weights and cuts the vocabulary into blocks.

    The tokens go through the output layer in blocks, each of every `blocks`-th token of all
    sequences: batches and sequences that are split over devices stay split. Matrix products take
    `hidden`'s dtype and add up in float32 (float64 for float64 inputs), as everything after them.
    Gradients are computed with the loss, while the logits are at hand: the backward only scales.

    Args:
      blocks: number of blocks; the logits of T / blocks tokens of each sequence exist at once.
      hidden: inputs of the output layer.
      kernel: of the output layer.
      targets: ids in [0, vocab).
      weights: of the tokens.

    Returns:
      sum_i weight_i (logsumexp(logits_i) - logits_i[target_i]), float32 or wider.
    """
    narrow = kernel.astype(hidden.dtype)

    def add(total, block):
        hidden, targets, weights = _without_masked_nan(block)
        losses, *_ = _losses(hidden, narrow, targets)
        return total + jnp.sum(losses * weights), None

    zero = jnp.zeros((), _wide(hidden))
    return jax.lax.scan(add, zero, _split(blocks, hidden, targets, weights))[0]


def _forward(blocks, hidden, kernel, targets, weights):
    """The loss, and its gradients for a cotangent of 1."""
    narrow, wide = kernel.astype(hidden.dtype), _wide(hidden)

    def add(carry, block):
        total, d_kernel = carry
        hidden, targets, weights = _without_masked_nan(block)
        losses, logits, log_normalizer, is_target = _losses(hidden, narrow, targets)
        d_logits = (jnp.exp(logits - log_normalizer) - is_target) * weights[..., None]
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,dv->btd", d_logits, narrow)
        d_kernel += jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=wide)
        return (total + jnp.sum(losses * weights), d_kernel), (d_hidden, losses)

    zeros = jnp.zeros((), wide), jnp.zeros(kernel.shape, wide)
    split = _split(blocks, hidden, targets, weights)
    (total, d_kernel), parts = jax.lax.scan(add, zeros, split)
    d_hidden, d_weights = (_join(part, hidden.shape[1]) for part in parts)
    return total, (d_hidden, d_kernel.astype(kernel.dtype), d_weights.astype(weights.dtype))


def _backward(blocks, gradients, cotangent):
    d_hidden, d_kernel, d_weights = ((x * cotangent).astype(x.dtype) for x in gradients)
    return d_hidden, d_kernel, None, d_weights


cross_entropy.defvjp(_forward, _backward)


def _without_masked_nan(block: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """The block with zeros for tokens of weight 0 that are not finite: 0 * NaN is NaN."""
    hidden, targets, weights = block
    return replace((weights == 0) & not_finite(hidden, 2), 0, hidden), targets, weights


def _losses(hidden, kernel, targets) -> tuple[Array, Array, Array, Array]:
    """Losses [B, T]; logits, their log-normalizer [B, T, 1] and where the target is [B, T, vocab]."""
    logits = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=_wide(hidden))
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A comparison, where indexing would gather a vocabulary that is split over devices.
    is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    losses = log_normalizer[..., 0] - jnp.sum(logits, axis=-1, where=is_target)
    return losses, logits, log_normalizer, is_target


def _wide(hidden) -> jnp.dtype:
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _split(blocks: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [blocks, B, ceil(T / blocks), ...]; padded with zeros, so with weights of 0."""

    def split(x):
        padding = -x.shape[1] % blocks
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, blocks, *x.shape[2:]), 2, 0)

    return tuple(map(split, arrays))


def _join(blocks: Array, length: int) -> Array:
    """[blocks, B, ceil(T / blocks), ...] -> [B, T, ...]."""
    x = jnp.moveaxis(blocks, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
