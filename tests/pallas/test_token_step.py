"""A token of a whole model by kernels, on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.models import (
    PRESETS,
    DeltaRule,
    LanguageModel,
    ModelConfig,
    Session,
    continue_session,
    start_session,
)
from gdn2_jax.models.generate import Sampling, _decode
from gdn2_jax.models.session import empty_cache
from gdn2_jax.models.token_step import kernels_serve
from gdn2_jax.pallas.mosaic import interpret_mode


def model(**fields):
    config = ModelConfig(
        vocab_size=32,
        d_model=64,
        num_layers=1,
        mlp_dim=64,
        mixer=DeltaRule(num_heads=1, head_dim=64),
        unroll=True,
        dtype="bfloat16",
    )
    config = dataclasses.replace(config, **fields)
    params = LanguageModel(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    # Scales and biases, too, are none of their own.
    return config, jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params
    )


def test_kernels_leave_the_session_that_modules_leave():
    # The prompt is padded: its windows hold inputs of another document.
    config, params = model()
    named = dataclasses.replace(config, implementation="pallas")
    sessions = []
    for chosen in (config, named):
        session = start_session(config, params, [[1, 2]])
        with interpret_mode():
            _, session = continue_session(chosen, params, session, max_new_tokens=1, temperature=0)
        sessions.append(session)
    expected, found = sessions
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = (np.asarray(u, np.float64) for u in (x, y))
        assert np.linalg.norm(x - y) <= 0.02 * np.linalg.norm(y)


def test_a_layer_lowers_to_one_kernel_that_writes_in_place():
    mixer = DeltaRule(num_heads=1, head_dim=64, state_rounding="stochastic")
    config, params = model(mixer=mixer, mlp_dim=128)
    session = Session(empty_cache(config, 1), jnp.zeros((1, 32)))
    arguments = (jnp.zeros(1, bool), Sampling.of({}), jax.random.key(0), np.int32(-1), 0, 4)
    traced = _decode.trace(config, "kernels", params, session, *arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    # The state and three windows.
    assert text.count("output_operand_alias<") == 4


@pytest.mark.parametrize(
    "name, batch, fields, serve",
    [
        ("gdn2_1.3B", 1, {}, True),
        ("gdn2_1.3B", 2, {}, False),
        ("gdn2_1.3B", 1, {"dtype": "float32"}, False),
        ("gdn2_1.3B", 1, {"implementation": "xla"}, False),
        ("gdn2_1.3B", 1, {"unroll": False}, False),
        ("gdn2_1.3B", 1, {"mixer": DeltaRule(decay_lower_bound=-5.0)}, False),
        ("gdn2_1.3B", 1, {"mixer": DeltaRule(state_rounding="nearest")}, False),
        ("swa_gdn2_1.3B", 1, {}, False),
        ("kda_1.3B", 1, {}, False),
        ("mamba2_1.3B", 1, {}, False),
        ("attention_1.3B", 1, {}, False),
    ],
)
def test_kernels_serve_the_models_that_they_compute(name, batch, fields, serve):
    assert kernels_serve(dataclasses.replace(PRESETS[name], **fields), batch) == serve
