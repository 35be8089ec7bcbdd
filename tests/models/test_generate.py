import dataclasses
import functools
import importlib
import re
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gdn2_jax.models import LanguageModel, continue_session, generate, start_session
from gdn2_jax.models.generate import Sampling, _draw
from gdn2_jax.models.session import empty_cache
from gdn2_jax.parallel.logical import RULES

module = importlib.import_module("gdn2_jax.models.generate")
reading = importlib.import_module("gdn2_jax.models.session")


@functools.cache
def forward(config):
    return jax.jit(LanguageModel(config).apply)


def assert_greedy(config, params, prompts, rows):
    """Each row is its prompt and then the most likely tokens of the full forward of it alone."""
    for start, row in zip(prompts, rows, strict=True):
        later = np.zeros(40 - len(row), np.int32)  # One shape; no token sees them.
        logits = forward(config)({"params": params}, np.concatenate([row, later])[None])
        likely = np.argmax(logits[0], -1)[len(start) - 1 : len(row) - 1]
        np.testing.assert_array_equal(row, [*start, *likely])


def prompt(*shape):
    return np.asarray(jax.random.randint(jax.random.key(3), shape, 0, 31))


def test_greedy_tokens_are_the_most_likely_ones_of_the_full_forward(small_model):
    config, params = small_model
    start = prompt(2, 5)
    # Beyond the attention window of 4.
    tokens = generate(config, params, start, max_new_tokens=9, temperature=0)
    assert tokens.shape == (2, 14) and tokens.dtype == np.int32
    assert_greedy(config, params, start, tokens)
    assert len(np.unique(tokens[:, 5:])) > 3


def test_layers_compiled_one_after_another_give_the_tokens_of_the_loop(hybrid_model):
    config, params = hybrid_model
    unrolled = dataclasses.replace(config, unroll=True)
    start = prompt(1, 5)
    assert_greedy(
        config, params, start, generate(unrolled, params, start, max_new_tokens=9, temperature=0)
    )
    session = start_session(unrolled, params, start)
    _, session = continue_session(unrolled, params, session, max_new_tokens=2)
    assert jax.tree.map(jnp.shape, session.cache) == jax.tree.map(jnp.shape, empty_cache(config, 1))


def by_columns(params, mesh):
    """The parameters on a mesh of one axis "columns", which splits those of inner projections."""

    def spec(path, leaf):
        inner = "proj" in jax.tree_util.keystr(path) and "o_proj" not in jax.tree_util.keystr(path)
        return (
            PartitionSpec(*[None] * 2, "columns") if inner and leaf.ndim == 3 else PartitionSpec()
        )

    specs = jax.tree.map_with_path(spec, params)
    return jax.device_put(params, jax.tree.map(lambda x: NamedSharding(mesh, x), specs))


def test_kernels_split_over_explicit_axes_give_the_tokens_of_one_device(hybrid_model):
    config, params = hybrid_model
    start = prompt(1, 5)
    mesh = jax.make_mesh((2,), ("columns",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = by_columns(params, mesh)
        rows = generate(config, placed, start, max_new_tokens=4, temperature=0)
    assert_greedy(config, params, start, rows)


def test_kernels_split_over_devices_stay_where_they_are(hybrid_model, monkeypatch):
    config, params = hybrid_model
    mesh = jax.make_mesh((2,), ("columns",), (AxisType.Auto,), devices=jax.devices()[:2])
    decode, programs = module._decode, []

    def compiled(config, merges, *arguments):
        programs.append(decode.lower(config, merges, *arguments).compile())
        return programs[-1](*arguments)

    monkeypatch.setattr(module, "_decode", compiled)
    placed, start = by_columns(params, mesh), prompt(1, 5)
    rows = generate(config, placed, start, max_new_tokens=4, temperature=0)
    assert_greedy(config, params, start, rows)
    assert not re.search("all-to-all|collective-permute", programs[0].as_text())


def test_parameters_in_boxes_give_the_tokens_of_plain_ones(hybrid_model):
    config, params = hybrid_model
    with nn.logical_axis_rules(RULES):
        boxed = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), prompt(1, 1))
    boxed = nn.meta.replace_boxed(boxed["params"], params)
    start = prompt(1, 5)
    rows = generate(config, boxed, start, max_new_tokens=4, temperature=0)
    assert_greedy(config, params, start, rows)


def test_streaming_gives_the_same_tokens_one_column_at_a_time(hybrid_model):
    config, params = hybrid_model
    options = {"max_new_tokens": 5, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 4}
    columns = []
    streamed = generate(config, params, prompt(2, 3), on_token=columns.append, **options)
    at_once = generate(config, params, prompt(2, 3), **options)
    np.testing.assert_array_equal(streamed, at_once)
    np.testing.assert_array_equal(np.stack(columns, 1), at_once[:, 3:])


def test_a_long_text_streams_in_time_linear_in_its_length(hybrid_model):
    config, params = hybrid_model
    columns = []
    options = {"max_new_tokens": 3000, "temperature": 0}
    generate(config, params, prompt(2, 3), max_new_tokens=1)  # compiles
    start = time.monotonic()
    tokens = generate(config, params, prompt(2, 3), on_token=columns.append, **options)
    assert time.monotonic() - start < 5
    np.testing.assert_array_equal(np.stack(columns, 1), tokens[:, 3:])


