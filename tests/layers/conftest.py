import functools

import jax
import jax.numpy as jnp
import pytest


@functools.partial(jax.jit, static_argnums=0)
def _apply(layer, params, x, segment_ids=None):
    return layer.apply({"params": params}, x, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _advance(decoder, variables, x, segment_ids=None):
    return decoder.apply(variables, x, segment_ids, mutable=["cache"])


@pytest.fixture(scope="session")
def apply():
    """A function of layer, params, x and segment ids: outputs. Layers that are equal share programs."""
    return _apply


@pytest.fixture(scope="session")
def advance():
    """A function of a decoding layer, variables, x and segment ids: outputs and variables."""
    return _advance


@pytest.fixture(scope="session")
def decode():
    """A function: outputs of calls on consecutive spans of `x`, joined, and the last cache."""

    def run(layer, params, x, spans, segment_ids=None):
        decoder = layer.clone(decode=True)
        variables, outputs = {"params": params}, []
        for start, stop in spans:
            ids = None if segment_ids is None else segment_ids[:, start:stop]
            y, cache = _advance(decoder, variables, x[:, start:stop], ids)
            outputs.append(y)
            variables = {"params": params, **cache}
        return jnp.concatenate(outputs, 1), variables["cache"]

    return run
