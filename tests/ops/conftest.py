import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.ops import (
    Mamba3Inputs,
    Mamba3State,
    Mamba3Weights,
    mamba2,
    mamba2_step,
    mamba3,
    mamba3_step,
)


def draw_log_decay(rng, shape, regime):
    """Log-decays as in training, or from 0 to -1000 mixed, or all strong."""
    if regime == "gentle":
        return -np.exp(rng.uniform(-6, 0, shape))
    if regime == "mixture":
        return rng.choice([0.0, -1e-4, -0.05, -5.0, -50.0, -1000.0], shape)
    return np.full(shape, float(regime))


@pytest.fixture
def log_decay():
    return draw_log_decay


class Operator(NamedTuple):
    """An operator with arguments for it.

    Attributes:
      run: function of tokens, state, segment_ids and implementation; returns outputs and state.
      step: function of a state and a token; returns the state and the output.
      tokens: arrays [B, T, ...] by name; "g" is the log-decay.
      state: before the first token.
    """

    run: Callable[..., tuple]
    step: Callable[..., tuple]
    tokens: dict[str, jax.Array]
    state: Any


def _gated_delta_rule_2(arrays, lead):
    key_side, value_side = (*lead, 1, 4), (*lead, 2, 3)
    q, k, b, g = arrays(*[key_side] * 4)
    v, w, state = arrays(value_side, value_side, (lead[0], 2, 4, 3))
    tokens = {"q": q, "k": k / 2, "v": v, "g": -jnp.abs(g), "b": jax.nn.sigmoid(b), "w": w}

    def run(tokens, state, segment_ids, implementation):
        return gated_delta_rule_2(
            **tokens, initial_state=state, segment_ids=segment_ids, implementation=implementation
        )

    return Operator(
        run, lambda state, token: gated_delta_rule_2_step(state, **token), tokens, state
    )


def _mamba2(arrays, lead):
    q, k, v, g, dt = arrays((*lead, 1, 4), (*lead, 1, 4), (*lead, 2, 3), (*lead, 2), (*lead, 2))
    (state,) = arrays((lead[0], 2, 4, 3))
    tokens = {"q": q, "k": k, "v": v, "g": -jnp.abs(g), "dt": jnp.abs(dt)}

    def run(tokens, state, segment_ids, implementation):
        return mamba2(
            **tokens, initial_state=state, segment_ids=segment_ids, implementation=implementation
        )

    return Operator(run, lambda state, token: mamba2_step(state, **token), tokens, state)


def _mamba3(arrays, lead):
    shared, values, heads = (*lead, 1, 1, 4), (*lead, 2, 3), (*lead, 2)
    shapes = (shared, shared, values, values, heads, heads, heads, (*lead, 1))
    inputs = Mamba3Inputs(*arrays(*shapes))
    weights = Mamba3Weights(*arrays((2, 1, 4), (2, 1, 4), (2,)))
    state = Mamba3State(*arrays(*((lead[0], 2, *end) for end in ((1,), (4, 3), (1, 4), (3,)))))
    tokens = inputs._asdict() | {"g": -jnp.abs(inputs.g), "dt": jnp.abs(inputs.dt)}

    def run(tokens, state, segment_ids, implementation):
        return mamba3(
            Mamba3Inputs(**tokens),
            weights,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=implementation,
        )

    def step(state, token):
        return mamba3_step(state, Mamba3Inputs(**token), weights)

    return Operator(run, step, tokens, state)


@pytest.fixture(params=[_gated_delta_rule_2, _mamba2, _mamba3], ids=["gdn2", "mamba2", "mamba3"])
def operator(request):
    """A function of (B, T) and a dtype that draws arguments of each operator in turn.

    It returns the same functions for the same arguments, so that they are compiled once.
    """
    return functools.partial(_operator, request.param)


@functools.cache
def _operator(draw, batch, length, dtype="float32"):
    rng = np.random.default_rng(0)

    def arrays(*shapes):
        return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

    return draw(arrays, (batch, length))


def _run_both_ways(fn, arguments):
    outputs, pullback = jax.vjp(fn, *arguments)
    rng = np.random.default_rng(7)
    cotangents = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), outputs)
    return {"outputs": outputs, "gradients": pullback(cotangents)}


_outputs_and_gradients = jax.jit(_run_both_ways, static_argnames="fn")
# Without optimisation (tests/conftest.py) each step of a scan copies all that the scan stacks.
_reference = jax.jit(
    _run_both_ways, static_argnames="fn", compiler_options={"xla_backend_optimization_level": 1}
)


@pytest.fixture
def assert_same():
    """A function that compares two functions' outputs and all gradients, tensor by tensor.

    `reference` runs in float64 on the values of `arguments`; errors are relative (Frobenius norm),
    absolute where the reference is zero. Each function object is compiled once for each shape.
    """

    def compare(fn, reference, arguments, bound):
        double = all(x.dtype == jnp.float64 for x in jax.tree.leaves(arguments))
        with jax.enable_x64(double):
            results = _outputs_and_gradients(fn, arguments)
        for result, x in zip(jax.tree.leaves(results["gradients"]), jax.tree.leaves(arguments)):
            assert result.dtype == x.dtype
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(np.float64)), arguments)
            expected = _reference(reference, wide)
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(results), jax.tree.leaves(expected), strict=True
        )
        for (path, value), target in pairs:
            target = np.asarray(target)
            norm = np.linalg.norm(target) or 1.0
            error = np.linalg.norm(np.asarray(value).astype(np.float64) - target) / norm
            assert error <= bound, (jax.tree_util.keystr(path), error)

    return compare
