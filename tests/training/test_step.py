import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.models import Batch, LanguageModel
from gdn2_jax.parallel import make_mesh
from gdn2_jax.training.run import check_mesh
from gdn2_jax.training.step import initial_state, jit_initial_state, jit_train_step, train_step


def random_batch(config, seed=0):
    shape = (config.accumulation, config.microbatch_size, config.data.sequence_length)
    inputs, targets = np.random.default_rng(seed).integers(0, 257, (2, *shape), np.int32)
    return Batch(inputs, targets, np.ones(shape, np.float32))


def assert_close(actual, expected, rtol):
    """Relative to each array's greatest element; A_log and dt_bias are float32 in any model."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max() or 1
        np.testing.assert_allclose(a / scale, b / scale, atol=rtol)


@pytest.fixture(scope="module")
def float64_config(config):
    with jax.enable_x64(True):
        model = dataclasses.replace(config.model, dtype="float64", param_dtype="float64")
        yield dataclasses.replace(config, model=model, steps=1000)


@pytest.fixture(scope="module")
def jitted_step(float64_config):
    return jax.jit(functools.partial(train_step, float64_config))


@pytest.fixture(scope="module")
def one_step(float64_config, jitted_step):
    """State, batch, and what a step on one device, in one microbatch, makes of them."""
    state = jax.jit(initial_state, static_argnums=0)(float64_config)
    # The first learning rate is 0: set all counts to a later step.
    state = jax.device_get(state)  # jnp would compile each small operation.
    state = jax.device_put(jax.tree.map(lambda x: x + 100 if x.dtype == np.int32 else x, state))
    batch = random_batch(float64_config)
    return state, batch, jitted_step(state, batch)


def test_loss_is_the_mean_cross_entropy_and_gradient_norm_that_of_its_gradient(
    float64_config, one_step
):
    state, batch, (_, metrics) = one_step

    def loss(params):
        logits = LanguageModel(float64_config.model).apply({"params": params}, batch.inputs[0])
        log_probabilities = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probabilities, batch.targets[0][..., None], -1)
        return -picked.mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(jax.device_get(grads))))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-6)


def test_four_microbatches_take_the_same_step_as_one_batch(float64_config, one_step):
    state, batch, (expected, metrics) = one_step
    config = dataclasses.replace(float64_config, accumulation=4)
    split = jax.tree.map(lambda x: x.reshape(4, 2, -1), batch)
    actual, split_metrics = jax.jit(functools.partial(train_step, config))(state, split)
    np.testing.assert_allclose(split_metrics.loss, metrics.loss, rtol=1e-9)
    np.testing.assert_allclose(split_metrics.grad_norm, metrics.grad_norm, rtol=1e-9)
    moments, expected_moments = actual.opt_state[1][0], expected.opt_state[1][0]
    assert_close(moments.mu, expected_moments.mu, 2e-6)
    assert_close(moments.nu, expected_moments.nu, 2e-6)


def test_eight_devices_take_the_same_step_as_one(float64_config, one_step):
    state, batch, (expected, metrics) = one_step
    mesh = make_mesh()
    assert mesh.size == 8
    state = jax.tree.map(jnp.copy, state)  # donated
    actual, actual_metrics = jit_train_step(float64_config, mesh)(state, batch)
    np.testing.assert_allclose(actual_metrics.loss, metrics.loss, rtol=1e-9)
    assert_close(actual.params, expected.params, 2e-6)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(actual.params))


def test_another_number_of_steps_compiles_nothing_anew(config):
    programs = []
    state = jax.eval_shape(functools.partial(initial_state, config))
    for steps in (8, 99):
        other = dataclasses.replace(config, steps=steps, global_batch_size=16, accumulation=2)
        lowered = jit_train_step(other, make_mesh()).lower(state, random_batch(other))
        first = jit_initial_state(other, make_mesh()).lower()
        programs.append((lowered.as_text(), first.as_text()))
    assert programs[0] == programs[1]


def test_a_step_counts_itself_and_a_seed_means_the_same_with_another_default_of_jax(
    float64_config, one_step
):
    before, _, (after, _) = one_step
    assert int(after.step) == int(before.step) + 1
    with jax.default_prng_impl("rbg"):
        other = jax.jit(initial_state, static_argnums=0)(float64_config)
    jax.tree.map(np.testing.assert_array_equal, other.params, before.params)


def test_documents_are_kept_apart_where_the_batch_says_so(float64_config, one_step):
    state, whole, (_, metrics) = one_step
    ones = np.ones(whole.inputs.shape, np.int32)
    documents = np.broadcast_to(np.repeat(np.arange(1, 5, dtype=np.int32), 8), ones.shape)
    step = jax.jit(functools.partial(train_step, float64_config))
    one_document = step(state, whole._replace(segment_ids=ones))[1]
    np.testing.assert_allclose(one_document.loss, metrics.loss, rtol=1e-9)
    assert abs(step(state, whole._replace(segment_ids=documents))[1].loss - metrics.loss) > 1e-6


def test_batch_that_the_devices_do_not_divide_is_refused(config):
    mesh = make_mesh()
    check_mesh(dataclasses.replace(config, global_batch_size=16, accumulation=2), mesh)
    uneven = dataclasses.replace(config, global_batch_size=24, accumulation=2)
    with pytest.raises(ValueError, match="global_batch_size: expected a multiple of 16 .* got 24"):
        check_mesh(uneven, mesh)


@pytest.mark.parametrize(
    ("param_dtype", "mean_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_a_step_keeps_every_dtype_and_its_state_in_place(config, param_dtype, mean_dtype):
    narrow = dataclasses.replace(
        config,
        accumulation=2,
        global_batch_size=16,
        model=dataclasses.replace(config.model, dtype="bfloat16", param_dtype=param_dtype),
        optimizer=dataclasses.replace(config.optimizer, mean_dtype=mean_dtype),
    )
    state = jax.eval_shape(functools.partial(initial_state, narrow))
    step = jit_train_step(narrow, make_mesh()).lower(state, random_batch(narrow))
    after, metrics = step.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics.loss.dtype == jnp.float32
    moments = state.opt_state[1][0]
    kernel = state.params["lm_head"]["kernel"], moments.mu["lm_head"]["kernel"]
    assert [x.dtype for x in kernel] == [param_dtype, mean_dtype]

    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, moments)))
    assert step.compile().memory_analysis().alias_size_in_bytes >= size
