"""Each task's definition, by brute force over whole batches, and what all tasks share."""

import numpy as np
import pytest

from gdn2_jax.data.recall import (
    TASKS,
    GroupWord,
    Mqar,
    Needles,
    Palindrome,
    Reassigned,
    RecallSource,
    Stack,
    ZoologyMqar,
    draw,
    draw_rows,
    multiplication_table,
    questions,
)

CASES = [
    Mqar(18, pairs=5, vocab_size=24),
    ZoologyMqar(24, pairs=3, vocab_size=16),
    Reassigned(24, pairs=5, updates=2, vocab_size=40),
    Palindrome(12, vocab_size=8),
    Stack(50, stacks=3, vocab_size=20),
    Needles(96, needles=3),
    GroupWord(11, "s3"),
]
named = pytest.mark.parametrize("task", CASES, ids=lambda task: type(task).__name__)


def batch(task, count=16, **options):
    return RecallSource(task, seed=3, size=2**32, **options).batch(np.arange(count))


def asked(row):
    """(position, target) of each question of a row of `batch`."""
    return [(t, row["targets"][t]) for t in np.flatnonzero(row["kinds"])]


def rows(task):
    arrays = batch(task)
    return [{name: x[i] for name, x in arrays.items()} for i in range(16)]


@named
def test_an_example_depends_on_seed_split_and_index_alone(task):
    source = RecallSource(task, seed=3, size=20)
    assert len(source) == 20
    many = batch(task)
    for name, x in source[7].items():
        np.testing.assert_array_equal(x, many[name][7])
        assert x.shape == (task.length,) and x.dtype == np.int32
    others = [source[8], RecallSource(task, 4, 20)[7], RecallSource(task, 3, 20, split=1)[7]]
    assert all((other["tokens"] != source[7]["tokens"]).any() for other in others)
    with pytest.raises(IndexError, match=r"expected one in \[0, 20\), got 20"):
        source[20]


@named
def test_tokens_and_targets_are_in_the_vocabulary_and_questions_are_counted(task):
    arrays = batch(task)
    assert all(0 <= x.min() and x.max() < task.vocab_size for x in arrays.values())
    assert set(np.unique(arrays["kinds"])) <= set(range(1 + len(task.kinds)))
    assert (arrays["targets"][arrays["kinds"] == 0] == 0).all()
    counts = (arrays["kinds"] > 0).sum(axis=1)
    if isinstance(task, Stack):
        assert 0 < counts.min() and counts.max() <= task.questions
    else:
        assert (counts == task.questions).all()


@named
def test_questions_are_all_asked_positions_in_order(task):
    arrays = batch(task)
    found = questions(task, type("Batch", (), arrays))
    assert found.positions.shape == (16, task.questions)
    assert (np.diff(found.positions, axis=1) > 0).all()
    for i in range(16):
        keep = np.asarray(found.kinds[i]) > 0
        positions = np.flatnonzero(arrays["kinds"][i])
        np.testing.assert_array_equal(found.positions[i][keep], positions)
        np.testing.assert_array_equal(found.targets[i][keep], arrays["targets"][i][positions])


def test_mqar_asks_every_key_once_after_the_separator():
    for row in rows(CASES[0]):
        tokens = list(row["tokens"])
        memory = dict(zip(tokens[0:10:2], tokens[1:10:2]))
        assert len(memory) == len(set(memory.values())) == 5
        assert max(memory) < 13 <= min(memory.values()) and tokens[10] == 1
        assert [t for t, _ in asked(row)] == list(range(11, 16))
        assert all(memory[tokens[t]] == target for t, target in asked(row))
        assert sorted(tokens[11:16]) == sorted(memory) and tokens[16:] == [0, 0]
    assert Mqar(256).questions == 85


def test_a_row_of_short_sequences_is_the_task_at_that_length_side_by_side():
    task = Mqar(24, pairs=6, vocab_size=24)
    rows = draw_rows(task, 4, 3, 0, np.array([2, 5]))
    short = draw(Mqar(6, pairs=1, vocab_size=24), 3, 0, np.array([8, 9, 10, 11, 20, 21, 22, 23]))
    for row, alone in zip(rows, short._replace(kinds=2 * short.kinds)):
        np.testing.assert_array_equal(row, alone.reshape(2, 24))


def test_zoologys_queries_begin_slots_and_early_slots_are_likelier():
    for row in rows(CASES[1]):
        tokens = list(row["tokens"])
        memory = dict(zip(tokens[0:6:2], tokens[1:6:2]))
        assert len(memory) == 3 and max(memory) < 8 <= min(memory.values())
        assert all(t >= 6 and t % 2 == 0 and memory[tokens[t]] == v for t, v in asked(row))
        assert {tokens[t] for t, _ in asked(row)} == set(memory)
    task = ZoologyMqar(64, pairs=4, vocab_size=64)
    slots = np.nonzero(batch(task, 2000)["kinds"])[1] // 2 - 4
    # Of 28 slots the first has 0.251 of the weight, so it is among four of them nearly 3 times in 4.
    weights = np.arange(1, 29.0) ** -0.99
    chosen, draws = np.zeros(28), np.random.default_rng(0)
    for _ in range(4000):
        chosen[draws.choice(28, 4, replace=False, p=weights / weights.sum())] += 1 / 4000
    np.testing.assert_allclose(np.bincount(slots, minlength=28) / 2000, chosen, atol=0.05)


