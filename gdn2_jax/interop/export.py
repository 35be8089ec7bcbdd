"""Compiled-ahead programs of a language model, for servers that have JAX but not this package.

Save `exported.serialize()`; in another process `jax.export.deserialize(data).call(...)` runs it. The
parameters are an argument. The batch size is free unless given.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import Exported

from gdn2_jax.models import LanguageModel, ModelConfig

_PLATFORMS = ("cpu", "cuda")


def export_forward(
    config: ModelConfig,
    params: Any,
    *,
    length: int,
    batch_size: int | None = None,
    platforms: Sequence[str] = _PLATFORMS,
) -> Exported:
    """Exports (params, tokens [B, T]) -> logits [B, T, vocab].

    A program for several platforms, or for any batch size, holds no kernel of one: so
    `config.implementation` None means "xla" here, on every machine. The Hopper kernels are exported
    with "pallas", a batch size and platforms ("cuda",), on any machine.

    Args:
      config: of the model.
      params: of the model; only shapes and dtypes are read.
      length: number of tokens T.
      batch_size: number of rows B; any if None.
      platforms: where the program shall run: some of "cpu", "cuda" and "tpu".

    Returns:
      The program.
    """
    model = LanguageModel(_portable(config))

    def forward(params, tokens):
        return model.apply({"params": params}, tokens)

    return _export(forward, platforms, params, _tokens(batch_size, length))


def export_prefill(
    config: ModelConfig,
    params: Any,
    *,
    length: int,
    batch_size: int | None = None,
    platforms: Sequence[str] = _PLATFORMS,
) -> Exported:
    """Exports (params, tokens [B, T]) -> (logits of the next token [B, vocab], cache).

    Arguments and result are those of `export_forward`. `length` is the number of tokens T of the
    prompt, or of its beginning; full attention's cache holds `config.context_length` tokens.
    """
    model = LanguageModel(_portable(config), decode=True)

    def prefill(params, tokens):
        logits, updated = model.apply({"params": params}, tokens, last_only=True, mutable=["cache"])
        return logits[:, -1], updated["cache"]

    return _export(prefill, platforms, params, _tokens(batch_size, length))


def export_decode(
    config: ModelConfig,
    params: Any,
    *,
    length: int = 1,
    batch_size: int | None = None,
    platforms: Sequence[str] = _PLATFORMS,
) -> Exported:
    """Exports (params, cache, tokens [B, T]) -> (logits of the next token [B, vocab], cache).

    Arguments and result are those of `export_prefill`. Each call adds `length` tokens: one, or more
    of a long prompt. Called inside a `jax.jit` that donates the cache, the program updates it in place.
    """
    model = LanguageModel(_portable(config), decode=True)
    tokens = _tokens(batch_size, length)
    cache = jax.eval_shape(model.init, jax.random.key(0), tokens)["cache"]

    def decode(params, cache, tokens):
        variables = {"params": params, "cache": cache}
        logits, updated = model.apply(variables, tokens, last_only=True, mutable=["cache"])
        return logits[:, -1], updated["cache"]

    return _export(decode, platforms, params, cache, tokens)


def _portable(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, implementation=config.implementation or "xla")


def _tokens(batch_size: int | None, length: int) -> jax.ShapeDtypeStruct:
    if batch_size is None:
        return jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), length), jnp.int32)
    return jax.ShapeDtypeStruct((batch_size, length), jnp.int32)


def _export(function, platforms: Sequence[str], *arguments: Any) -> Exported:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return jax.export.export(jax.jit(function), platforms=platforms)(*abstract)
