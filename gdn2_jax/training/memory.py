"""Memory of a training step on each device, predicted without compiling it."""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gdn2_jax.models import ModelConfig, next_token_loss
from gdn2_jax.parallel import batch_shards
from gdn2_jax.training.config import TrainingConfig
from gdn2_jax.training.step import abstract_batch, abstract_state


class Memory(NamedTuple):
    """Bytes on the device that holds most.

    Attributes:
      parameters: in their own dtype.
      optimizer: moments and counters.
      gathered: parameters gathered over "fsdp": those of one iteration of the loop over layers, and
        the largest parameter outside the loop.
      gradients: of all parameters, twice when they are accumulated.
      activations: what the forward keeps for the backward.
      states: the recurrent states among them.
      working: what the backward of a block computes, and the logits of a block of tokens if those
        are more.
    """

    parameters: int
    optimizer: int
    gathered: int
    gradients: int
    activations: int
    states: int
    working: int


def predict_memory(config: TrainingConfig, mesh: Mesh) -> Memory:
    """Predicts the memory of `jit_train_step(config, mesh)` on each device.

    Parameters, optimizer and gradients follow from the shardings, kept activations from a trace of
    forward and backward. The working set is an estimate. `all` is what the forward would keep if
    nothing were recomputed, `kept` is what it keeps:

        loop over layers:          (all - 0.35 kept) / blocks
        layers one after another:  0.9 (all - kept) * 2 / layers

    The constants are fitted to the compiler's own count on CPUs; the sum is within 15 % of it
    (tests/training/test_memory.py). On GPUs products may take more room. What devices of
    "sequence" exchange is left out: a matrix for each span and head, and halos, which count in
    small models.
    """
    state = abstract_state(config, mesh)
    parameters, optimizer = (_shard_bytes(tree) for tree in (state.params, state.opt_state))
    blocks = config.model.num_layers // len(config.model.mixers)
    everything = _kept(config, mesh, dataclasses.replace(config.model, remat="none"))
    kept = everything if config.model.remat == "none" else _kept(config, mesh, config.model)
    if config.model.unroll:
        working = 0.9 * (sum(everything) - sum(kept)) * 2 / config.model.num_layers
    else:
        working = (sum(everything) - 0.35 * sum(kept)) / blocks
    tokens = config.microbatch_size * config.data.sequence_length
    split = batch_shards(mesh) * mesh.shape["sequence"] * mesh.shape["tensor"]
    logits = 3 * 4 * tokens * config.model.vocab_size / config.model.loss_blocks / split
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        gathered=_gathered_bytes(state.params, mesh, blocks),
        gradients=parameters * (1 if config.accumulation == 1 else 2),
        activations=kept.activations,
        states=kept.states,
        working=round(max(working, logits)),
    )


class _Kept(NamedTuple):
    activations: int
    states: int


def _kept(config: TrainingConfig, mesh: Mesh, model: ModelConfig) -> _Kept:
    """What the backward of a microbatch reads, but for parameters, on each device."""
    batch = abstract_batch(config, mesh)
    shape = batch.inputs.shape

    def transposed(params, batch):
        return jax.vjp(functools.partial(next_token_loss, model, batch=batch), params)[1]

    params = abstract_state(config, mesh).params
    rows = batch_shards(mesh) * mesh.shape["sequence"]
    activations = states = 0
    for x in jax.tree.leaves(jax.eval_shape(transposed, params, batch)):
        size = x.size * x.dtype.itemsize
        if _has_tokens(x.shape, shape):
            # The stream and its norms are whole on every device of "tensor".
            by_heads = x.ndim == 5 or x.shape[-1] not in (model.d_model, 1)
            activations += size // (rows * (mesh.shape["tensor"] if by_heads else 1))
        elif x.ndim > 5:
            states += size // (rows * mesh.shape["tensor"])
    return _Kept(activations, states)


def _has_tokens(shape: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    """Whether [B, T] is in it; convolutions keep a few tokens more."""
    return any(
        batch == tokens[0] and 0 <= length - tokens[1] < 8
        for batch, length in itertools.pairwise(shape)
    )


def _gathered_bytes(params: Any, mesh: Mesh, blocks: int) -> int:
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1:
        return 0
    outside = [
        x for name, part in params.items() if name != "layers" for x in jax.tree.leaves(part)
    ]
    largest = max(_shard_bytes(x) for x in outside)
    return fsdp * (largest + _shard_bytes(params["layers"]) // blocks)


def _shard_bytes(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