def test_a_reassigned_key_is_asked_for_its_last_value():
    for row in rows(CASES[2]):
        tokens, memory, writes = list(row["tokens"]), {}, {}
        for key, value in zip(tokens[0:14:2], tokens[1:14:2]):
            memory[key] = value
            writes[key] = writes.get(key, 0) + 1
        assert tokens[14] == 1 and sorted(writes.values()) == [1, 1, 1, 2, 2]
        assert len(set(tokens[1:14:2])) == 7
        for t, target in asked(row):
            assert memory[tokens[t]] == target and row["kinds"][t] == writes[tokens[t]]
    assert CASES[2].kinds == ("untouched", "updated")


def test_a_palindromes_targets_are_its_words_backwards():
    for row in rows(CASES[3]):
        tokens = list(row["tokens"])
        assert tokens[6] == 1 and min(tokens[:6]) >= 2
        assert asked(row) == list(enumerate(tokens[5::-1], start=6))
        assert tokens[7:] == [target for _, target in asked(row)][:-1]


def test_a_pop_gives_the_item_that_its_stack_got_last():
    for row in rows(CASES[4]):
        stacks, expected = {}, []
        for t in range(0, 48, 3):
            operation, stack, item = row["tokens"][t : t + 3]
            assert 3 <= stack < 6 <= item
            if operation == 2:
                assert stacks[stack].pop() == item
                expected.append((t + 1, item))
            else:
                assert operation == 1
                stacks.setdefault(stack, []).append(item)
        assert asked(row) == expected and list(row["tokens"][48:]) == [0, 0]


@pytest.mark.parametrize("haystack", ["noise", "words"])
def test_the_question_names_one_of_the_needles(haystack):
    task = Needles(160, needles=3, haystack=haystack)
    for row in rows(task):
        tokens = list(row["tokens"])
        starts = [t for t, token in enumerate(tokens) if token == 0]
        memory = {tuple(tokens[t + 1 : t + 3]): tokens[t + 3 : t + 10] for t in starts}
        assert len(memory) == 3 and all(tokens[t + 10] == 1 for t in starts)
        question = tokens.index(2)
        answer = memory[tuple(tokens[question + 1 : question + 3])]
        assert tokens[question + 3 :] == answer[:-1]
        assert asked(row) == list(enumerate(answer, start=question + 2))
        needles = {t + i for t in starts for i in range(11)}
        straw = [x for t, x in enumerate(tokens[:question]) if t not in needles]
        assert min(straw) >= 3 + 16 + 128
        if haystack == "noise":
            assert straw == [3 + 16 + 128 + i % 24 for i in range(len(straw))]


@pytest.mark.parametrize(("group", "points"), [("parity", 2), ("s3", 3), ("s5", 5)])
def test_the_word_problem_multiplies_from_the_left(group, points):
    table = multiplication_table(points)
    order = len(table)
    np.testing.assert_array_equal(table[0], np.arange(order))
    assert all(sorted(row) == list(range(order)) for row in (*table, *table.T))
    some = np.random.default_rng(0).integers(order, size=(3, 50))
    np.testing.assert_array_equal(
        table[table[some[0], some[1]], some[2]], table[some[0], table[some[1], some[2]]]
    )
    assert (points < 3) == (table == table.T).all()
    for row in rows(GroupWord(11, group)):
        product = 0
        for token, target in zip(row["tokens"], row["targets"]):
            product = table[product, token]
            assert product == target
    if group == "parity":
        bits = batch(GroupWord(11))
        np.testing.assert_array_equal(bits["targets"], np.cumsum(bits["tokens"], axis=1) % 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mqar(15, pairs=5), "length: expected 3 pairs"),
        (lambda: Mqar(64, vocab_size=32), "vocab_size: expected a half >= pairs, got 32"),
        (lambda: ZoologyMqar(15, pairs=1), "length: expected an even number"),
        (lambda: Reassigned(24, pairs=5, updates=6), "updates: expected 1 to pairs 5, got 6"),
        (lambda: Palindrome(7), "length: expected an even number, got 7"),
        (lambda: Stack(20, stacks=64, vocab_size=60), "vocab_size: expected more than stacks"),
        (lambda: Needles(40), "length: expected at least"),
        (lambda: Needles(128, haystack="essay"), "haystack: expected noise or words, got 'essay'"),
        (lambda: GroupWord(8, "s4"), "group: expected one of"),
    ],
)
def test_a_task_that_cannot_be_drawn_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_row_that_cannot_be_divided_says_why():
    with pytest.raises(ValueError, match="documents: expected a divisor of length 24, got 5"):
        draw_rows(Mqar(24), 5, 0, 0, np.arange(2))


def test_every_task_has_a_name():
    assert {type(task) for task in CASES} == set(TASKS.values())
