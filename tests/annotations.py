"""What signatures promise of shapes and dtypes holds, for what is called here.

`make types` checks the annotations of every function that these tests call. `make test` leaves the
file out: without the check they claim little. Most functions are traced only, which compiles nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import gdn2_jax
from gdn2_jax import training
from gdn2_jax.models import (
    MIXERS,
    PRESETS,
    Batch,
    DeltaRule,
    LanguageModel,
    ModelConfig,
    generate,
    matched_preset,
    next_token_loss,
)
from gdn2_jax.ops import gated_delta_rule_2_on_mesh
from gdn2_jax.ops.mamba.rotation import rotate
from gdn2_jax.pallas.mosaic import indices
from gdn2_jax.parallel import MeshConfig, make_mesh
from gdn2_jax.testing import operator_inputs
from gdn2_jax.training.step import abstract_batch, abstract_state, jit_train_step


def traced(function, *arguments):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), jax.eval_shape(function, *arguments))


def test_annotations_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'x'"):
        rotate(jnp.arange(4), jnp.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'shape'"):
        indices((8, 8, 8), 0)


@pytest.mark.parametrize("segments", [None, 2])
@pytest.mark.parametrize("implementation", ["pallas", "xla", "recurrent"])
def test_the_operator_and_its_gradients(implementation, segments):
    inputs = operator_inputs(2, 70, 2, 64, value_heads=4, dtype="bfloat16", segments=segments)
    *arrays, state, ids = inputs

    def run(arrays, state):
        fn = gdn2_jax.gated_delta_rule_2
        return fn(*arrays, initial_state=state, segment_ids=ids, implementation=implementation)

    def both(arrays, state):
        results, pullback = jax.vjp(run, arrays, state)
        return results, pullback(results)

    results, gradients = traced(both, arrays, state)
    assert results == traced(lambda v, state: (v, state), inputs.v, state)
    assert gradients == traced(lambda *x: x, arrays, state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_the_step_and_its_gradients(implementation, dtype):
    inputs = operator_inputs(2, 1, 2, 64, value_heads=4, dtype="bfloat16")
    arrays = (inputs.initial_state.astype(dtype), *(x[:, 0] for x in inputs[:6]))
    options = {"implementation": implementation}
    if dtype == "bfloat16":
        options["rounding_seeds"] = jnp.ones((2, 4), int)

    def both(*arrays):
        fn = functools.partial(gdn2_jax.gated_delta_rule_2_step, **options)
        results, pullback = jax.vjp(fn, *arrays)
        return pullback(results)

    assert traced(both, *arrays) == traced(lambda *x: x, *arrays)


def test_states_of_documents():
    inputs = operator_inputs(2, 70, 2, 8, segments=2)
    run = functools.partial(gdn2_jax.gated_delta_rule_2, num_documents=3)
    states = jax.eval_shape(lambda: run(*inputs[:6], segment_ids=inputs.segment_ids))[1]
    assert states.shape == (2, 3, 2, 8, 8)


@pytest.mark.parametrize("mixer", [x for x in MIXERS if x != "sliding_window_attention"])
def test_a_model_its_gradient_and_a_decoding_step(mixer):
    preset = PRESETS[matched_preset("swa_gdn2_tiny", mixer)]
    config = dataclasses.replace(preset, num_layers=2)
    ids = jax.ShapeDtypeStruct((2, 20), "int32")
    params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), ids)["params"]

    batch = Batch(ids, ids, jax.ShapeDtypeStruct((2, 20), "float32"), segment_ids=ids)
    gradient = traced(jax.grad(functools.partial(next_token_loss, config)), params, batch)
    assert gradient == traced(lambda x: x, params)

    def step(params, ids):
        model = LanguageModel(config, decode=True)
        _, cache = model.apply({"params": params}, ids, mutable=["cache"])
        return model.apply({"params": params, **cache}, ids[:, :1], mutable=["cache"])

    assert traced(step, params, ids)[0] == ((2, 1, config.vocab_size), "float32")


def test_a_training_step():
    tiny = training.PRESETS["gdn2_tiny"]
    config = dataclasses.replace(tiny, steps=4, global_batch_size=16, accumulation=2)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh, 2)
    results = jit_train_step(config, mesh).trace(state, batch).out_info
    assert traced(lambda: results)[0] == traced(lambda: state)


def test_generation():
    mixer = DeltaRule(num_heads=1, head_dim=8, state_rounding="stochastic")
    config = ModelConfig(
        vocab_size=9, d_model=8, num_layers=1, mixer=mixer, mlp_dim=8, implementation="recurrent"
    )
    params = LanguageModel(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert generate(config, params, jnp.ones((2, 3), jnp.int32), max_new_tokens=2).shape == (2, 5)


def test_the_operator_on_a_mesh():
    inputs = operator_inputs(4, 32, 2, 8, segments=2, initial_state=False)
    run = functools.partial(gated_delta_rule_2_on_mesh, segment_ids=inputs.segment_ids)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, sequence=2))):
        outputs, _ = traced(run, *inputs[:6])
    assert outputs == ((4, 32, 2, 8), "float32")