def test_neither_lengths_nor_options_of_sampling_compile_anything(hybrid_model):
    config, params = hybrid_model

    def run(length, new, **options):
        generate(config, params, prompt(2, length), max_new_tokens=new, **options)
        return reading.read._cache_size(), module._decode._cache_size()

    before = run(1, 2)
    assert run(7, 9, temperature=0.5) == before
    assert run(16, 300, top_p=0.4, seed=2, eos=4) == before
    assert run(3, 4, top_k=3, temperature=0, on_token=lambda column: None) == before


def test_rows_of_different_lengths_get_their_own_greedy_tokens(hybrid_model):
    config, params = hybrid_model
    for lengths in ((1, 13), (5, 16)):
        rows = [prompt(1, length)[0].tolist() for length in lengths]
        together = generate(config, params, rows, max_new_tokens=9, temperature=0)
        assert_greedy(config, params, rows, together)


def test_a_prompt_longer_than_a_piece_is_read_in_several(hybrid_model, monkeypatch):
    config, params = hybrid_model
    monkeypatch.setattr(reading, "_LONGEST_PIECE", 16)
    rows = [prompt(1, length)[0] for length in (35, 12)]
    together = generate(config, params, rows, max_new_tokens=4, temperature=0)
    assert_greedy(config, params, rows, together)


def test_draws_of_a_row_do_not_depend_on_other_rows_or_on_how_many_follow(hybrid_model):
    config, params = hybrid_model
    rows = [prompt(1, 3)[0], prompt(1, 5)[0]]
    alone = generate(config, params, rows[:1], max_new_tokens=4)
    together = generate(config, params, rows, max_new_tokens=8)
    np.testing.assert_array_equal(alone[0], together[0][:7])


def test_a_row_ends_with_eos_and_the_others_go_on(hybrid_model):
    config, params = hybrid_model
    rows = list(prompt(2, 4))
    free = generate(config, params, prompt(2, 4), max_new_tokens=8, temperature=0)
    eos = next(int(token) for token in free[1, 4:] if token not in free[0, 4:])
    length = list(free[1, 4:]).index(eos) + 5
    options = {"max_new_tokens": 8, "temperature": 0, "eos": eos}
    first, second = generate(config, params, rows, **options)
    np.testing.assert_array_equal(first, free[0])
    np.testing.assert_array_equal(second, free[1, :length])
    array = generate(config, params, prompt(2, 4), **options)
    np.testing.assert_array_equal(array, [first, [*second, *[eos] * (12 - length)]])


def test_a_row_ends_where_the_caller_says_so(hybrid_model):
    config, params = hybrid_model
    rows, columns = list(prompt(2, 3)), []
    options = {"max_new_tokens": 300, "temperature": 0}

    def stop(column):
        columns.append(column)
        return [len(columns) >= 2, len(columns) >= 40]

    free = generate(config, params, rows, **options)
    stopped = generate(config, params, rows, on_token=stop, **options)
    assert [len(row) for row in stopped] == [3 + 2, 3 + 40] and len(columns) == 40
    for row, expected in zip(stopped, free, strict=True):
        np.testing.assert_array_equal(row, expected[: len(row)])


def test_weights_that_are_not_finite_are_an_error(hybrid_model):
    config, params = hybrid_model
    params = params | {"embed": {"embedding": params["embed"]["embedding"].at[7].set(jnp.nan)}}
    rows = [[1, 2], [7, 1]]
    with pytest.raises(ValueError, match="^params: expected .* new token 0 of row 1"):
        generate(config, params, rows, max_new_tokens=4)
    assert len(generate(config, params, rows[:1], max_new_tokens=1, temperature=0)[0]) == 3


def test_the_seed_decides_the_tokens(hybrid_model):
    config, params = hybrid_model
    draws = [
        generate(config, params, prompt(2, 3), max_new_tokens=8, seed=seed)
        for seed in (0, 0, 1, 2**70)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_one_new_token_is_one_new_token(hybrid_model):
    config, params = hybrid_model
    assert generate(config, params, prompt(1, 1), max_new_tokens=1).shape == (1, 2)


@jax.jit
def draws(logits, sampling):
    return _draw(
        jnp.tile(logits, (20_000, 1)), sampling, jax.random.split(jax.random.key(0), 20_000)
    )


def frequencies(probabilities, temperature=1.0, top_k=None, top_p=None):
    sampling = Sampling.of({"temperature": temperature, "top_k": top_k, "top_p": top_p})
    tokens = draws(jnp.log(jnp.array(probabilities)), sampling)
    return np.bincount(tokens, minlength=len(probabilities)) / 20_000


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
        ({"temperature": 1e-40}, [0, 1, 0, 0]),
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
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1], [0.5]]}, "prompt"),
        ({"prompt": [[1], [31]]}, "prompt"),
        ({"eos": 31}, "eos"),
        ({"eos": -1}, "eos"),
        ({"eos": [3, 4]}, "eos"),
        ({"max_new_tokens": 4.0}, "max_new_tokens"),
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


def test_an_option_that_does_not_exist_is_named(hybrid_model):
    with pytest.raises(TypeError, match="^options: expected .*GenerationOptions, got temp$"):
        generate(*hybrid_model, prompt(1, 2), max_new_tokens=1, temp=0.0)
