import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.models import PRESETS, LanguageModel
from gdn2_jax.training import OptimizerConfig
from gdn2_jax.training.optimizer import decay_mask, make_optimizer, schedule_borders, scheduled_rate


def paper_eta(i, warmup, last, peak=4e-4):
    end = peak / 10
    if i < warmup:
        return peak * i / warmup
    if i > last:
        return end
    return end + (peak - end) * (1 + math.cos(math.pi * (i - warmup) / (last - warmup))) / 2


def learning_rate_schedule(config, microsteps, accumulation):
    borders = schedule_borders(config, microsteps)
    return lambda step: scheduled_rate(config, borders, accumulation, step)


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 190_734), (4, 47_683)])
def test_learning_rate_is_the_papers_at_the_last_microbatch_of_each_step(accumulation, steps):
    last = 190_734  # 100B tokens in microbatches of 128 x 4096, 1B of them for warm-up
    schedule = learning_rate_schedule(OptimizerConfig(), last, accumulation)
    for step in (0, 1, 475, 476, 477, 1906, 1907, 1908, 30_000, steps - 1, steps, 2 * steps):
        expected = paper_eta((step + 1) * accumulation - 1, 1907, last)
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-12)


def test_first_learning_rate_is_zero_without_accumulation_only():
    config = OptimizerConfig(warmup=0.1)
    assert learning_rate_schedule(config, 100, 1)(0) == 0
    np.testing.assert_allclose(learning_rate_schedule(config, 400, 4)(0), 4e-4 * 3 / 40, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {0: 0, 5: 0.5, 10: 1, 99: 1, 500: 1}),
        ("wsd", {5: 0.5, 10: 1, 79: 1, 80: 1, 90: 0.55, 100: 0.1, 500: 0.1}),
    ],
)
def test_other_schedules_stay_at_the_peak(schedule, rates):
    config = OptimizerConfig(learning_rate=1.0, warmup=0.1, schedule=schedule)
    for step, rate in rates.items():
        np.testing.assert_allclose(learning_rate_schedule(config, 100, 1)(step), rate, rtol=1e-6)


def test_more_steps_change_the_rate_of_the_cosine_alone():
    for schedule, same in (("cosine", False), ("constant", True), ("wsd", True)):
        config = OptimizerConfig(schedule=schedule)
        rates = [learning_rate_schedule(config, steps, 1)(500) for steps in (1000, 2000)]
        assert (rates[0] == rates[1]) == same


def test_schedule_without_warmup_starts_at_the_peak():
    assert learning_rate_schedule(OptimizerConfig(warmup=0), 100, 1)(0) == np.float32(4e-4)


@pytest.fixture(scope="module")
def params():
    model = LanguageModel(PRESETS["tiny"])
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return variables["params"]


def undecayed(params, kind):
    leaves = jax.tree_util.tree_leaves_with_path(decay_mask(params, kind))
    return {
        path[-1].key if path[-1].key != "kernel" else path[-2].key for path, on in leaves if not on
    }


def test_each_decay_mask_leaves_out_what_it_says(params):
    assert undecayed(params, "all") == set()
    assert undecayed(params, "exclude_A_log_dt_bias") == {"A_log", "dt_bias"}
    convolutions = {"q_conv1d", "k_conv1d", "v_conv1d"}
    assert undecayed(params, "matrices_only") == {
        *("A_log", "dt_bias", "bias", "scale"),
        *convolutions,
    }


def test_update_is_adamw_of_the_clipped_gradient():
    config = OptimizerConfig(clip_norm=0.5)
    optimizer = make_optimizer(config, 0.1)
    params = {"lm_head": {"kernel": jnp.array([3.0, 4.0])}}
    grads = {"lm_head": {"kernel": jnp.array([6.0, -8.0])}}
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    # The first step of Adam is the sign of the gradient: clipping only shows through epsilon.
    np.testing.assert_allclose(
        updates["lm_head"]["kernel"], [-0.1 * (1 + 0.3), -0.1 * (-1 + 0.4)], rtol=1e-5
    )
    # The second one's moments, of 0.5 g / |g| = [0.3, -0.4] and then of a small gradient.
    small = {"lm_head": {"kernel": jnp.array([0.03, 0.04])}}
    updates, _ = optimizer.update(small, state, params)
    g1, g2 = np.array([0.3, -0.4]), np.array([0.03, 0.04])
    mean = (0.09 * g1 + 0.1 * g2) / (1 - 0.9**2)
    square = (0.95 * 0.05 * g1**2 + 0.05 * g2**2) / (1 - 0.95**2)
    expected = -0.1 * (mean / (np.sqrt(square) + 1e-8) + 0.1 * np.array([3.0, 4.0]))
    np.testing.assert_allclose(updates["lm_head"]["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mean_dtype", [None, "float32", "bfloat16"])
def test_averages_have_the_dtypes_asked_for_and_follow_those_of_float32(param_dtype, mean_dtype):
    grads = {"kernel": jnp.linspace(-0.3, 0.3, 64).astype(param_dtype)}
    params = {"kernel": jnp.linspace(1, 2, 64).astype(param_dtype)}

    def moments(mean_dtype, dtype):
        optimizer = make_optimizer(OptimizerConfig(mean_dtype=mean_dtype), 0.1)
        cast = [jax.tree.map(lambda x: x.astype(dtype), tree) for tree in (grads, params)]
        state = optimizer.init(cast[1])
        for _ in range(3):
            updates, state = optimizer.update(cast[0], state, cast[1])
        return updates["kernel"], state[1][0].mu["kernel"], state[1][0].nu["kernel"]

    actual, exact = moments(mean_dtype, param_dtype), moments(None, "float32")
    assert actual[1].dtype == (mean_dtype or param_dtype)
    assert actual[2].dtype == param_dtype
    for a, b in zip(actual, exact, strict=True):
        np.testing.assert_allclose(a.astype("float32"), b, rtol=0.03, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("warmup", 1.0),
        ("decay", -0.1),
        ("schedule", "linear"),
        ("clip_norm", float("nan")),
        ("decay_mask", "none"),
        ("mean_dtype", "int8"),
    ],
)
def test_optimizer_config_names_the_field_that_is_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field}: expected .* got {value}|'{value}'"):
        OptimizerConfig(**{field: value})
