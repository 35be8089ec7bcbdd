import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.models import LanguageModel, generate
from gdn2_jax.models.generate import Sampling, _draw


def prompt(*shape):
    return np.asarray(jax.random.randint(jax.random.key(3), shape, 0, 31))


def test_greedy_tokens_are_the_most_likely_ones_of_the_full_forward(small_model):
    config, params = small_model
    start = prompt(3, 5)
    # Beyond the attention window of 4.
    tokens = generate(config, params, start, max_new_tokens=9, temperature=0)
    assert tokens.shape == (3, 14) and tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens[:, :5], start)
    logits = jax.jit(LanguageModel(config).apply)({"params": params}, tokens)
    np.testing.assert_array_equal(tokens[:, 5:], jnp.argmax(logits, -1)[:, 4:-1])
    assert len(np.unique(tokens[:, 5:])) > 3


def test_streaming_gives_the_same_tokens_one_column_at_a_time(hybrid_model):
    config, params = hybrid_model
    options = {"max_new_tokens": 5, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 4}
    columns = []
    streamed = generate(config, params, prompt(2, 3), on_token=columns.append, **options)
    at_once = generate(config, params, prompt(2, 3), **options)
    np.testing.assert_array_equal(streamed, at_once)
    np.testing.assert_array_equal(np.stack(columns, 1), at_once[:, 3:])


def test_the_seed_decides_the_tokens(hybrid_model):
    config, params = hybrid_model
    draws = [
        generate(config, params, prompt(2, 3), max_new_tokens=8, seed=seed) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not jnp.array_equal(draws[0], draws[2])


def test_one_new_token_needs_no_step(hybrid_model):
    config, params = hybrid_model
    assert generate(config, params, prompt(1, 1), max_new_tokens=1).shape == (1, 2)


def frequencies(probabilities, **options):
    sampling = Sampling(**{"temperature": 1.0, "top_k": None, "top_p": None} | options)
    logits = jnp.log(jnp.array(probabilities))
    draws = _draw(jnp.tile(logits, (20_000, 1)), sampling, jax.random.key(0))
    return np.bincount(draws, minlength=len(probabilities)) / 20_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 4}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_sampling_draws_from_the_truncated_distribution(options, expected):
    np.testing.assert_allclose(frequencies([0.1, 0.4, 0.2, 0.3], **options), expected, atol=0.015)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": np.zeros(3, np.int32)}, "prompt"),
        ({"prompt": np.zeros((1, 0), np.int32)}, "prompt"),
        ({"prompt": np.zeros((1, 2))}, "prompt"),
        ({"prompt": np.array([[0, 31]])}, "prompt"),
        ({"prompt": np.array([[-1, 0]])}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 32}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_malformed_arguments_are_named(hybrid_model, changes, named):
    config, params = hybrid_model
    arguments = {"prompt": prompt(1, 2), "max_new_tokens": 1} | changes
    with pytest.raises(ValueError, match=f"^{named}: expected .*got"):
        generate(config, params, **arguments)
