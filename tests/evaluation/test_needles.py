"""Needles in haystacks: RULER's words, every prompt as long as fits."""

import re
from collections import Counter

import jax
import numpy as np
import pytest

from gdn2_jax.data import load_tokenizer, train_tokenizer
from gdn2_jax.evaluation import needles, on_local_devices

BYTES = load_tokenizer("bytes")
ESSAY = "Is it so? It is. We walked on, and on, for days! Then a house. " * 5
QUESTION = re.compile(
    r"A special magic (number|uuid) is hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the \1 afterwards\.\n(.*)\n"
    r"What is the special magic \1 for (.+?) mentioned in the provided text\? "
    r"The special magic \1 for \3 mentioned in the provided text is",
    re.DOTALL,
)


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """A few words, for which no package is needed."""
    monkeypatch.setattr(needles, "_words", lambda: (["green", "old"], ["sea", "tea pot", "door"]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([ESSAY, needles._NOISE] * 3, 400)


@pytest.mark.parametrize("name", needles.NEEDLE_TASKS)
def test_a_prompt_asks_for_one_of_its_needles(name, tokenizer):
    task = needles.NEEDLE_TASKS[name]
    for index in range(5):
        example = needles.needle_example(task, 900, index, tokenizer, essays=ESSAY)
        kind, haystack, key = QUESTION.fullmatch(example.prompt).groups()
        assert kind == task.value
        found = re.findall(
            rf"One of the special magic {kind}s for (.+?) is: (\d{{7}}|[0-9a-f-]{{36}})\.", haystack
        )
        assert len(found) == task.needles == len(dict(found))
        assert dict(found)[key] == example.answer
        assert example.tokens == 1 + len(tokenizer.encode(example.prompt))


@pytest.mark.parametrize("name", ["niah_single_2", "niah_multikey_1"])
@pytest.mark.parametrize("length", [900, 3000])
def test_a_prompt_is_as_long_as_fits(name, length, tokenizer):
    for index in range(5):
        example = needles.needle_example(
            needles.NEEDLE_TASKS[name], length, index, tokenizer, essays=ESSAY
        )
        # No word of the essay has as many tokens.
        assert length - needles.NEW_TOKENS - 10 < example.tokens <= length - needles.NEW_TOKENS


def test_questions_depend_on_their_number_and_the_seed_only():
    task = needles.NEEDLE_TASKS["niah_single_1"]
    first = needles.needle_example(task, 700, 3, BYTES)
    assert first == needles.needle_example(task, 700, 3, BYTES)
    others = [needles.needle_example(task, 700, i, BYTES, seed=s) for i, s in ((4, 0), (3, 1))]
    assert len({first.answer, *(other.answer for other in others)}) == 3


def test_needles_stand_everywhere_and_are_asked_for_alike():
    task = needles.NEEDLE_TASKS["niah_multikey_1"]
    places, asked = [], Counter()
    for index in range(200):
        example = needles.needle_example(task, 1500, index, BYTES, essays=ESSAY)
        starts = [m.start() for m in re.finditer("One of the special magic", example.prompt)]
        places += [start / len(example.prompt) for start in starts]
        place = example.prompt.index(f"is: {example.answer}")
        asked[np.searchsorted(starts, place)] += 1
    assert min(places) < 0.2 and max(places) > 0.8
    assert min(asked[i] for i in range(1, 5)) > 25


def test_an_oracle_finds_all_and_another_none():
    answers = ["1234567", "0a1b-AA"]
    assert needles.needles_found([" 1234567.", "is 0A1B-aa"], answers) == 1
    assert needles.needles_found(["7654321", "0a1b"], answers) == 0


def test_a_model_is_asked_in_full(hybrid, monkeypatch):
    asked = []

    def continue_prompts(model, tokenizer, prompts, **options):
        asked.append((prompts, options))
        return [f" {answer}." for answer in answers]

    task = needles.NEEDLE_TASKS["niah_single_1"]
    examples = [needles.needle_example(task, 700, i, BYTES) for i in range(2)]
    answers = [examples[0].answer, "nothing"]
    monkeypatch.setattr(needles, "continue_prompts", continue_prompts)
    model = on_local_devices(*hybrid, jax.local_devices()[:1])
    result = needles.evaluate_needles(model, BYTES, task, length=700, samples=2, batch_size=2)
    assert result.score == 0.5 and result.examples == examples
    ((prompts, options),) = asked
    assert [BYTES.decode(prompt[1:]) for prompt in prompts] == [e.prompt for e in examples]
    assert options["max_new_tokens"] == 128 and "stop" not in options


def test_a_length_without_room_is_refused():
    with pytest.raises(ValueError, match="^length: expected at least the .* got 300"):
        needles.needle_example(needles.NEEDLE_TASKS["niah_single_1"], 300, 0, BYTES)
