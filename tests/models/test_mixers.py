"""Every mixer in the language model, from its name to generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdn2_jax.models import MIXERS, PRESETS, LanguageModel, generate, matched_preset

# Both tests of a mixer use the same compiled programs.
NAMES = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"test_mixers {name}"))
    for name in MIXERS
    if name != "sliding_window_attention"
]


@pytest.fixture
def build(random_params):
    """A function of a mixer: the tiny model with one layer, and parameters for it."""

    def make(mixer):
        config = PRESETS[matched_preset("gdn2_tiny", mixer)]
        config = dataclasses.replace(config, num_layers=1, d_model=64, implementation="recurrent")
        return config, random_params(LanguageModel(config), jnp.zeros((1, 1), int))

    return make


def tokens(*shape):
    return jax.random.randint(jax.random.key(2), shape, 0, 257)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(config, params, ids):
    """((loss, logits [2, 16, 257]), gradient)."""

    def loss(params):
        logits = LanguageModel(config).apply({"params": params}, ids[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return losses.mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("mixer", NAMES)
def test_one_step_along_the_gradient_lowers_the_loss(mixer, build):
    config, params = build(mixer)
    ids = tokens(2, 17)
    (before, _), gradient = jax.device_get(loss_and_gradient(config, params, ids))
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    (after, _), _ = loss_and_gradient(config, moved, ids)
    assert after < before - 0.01
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("mixer", NAMES)
def test_greedy_tokens_of_each_row_are_the_most_likely_ones_of_its_full_forward(mixer, build):
    config, params = build(mixer)
    start = [row[-length:] for row, length in zip(np.asarray(tokens(2, 5)), (5, 2))]
    continued = generate(config, params, start, max_new_tokens=7, temperature=0)
    # What is to the left of the shorter row, or to the right of it here, must not be seen.
    whole = np.array([np.pad(row, (0, 17 - len(row))) for row in continued])
    (_, logits), _ = loss_and_gradient(config, params, whole)
    for row, likely in zip(continued, np.argmax(logits, -1), strict=True):
        np.testing.assert_array_equal(row[-7:], likely[len(row) - 8 : len(row) - 1])


def test_generation_gives_full_attention_room_for_the_whole_text(build):
    config, params = build("attention")
    config = dataclasses.replace(config, context_length=2)
    start = np.asarray(tokens(1, 4))
    short = generate(config, params, start, max_new_tokens=6, temperature=0)
    logits = jax.jit(LanguageModel(config).apply)({"params": params}, short)
    np.testing.assert_array_equal(short[:, 4:], jnp.argmax(logits, -1)[:, 3:-1])
