"""What a model has read, saved, extended and replaced row by row, against texts that are read at once."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.models import (
    LanguageModel,
    SoftmaxAttention,
    continue_session,
    extend_session,
    load_session,
    put_rows,
    replace_row,
    save_session,
    sessions_along,
    start_session,
    take_rows,
    with_state_rounding,
)

reading = importlib.import_module("gdn2_jax.models.session")


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, 31, length).tolist()


@functools.cache
def forward(config):
    return jax.jit(LanguageModel(config).apply)


def alone(config, params, prompt, count):
    """The likeliest tokens after a prompt, each by a forward of all that is before it."""
    row = [*prompt]
    for end in range(len(prompt), len(prompt) + count):
        # One shape for all texts; no token sees what follows it.
        padded = np.pad(row, (0, 64 - end))[None]
        row.append(np.argmax(forward(config)({"params": params}, padded)[0], axis=-1)[end - 1])
    return row[len(prompt) :]


def greedy(config, params, session, count):
    return continue_session(config, params, session, max_new_tokens=count, temperature=0)


def test_a_saved_session_goes_on_where_it_was(hybrid_model, tmp_path):
    config, params = hybrid_model
    prompt = text(11)
    _, session = greedy(config, params, start_session(config, params, [prompt]), 4)
    save_session(tmp_path / "session", config, session)
    restored = load_session(tmp_path / "session", config)
    jax.tree.map(np.testing.assert_array_equal, restored, session)
    (tokens,), _ = greedy(config, params, restored, 5)
    np.testing.assert_array_equal(tokens, alone(config, params, prompt, 9)[4:])


def test_a_saved_session_is_as_large_after_any_text(hybrid_model, tmp_path):
    config, params = hybrid_model
    config = dataclasses.replace(config, dtype="bfloat16")
    for length in (3, 40):
        session = start_session(config, params, [text(length)])
        save_session(tmp_path / str(length), config, session)
        restored = load_session(tmp_path / str(length), config)
        assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, session)
    assert (tmp_path / "3").stat().st_size == (tmp_path / "40").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "40"]


def test_a_stochastically_rounded_state_is_saved_and_starts_anew_in_a_row(hybrid_model, tmp_path):
    config, params = hybrid_model
    config = with_state_rounding(config, "stochastic")
    _, session = greedy(config, params, start_session(config, params, [text(3), text(7)]), 4)
    session = replace_row(config, params, session, 1, text(5))
    save_session(tmp_path / "session", config, session)
    restored = load_session(tmp_path / "session", config)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, session)
    jax.tree.map(np.testing.assert_array_equal, restored, session)
    rows, alone = (
        x.cache["layers"]["block"]["mixer"]
        for x in (session, start_session(config, params, [text(5)]))
    )
    np.testing.assert_array_equal(rows["position"], [[7, 5]] * 2)
    assert rows["state"].dtype == jnp.bfloat16
    for name in ("position", "state"):
        np.testing.assert_array_equal(rows[name][:, 1:], alone[name])


def test_a_session_of_another_model_or_a_damaged_one_is_refused(hybrid_model, tmp_path):
    config, params = hybrid_model
    path = tmp_path / "session"
    save_session(path, config, start_session(config, params, [text(3)]))
    other = dataclasses.replace(config, attention=SoftmaxAttention(num_heads=2, window_size=5))
    with pytest.raises(ValueError, match="^config: .* attention.window_size 4, got 5$"):
        load_session(path, other)
    load_session(path, dataclasses.replace(config, implementation=None))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="^path: expected a session, got "):
        load_session(path, config)


def test_a_text_may_be_read_in_parts(hybrid_model):
    config, params = hybrid_model
    session = start_session(config, params, [text(9, 1), text(4, 2)])
    more = np.array([text(5, 3), text(5, 4)])
    found, _ = greedy(config, params, extend_session(config, params, session, more), 6)
    for row, first in enumerate((text(9, 1), text(4, 2))):
        expected = alone(config, params, [*first, *more[row]], 6)
        np.testing.assert_array_equal(found[row], expected)


def test_one_text_goes_on_in_several_rows(hybrid_model):
    config, params = hybrid_model
    one = start_session(config, params, [text(9, 1), text(4, 2)])
    session = take_rows(one, [1, 1, 0])
    tokens = np.array([[3], [7], [5]])
    found, _ = greedy(config, params, extend_session(config, params, session, tokens), 4)
    for row, first in enumerate((text(4, 2), text(4, 2), text(9, 1))):
        expected = alone(config, params, [*first, *tokens[row]], 4)
        np.testing.assert_array_equal(found[row], expected)


def test_sessions_along_a_text_are_those_of_its_prefixes(hybrid_model):
    config, params = hybrid_model
    tokens = np.array([text(12, 1), text(12, 2)])
    sessions = list(sessions_along(config, params, tokens, range(4, 13, 4)))
    for end, session in zip((4, 8, 12), sessions, strict=True):
        found, _ = greedy(config, params, session, 4)
        for row in range(2):
            expected = alone(config, params, tokens[row, :end], 4)
            np.testing.assert_array_equal(found[row], expected)


def test_sessions_at_the_ends_of_packed_documents_are_those_of_the_documents(hybrid_model):
    config, params = hybrid_model
    documents = [text(4, 1), text(8, 2), text(4, 3)]
    tokens = np.concatenate(documents)[None]
    segment_ids = np.repeat([1, 2, 3], [4, 8, 4])[None]
    sessions = sessions_along(config, params, tokens, [4, 12, 16], segment_ids)
    for document, session in zip(documents, sessions, strict=True):
        (found,), _ = greedy(config, params, session, 4)
        np.testing.assert_array_equal(found, alone(config, params, document, 4))


@pytest.mark.parametrize("positions", [[0, 2], [2, 2], [3, 5]])
def test_positions_that_do_not_ascend_within_the_text_are_refused(hybrid_model, positions):
    config, params = hybrid_model
    with pytest.raises(ValueError, match="^positions: expected ascending ones of 1 to 4, got "):
        next(sessions_along(config, params, np.array([text(4)]), positions))


@pytest.fixture(params=["window", "attention"])
def any_model(request, hybrid_model):
    """A hybrid and a Transformer whose attention sees more than the first prompts have."""
    config, params = hybrid_model
    if request.param == "window":
        attention = SoftmaxAttention(num_heads=2, window_size=48)
        return dataclasses.replace(config, attention=attention), params
    heads = {name: params["layers"]["block"][name] for name in ("mixer_norm", "mlp_norm", "mlp")}
    block = heads | {"mixer": params["layers"]["attention_block"]["mixer"]}
    mixer = SoftmaxAttention(kind="attention", num_heads=2)
    config = dataclasses.replace(config, num_layers=2, hybrid=False, mixer=mixer, context_length=64)
    return config, params | {"layers": {"block": block}}


def test_a_row_starts_anew_while_the_others_go_on(any_model):
    config, params = any_model
    # The third is longer than all that was read before.
    first, second, third = text(3, 1), text(7, 2), text(40, 3)
    session = start_session(config, params, [first, second])
    before, session = greedy(config, params, session, 3)
    session = replace_row(config, params, session, 0, third)
    after, session = greedy(config, params, session, 6)
    np.testing.assert_array_equal(after[0], alone(config, params, third, 6))
    expected = alone(config, params, second, 9)
    np.testing.assert_array_equal([*before[1], *after[1]], expected)
    # And the other one, at another time.
    session = replace_row(config, params, session, 1, first)
    after, _ = greedy(config, params, session, 4)
    np.testing.assert_array_equal(after[1], alone(config, params, first, 4))
    np.testing.assert_array_equal(after[0], alone(config, params, third, 10)[6:])


def test_rows_are_extended_by_different_lengths(any_model):
    config, params = any_model
    session = start_session(config, params, [text(3, 1), text(7, 2), text(2, 3)])
    session = extend_session(config, params, session, [text(3, 4), text(1, 5), []])
    found, session = greedy(config, params, session, 3)
    session = extend_session(config, params, session, [[], text(2, 6), text(3, 7)])
    after, _ = greedy(config, params, session, 3)
    begun = ([*text(3, 1), *text(3, 4)], [*text(7, 2), *text(1, 5)], text(2, 3))
    for row, more in enumerate(([], text(2, 6), text(3, 7))):
        np.testing.assert_array_equal(found[row], alone(config, params, begun[row], 3))
        expected = alone(config, params, [*begun[row], *found[row].tolist(), *more], 3)
        np.testing.assert_array_equal(after[row], expected)


@pytest.mark.parametrize(
    ("lengths", "padded"),
    [
        ([32], [False, False]),
        ([27], [True, False]),
        ([32, 11], [True, True]),
        # The second text begins with the last piece, after a piece of padding.
        ([48, 16], [True, True, True]),
        ([16, 16], [False]),
    ],
)
def test_long_pieces_without_padding_know_no_documents(hybrid_model, monkeypatch, lengths, padded):
    config, params = hybrid_model
    monkeypatch.setattr(reading, "_LONGEST_PIECE", 16)
    read, documents = reading.read, []

    def noted(config, params, cache, tokens, segment_ids=None):
        documents.append(segment_ids is not None)
        return read(config, params, cache, tokens, segment_ids)

    monkeypatch.setattr(reading, "read", noted)
    rows = [text(length, length) for length in lengths]
    session = start_session(config, params, rows)
    assert documents == padded
    found, session = greedy(config, params, session, 4)
    session = extend_session(config, params, session, [[3] * 2] * len(rows))
    after, _ = greedy(config, params, session, 2)
    for row, prompt in enumerate(rows):
        np.testing.assert_array_equal(found[row], alone(config, params, prompt, 4))
        expected = alone(config, params, [*prompt, *found[row].tolist(), 3, 3], 2)
        np.testing.assert_array_equal(after[row], expected)


def test_a_row_read_without_documents_and_one_after_padding_go_on_together(
    hybrid_model, monkeypatch
):
    config, params = hybrid_model
    monkeypatch.setattr(reading, "_LONGEST_PIECE", 16)
    session = start_session(config, params, [text(16, 1), text(16, 2)])
    session = replace_row(config, params, session, 1, text(5, 3))
    # The first row has read document 0 all along, the second has document 1 after padding.
    session = extend_session(config, params, session, np.array([text(7, 4), text(7, 5)]))
    found, _ = greedy(config, params, session, 4)
    for row, prompt in enumerate(([*text(16, 1), *text(7, 4)], [*text(5, 3), *text(7, 5)])):
        np.testing.assert_array_equal(found[row], alone(config, params, prompt, 4))


def test_a_saved_session_goes_on_in_a_row_of_a_running_batch(any_model, tmp_path):
    config, params = any_model
    _, other = greedy(config, params, start_session(config, params, [text(20, 1)]), 2)
    save_session(tmp_path / "session", config, other)
    session = start_session(config, params, [text(3, 2), text(7, 3), text(2, 4)])
    before, session = greedy(config, params, session, 5)
    session = put_rows(session, [1], load_session(tmp_path / "session", config))
    after, _ = greedy(config, params, session, 5)
    np.testing.assert_array_equal(after[1], alone(config, params, text(20, 1), 7)[2:])
    for row, prompt in ((0, text(3, 2)), (2, text(2, 4))):
        expected = alone(config, params, prompt, 10)
        np.testing.assert_array_equal([*before[row], *after[row]], expected)


def test_rows_that_do_not_fit_into_a_batch_are_refused(hybrid_model):
    config, params = hybrid_model
    session = start_session(config, params, [text(3), text(3)])
    for rows in ([0, 0], [0], [0, 2]):
        with pytest.raises(ValueError, match="^rows: expected "):
            put_rows(session, rows, session)
    other = start_session(with_state_rounding(config, "nearest"), params, [text(3)])
    with pytest.raises(ValueError, match="^other: expected a session of the same model"):
        put_rows(session, [0], other)
    for tokens, named in (
        ([[3], [31]], "ids in"),
        ([[3]], "2 rows, got 1"),
        ([[3], [[4]]], "rows"),
    ):
        with pytest.raises(ValueError, match=f"^tokens: expected .*{named}"):
            extend_session(config, params, session, tokens)


def test_what_does_not_fit_is_named(any_model):
    config, params = any_model
    session = start_session(config, params, [text(3), text(3)])
    with pytest.raises(ValueError, match="^row: expected 0 to 1, got 2$"):
        replace_row(config, params, session, 2, text(3))
    for rows in ([0, 2], [-1], []):
        with pytest.raises(ValueError, match="^rows: expected some of 0 to 1, got "):
            take_rows(session, rows)
    with pytest.raises(ValueError, match="^tokens: expected 2 rows, got 1$"):
        extend_session(config, params, session, jnp.zeros((1, 3), jnp.int32))
    if config.mixer.cache_grows:
        with pytest.raises(ValueError, match="^context_length: expected at least 128, .* got 64$"):
            start_session(config, params, [text(65)])
