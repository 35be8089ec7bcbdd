"""RULER's needles in a haystack (arXiv 2404.06654), made here for any tokenizer and length.

A sentence with a key and a value stands in a long text, which ends with the question for the value.
Prompts are those of RULER to the letter. Its two public generators stop some hundred tokens short of
the length, by how much depends on the sample; here each prompt is as long as fits. The stand-in
for the essays is Python's own documentation, so scores on essays compare only with scores on the same
essays.
"""

import functools
import hashlib
import re
import uuid
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from gdn2_jax.data import Tokenizer
from gdn2_jax.evaluation.scoring import LocalModel, continue_prompts
from gdn2_jax.evaluation.tables import contains

NEW_TOKENS = 128
"""Tokens of each answer; they count in the length."""

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = np.linspace(0, 100, 40).round().astype(int)


class NeedleTask(NamedTuple):
    """A kind of needles.

    Attributes:
      haystack: one sentence again and again, or essays.
      value: seven digits, or a random UUID.
      needles: each has a key of its own; the question asks for one.
    """

    haystack: Literal["noise", "essay"]
    value: Literal["number", "uuid"]
    needles: int = 1


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("noise", "number"),
    "niah_single_2": NeedleTask("essay", "number"),
    "niah_single_3": NeedleTask("essay", "uuid"),
    "niah_multikey_1": NeedleTask("essay", "number", 4),
}
"""By RULER's names; in the paper's table 3 they are S-NIAH-1, 2, 3 and MK-NIAH-1."""


class NeedleExample(NamedTuple):
    """A question.

    Attributes:
      prompt: haystack and question.
      answer: the value asked for.
      tokens: of the prompt, the one before the text included.
    """

    prompt: str
    answer: str
    tokens: int


def needle_example(
    task: NeedleTask,
    length: int,
    index: int,
    tokenizer: Tokenizer,
    *,
    essays: str = "",
    seed: int = 0,
) -> NeedleExample:
    """Makes a question, which depends on nothing but the arguments.

    Args:
      task: such as `NEEDLE_TASKS["niah_single_1"]`.
      length: of the prompt in tokens and `NEW_TOKENS`, at most.
      index: number of the question.
      tokenizer: counts the tokens.
      essays: text of the haystack; Python's documentation if empty.
      seed: of the questions; training may take another.

    Raises:
      ValueError: the length has no room for the question; or the essays have no words.
    """
    name = f"{seed} {tuple(task)} {length} {index}"
    digest = hashlib.sha256(name.encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest))
    adjectives, nouns = _words()
    keys: list[str] = []
    while len(keys) < task.needles:
        key = f"{adjectives[random.integers(len(adjectives))]}-{nouns[random.integers(len(nouns))]}"
        keys += [key] * (key not in keys)
    values = [
        str(random.integers(10**6, 10**7))
        if task.value == "number"
        else str(uuid.UUID(bytes=random.bytes(16), version=4))
        for _ in keys
    ]
    needles = [
        f"One of the special magic {task.value}s for {key} is: {value}."
        for key, value in zip(keys, values, strict=True)
    ]
    places = random.random(task.needles)
    depths = np.sort(random.choice(_DEPTHS, task.needles, replace=False))
    asked = int(random.integers(task.needles))

    def prompt(size: int) -> str:
        if task.haystack == "noise":
            haystack = [_NOISE] * size
            indices = np.sort((places * size).astype(int))
            joint = "\n"
        else:
            words = _essay_words(essays)
            words = words * (size // len(words)) + words[: size % len(words)]
            haystack = re.split(r"(?<=[.?!])\s+", " ".join(words))
            indices = (len(haystack) * depths / 100).astype(int)
            joint = " "
        for place, needle in list(zip(indices, needles, strict=True))[::-1]:
            haystack.insert(place, needle)
        what = f"the special magic {task.value} for {keys[asked]} mentioned in the provided text"
        return (
            f"A special magic {task.value} is hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {task.value} afterwards.\n"
            f"{joint.join(haystack)}\n"
            f"What is {what}? {what[0].upper()}{what[1:]} is"
        )

    def count(size: int) -> int:
        return 1 + len(tokenizer.encode(prompt(size)))

    size, tokens = _largest(count, length - NEW_TOKENS)
    return NeedleExample(prompt(size), values[asked], tokens)


def _largest(count: Callable[[int], int], most: int) -> tuple[int, int]:
    """The greatest size whose count is at most `most`, and that count."""
    size, counted = 1, count(1)
    if counted > most:
        raise ValueError(
            f"length: expected at least the {counted} tokens of a question and {NEW_TOKENS} of its "
            f"answer, got {most + NEW_TOKENS}"
        )
    start, too_large = counted, None
    step = most
    while too_large is None or too_large - size > 1:
        # Words have about as many tokens each, so few steps are needed.
        guess = size + max(1, int(step))
        if too_large is not None and guess >= too_large:
            guess = (size + too_large) // 2
        found = count(guess)
        rate = max(found - start, 1) / (guess - 1)
        if found > most:
            too_large = guess
        else:
            size, counted = guess, found
        step = (most - counted) / rate
    return size, counted


class NeedleScore(NamedTuple):
    """Result of a task at a length.

    Attributes:
      score: share of answers that contain the value.
      examples: the questions.
      outputs: the answers.
    """

    score: float
    examples: list[NeedleExample]
    outputs: list[str]


def evaluate_needles(
    model: LocalModel,
    tokenizer: Tokenizer,
    task: NeedleTask,
    *,
    length: int,
    samples: int,
    batch_size: int,
    first: int | None = None,
    essays: str = "",
    seed: int = 0,
    progress: str | None = None,
) -> NeedleScore:
    """Asks a model for needles; it takes the likeliest tokens.

    Args:
      model: from `on_local_devices`.
      tokenizer: of the model.
      task: such as `NEEDLE_TASKS["niah_single_1"]`.
      length: as in `needle_example`.
      samples: number of questions.
      batch_size: questions at once on each device.
      first: token before each text; the one that ends a document if None.
      essays: as in `needle_example`.
      seed: as in `needle_example`.
      progress: name of a progress bar; None shows none.
    """
    first = tokenizer.end_of_document if first is None else first
    examples = [
        needle_example(task, length, index, tokenizer, essays=essays, seed=seed)
        for index in tqdm(range(samples), f"{progress}, questions", disable=progress is None)
    ]
    outputs = continue_prompts(
        model,
        tokenizer,
        [[first, *tokenizer.encode(example.prompt).tolist()] for example in examples],
        max_new_tokens=NEW_TOKENS,
        batch_size=batch_size,
        progress=progress,
    )
    answers = [example.answer for example in examples]
    return NeedleScore(needles_found(outputs, answers), examples, outputs)


def needles_found(outputs: Sequence[str], answers: Sequence[str]) -> float:
    """Returns the share of outputs that contain their answers; case does not count."""
    pairs = zip(outputs, answers, strict=True)
    return float(np.mean([contains(output, [answer]) for output, answer in pairs]))


@functools.cache
def _words() -> tuple[list[str], list[str]]:
    from wonderwords import RandomWord

    words = RandomWord()
    adjectives, nouns = (
        sorted(words.filter(include_categories=[kind])) for kind in ("adjectives", "nouns")
    )
    return adjectives, nouns


@functools.lru_cache(maxsize=4)
def _essay_words(essays: str) -> list[str]:
    words = (essays or " ".join(topics[name] for name in sorted(topics))).split()
    if not words:
        raise ValueError("essays: expected text, got none")
    return words
