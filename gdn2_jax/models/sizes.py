"""How large a model is, without making one."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.language_model import LanguageModel


class Sizes(NamedTuple):
    """Numbers of floats.

    Attributes:
      parameters: of the whole model.
      block_parameters: without embedding, head and final norm, as the paper counts.
      state: recurrent state of a layer of the configuration's mixer, for one sequence; 0 if it has
        none.
      cache: everything that such a layer keeps in decoding: state, last inputs, keys and values.
    """

    parameters: int
    block_parameters: int
    state: int
    cache: int


@functools.cache
def abstract_variables(config: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """Shapes of the parameters and the cache of a model that decodes `sequence_length` tokens."""
    # Neither depends on the implementation nor on how it is compiled; this is traced the fastest.
    config = dataclasses.replace(
        config,
        context_length=sequence_length,
        implementation="recurrent",
        remat="none",
        unroll=False,
    )
    model = LanguageModel(config, decode=True)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))


def model_sizes(config: ModelConfig, sequence_length: int) -> Sizes:
    """Returns the sizes of a model that decodes `sequence_length` tokens."""
    variables = abstract_variables(config, sequence_length)
    cache = variables["cache"]["layers"]["block"]["mixer"]
    layers = config.num_layers // len(config.mixers)
    return Sizes(
        _count(variables["params"]),
        _count(variables["params"]["layers"]),
        _count(cache.get("state", ())) // layers,
        _count(cache) // layers,
    )


def with_parameters_of(
    config: ModelConfig, reference: ModelConfig, sequence_length: int, multiple: int
) -> ModelConfig:
    """Returns `config` with the MLP that brings its block parameters nearest those of `reference`.

    Args:
      config: of a model with MLPs.
      reference: of a model.
      sequence_length: for `model_sizes`.
      multiple: of channels, by which the MLP is widened or narrowed. So many are left at least.

    Raises:
      ValueError: `config` has no MLP.
    """
    if config.mlp_dim is None:
        raise ValueError("config: expected one with an MLP, got mlp_dim None")
    ours, wanted = (model_sizes(x, sequence_length).block_parameters for x in (config, reference))
    # A channel of the MLP has three parameters for each channel of the model, in each layer.
    step = 3 * config.d_model * config.num_layers * multiple
    channels = config.mlp_dim + multiple * round((wanted - ours) / step)
    return dataclasses.replace(config, mlp_dim=max(multiple, channels))


def _count(tree) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(math.prod(leaf.shape) for leaf in leaves)
