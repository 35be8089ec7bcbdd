"""Recall and state-tracking tasks: each is one pure function from a random key to a sequence.

A task is a frozen dataclass with `length` (tokens), `vocab_size` (ids are below it), `questions`
(how many positions can be asked at most), `kinds` (names of the kinds of questions) and
`example(key)`. That function alone defines the task: `draw` maps it over indices inside a compiled
training loop, `RecallSource` serves the same rows to grain.

The target at a position is the answer to the tokens up to and including it; nothing is shifted.
"""

import dataclasses
import functools
import itertools
import math
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gdn2_jax.fields import require


class Example(NamedTuple):
    """A sequence, or a batch of them along leading axes.

    Attributes:
      tokens: inputs.
      targets: answers; 0 where nothing is asked.
      kinds: 0 where nothing is asked, else 1 + the position of the question's kind in `task.kinds`.
    """

    tokens: Int[Array, "*B T"]
    targets: Int[Array, "*B T"]
    kinds: Int[Array, "*B T"]


class Questions(NamedTuple):
    """What a batch asks, at ascending positions; those with a `kinds` of 0 only fill up."""

    positions: Int[Array, "*B Q"]
    targets: Int[Array, "*B Q"]
    kinds: Int[Array, "*B Q"]


@runtime_checkable
class Task(Protocol):
    """The fields and methods of every task; see the module."""

    kinds: ClassVar[tuple[str, ...]]

    @property
    def length(self) -> int: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def questions(self) -> int: ...  # noqa: D102
    def example(self, key: Array) -> Example: ...  # noqa: D102


def draw(task: Task, seed: int | Array, split: int | Array, indices: Int[Array, "N"]) -> Example:
    """The examples of indices in [0, 2^32), [N, T]; functions of (task, seed, split, index) alone.

    Splits 0, for training, and 1, for testing, have nothing in common.
    """
    key = jax.random.fold_in(jax.random.key(seed), split)
    return jax.vmap(lambda index: task.example(jax.random.fold_in(key, index)))(indices)


def draw_rows(
    task: Task, documents: int, seed: int | Array, split: int | Array, rows: Int[Array, "N"]
) -> Example:
    """Rows of `task.length` tokens, each of several shorter sequences of the task, [N, T].

    Few pairs show what to do: zoology too trains on several lengths at once. Kinds are the task's
    plus the number of the task's kinds, so that the questions of the short sequences stand apart.
    A row has `documents` sequences; `rows` are numbers as `indices` in `draw`.

    Raises:
      ValueError: the length is no multiple of `documents`, or the task has no form so short.
    """
    divides = task.length % documents == 0
    require("documents", divides, f"a divisor of length {task.length}", documents)
    indices = rows[:, None] * documents + jnp.arange(documents)
    example = draw(_shortened(task, documents), seed, split, indices.reshape(-1))
    tokens, targets, kinds = (x.reshape(len(rows), task.length) for x in example)
    return Example(tokens, targets, jnp.where(kinds > 0, kinds + len(task.kinds), 0))


def _shortened(task: Task, divisor: int) -> Task:
    """The task at a part of its length. The number of its pairs, if given, shrinks alike."""
    sizes = {name: getattr(task, name, None) for name in ("length", "pairs", "updates")}
    smaller = {name: max(1, size // divisor) for name, size in sizes.items() if size}
    return dataclasses.replace(task, **smaller)  # type: ignore[type-var]


def questions(task: Task, example: Example) -> Questions:
    """The asked positions of a batch, brought to the front: `task.questions` a sequence."""
    # Where a task always asks at the same places, XLA would sort while it compiles: for minutes.
    kinds = jax.lax.optimization_barrier(example.kinds)
    order = jnp.argsort(kinds == 0, axis=-1, stable=True)[..., : task.questions]
    # Ascending, which makes the gather of hidden states and its gradient cheap.
    order = jnp.sort(order, axis=-1)
    targets, kinds = (
        jnp.take_along_axis(x, order, axis=-1) for x in (example.targets, example.kinds)
    )
    return Questions(order, targets, kinds)


_draw = jax.jit(draw, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class RecallSource:
    """A task's examples by index: a random-access source for grain.

    Attributes:
      task: what to draw.
      size: number of examples.
      split: 0 for training, 1 for testing.
    """

    task: Task
    seed: int
    size: int
    split: int = 0

    def __len__(self) -> int:
        """Number of examples."""
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`tokens`, `targets` and `kinds` of an example, each [T] int32."""
        if not 0 <= index < self.size:
            raise IndexError(f"index: expected one in [0, {self.size}), got {index}")
        return {name: x[0] for name, x in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The same for many examples at once, each [N, T]."""
        example = _draw(self.task, self.seed, self.split, np.asarray(indices, np.uint32))
        return {name: np.asarray(x) for name, x in example._asdict().items()}


_BLANK, _SEPARATOR, _WORDS = 0, 1, 2
"""Two tokens that the tasks below share; their words begin after them."""


@dataclasses.dataclass(frozen=True)
class Mqar:
    """Multi-query associative recall, as dense as it gets: pairs, separator, every key once.

        k1 v1 k2 v2 ... kD vD SEP q1 q2 ... qD

    The D keys are different, as are the values; the queries are the keys in random order, the
    target at a query is its key's value, which is not shown. Blanks fill up to `length`.

    Attributes:
      length: tokens.
      pairs: D; as many as fit if None.
      vocab_size: half of the words are keys, half are values.
    """

    length: int
    pairs: int | None = None
    vocab_size: int = 2048
    kinds: ClassVar[tuple[str, ...]] = ("all",)

    def __post_init__(self):
        require("pairs", self.questions >= 1, "at least 1", self.questions)
        require("length", 3 * self.questions < self.length, "3 pairs + 1 or more", self.length)
        require("vocab_size", self.questions <= self._half, "a half >= pairs", self.vocab_size)

    @property
    def _half(self) -> int:
        return (self.vocab_size - _WORDS) // 2

    @property
    def questions(self) -> int:
        """D."""
        return (self.length - 1) // 3 if self.pairs is None else self.pairs

    def example(self, key: Array) -> Example:
        """Draws a sequence."""
        count = self.questions
        key, value, order = jax.random.split(key, 3)
        keys = _WORDS + _different(key, self._half, count)
        values = _WORDS + self._half + _different(value, self._half, count)
        order = jax.random.permutation(order, count)
        return _ask([_interleave(keys, values)], keys[order], values[order], 1, self.length)


@dataclasses.dataclass(frozen=True)
class ZoologyMqar:
    """Multi-query associative recall with gaps, as in zoology (arXiv 2312.04927).

    D pairs, then (length - 2 D) / 2 slots of two tokens. D slots are drawn, early ones more often;
    the j-th of them begins with the j-th key; the target there is its value, which is
    not shown. All other tokens after the pairs are drawn from the whole vocabulary.

    Attributes:
      length: tokens, an even number of at least 4 D.
      pairs: D.
      vocab_size: keys lie below its half, values above.
      power: slot s has weight (s + 1)^(power - 1).
    """

    length: int
    pairs: int
    vocab_size: int = 8192
    power: float = 0.01
    kinds: ClassVar[tuple[str, ...]] = ("all",)

    def __post_init__(self):
        require("pairs", self.pairs >= 1, "at least 1", self.pairs)
        fits = self.length % 2 == 0 and 4 * self.pairs <= self.length
        require("length", fits, f"an even number, at least 4 pairs {4 * self.pairs}", self.length)
        require("vocab_size", self.pairs < self.vocab_size // 2, "a half > pairs", self.vocab_size)

    @property
    def questions(self) -> int:
        """D."""
        return self.pairs

    def example(self, key: Array) -> Example:
        """Draws a sequence."""
        key, value, slot, noise = jax.random.split(key, 4)
        half, slots = self.vocab_size // 2, self.length // 2 - self.pairs
        keys = 1 + _different(key, half - 1, self.pairs)
        values = half + _different(value, self.vocab_size - half, self.pairs)
        # Gumbel's trick: slots in the order in which they are drawn without replacement.
        scores = (self.power - 1) * jnp.log(1.0 + jnp.arange(slots))
        chosen = jnp.argsort(-scores - jax.random.gumbel(slot, (slots,)))[: self.pairs]
        positions = 2 * self.pairs + 2 * chosen
        tokens = jax.random.randint(noise, (self.length,), 0, self.vocab_size)
        tokens = tokens.at[: 2 * self.pairs].set(_interleave(keys, values))
        zeros = jnp.zeros(self.length, jnp.int32)
        return Example(
            tokens.at[positions].set(keys),
            zeros.at[positions].set(values),
            zeros.at[positions].set(1),
        )


@dataclasses.dataclass(frozen=True)
class Reassigned:
    """Associative recall with keys that are written twice: the last value is asked for.

        k1 v1 ... kD vD   U of the keys with new values   SEP   every key once

    All D + U values are different, so a stale answer shows. Questions are of two kinds: keys that
    were written once ("untouched") and twice ("updated").

    Attributes:
      length: tokens.
      pairs: D; if None as many as fit with one in two updated.
      updates: U; D // 2 if None.
      vocab_size: as in `Mqar`.
    """

    length: int
    pairs: int | None = None
    updates: int | None = None
    vocab_size: int = 2048
    kinds: ClassVar[tuple[str, ...]] = ("untouched", "updated")

    def __post_init__(self):
        pairs, updates = self.questions, self._updates
        require("pairs", pairs >= 1, "at least 1", pairs)
        require("updates", 1 <= updates <= pairs, f"1 to pairs {pairs}", updates)
        needed = 3 * pairs + 2 * updates + 1
        require("length", needed <= self.length, f"at least {needed}", self.length)
        require("vocab_size", pairs + updates <= self._half, "a half >= values", self.vocab_size)

    @property
    def _half(self) -> int:
        return (self.vocab_size - _WORDS) // 2

    @property
    def questions(self) -> int:
        """D."""
        return (self.length - 1) // 4 if self.pairs is None else self.pairs

    @property
    def _updates(self) -> int:
        return self.questions // 2 if self.updates is None else self.updates

    def example(self, key: Array) -> Example:
        """Draws a sequence."""
        count, updates = self.questions, self._updates
        key, value, update, order = jax.random.split(key, 4)
        keys = _WORDS + _different(key, self._half, count)
        values = _WORDS + self._half + _different(value, self._half, count + updates)
        updated = _different(update, count, updates)
        final = values[:count].at[updated].set(values[count:])
        kinds = jnp.ones(count, jnp.int32).at[updated].set(2)
        order = jax.random.permutation(order, count)
        writes = [_interleave(keys, values[:count]), _interleave(keys[updated], values[count:])]
        return _ask(writes, keys[order], final[order], kinds[order], self.length)


@dataclasses.dataclass(frozen=True)
class Palindrome:
    """Words, a separator and the words backwards: x1 ... xn SEP xn ... x2, n = length / 2.

    From the separator on, the target is the next word of the backward copy, x1 at the end.

    Attributes:
      length: tokens, an even number.
      vocab_size: words are drawn with repetition.
    """

    length: int
    vocab_size: int = 2048
    kinds: ClassVar[tuple[str, ...]] = ("all",)

    def __post_init__(self):
        require("length", self.length >= 2 and self.length % 2 == 0, "an even number", self.length)
        require("vocab_size", self.vocab_size > _WORDS, f"more than {_WORDS}", self.vocab_size)

    @property
    def questions(self) -> int:
        """Words."""
        return self.length // 2

    def example(self, key: Array) -> Example:
        """Draws a sequence."""
        words = jax.random.randint(key, (self.questions,), _WORDS, self.vocab_size)
        return _ask([words], words[:0:-1], words[::-1], 1, self.length)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Independent stacks: PUSH stack item, or POP stack item, where the item is the answer.

    Every operation takes three tokens. Its stack is uniform; it pops with probability 1/2 if the
    stack holds anything, and pushes a uniform item otherwise. The target at the stack's name in a
    POP is the item that was pushed last, which then follows.

    Attributes:
      length: tokens; what is left after the last whole operation is blank.
      stacks: number of stacks.
      vocab_size: of everything: blank, PUSH, POP, names of stacks, items.
    """

    length: int
    stacks: int = 64
    vocab_size: int = 2048
    kinds: ClassVar[tuple[str, ...]] = ("all",)

    def __post_init__(self):
        require("length", self.length >= 6, "at least 6", self.length)
        require("stacks", self.stacks >= 1, "at least 1", self.stacks)
        require(
            "vocab_size", self.vocab_size > 3 + self.stacks, "more than stacks", self.vocab_size
        )

    @property
    def questions(self) -> int:
        """Pops at most."""
        return self.length // 6

    def example(self, key: Array) -> Example:
        """Draws a sequence."""
        count, first_item = self.length // 3, 3 + self.stacks
        stack, pop, item = jax.random.split(key, 3)
        stacks = jax.random.randint(stack, (count,), 0, self.stacks)
        wants_pop = jax.random.bernoulli(pop, 0.5, (count,))
        items = jax.random.randint(item, (count,), first_item, self.vocab_size)

        # A push is its number; `below` is the push under it, so the stacks are linked lists.
        def operate(carry, operation):
            tops, below = carry
            number, stack, wants_pop = operation
            top = tops[stack]
            pops = wants_pop & (top >= 0)
            tops = tops.at[stack].set(jnp.where(pops, below[top], number))
            return (tops, below.at[number].set(top)), (pops, jnp.where(pops, top, number))

        empty = jnp.full(self.stacks, -1), jnp.full(count, -1)
        numbers = jnp.arange(count)
        _, (pops, pushed) = jax.lax.scan(operate, empty, (numbers, stacks, wants_pop))
        items = items[pushed]
        tokens = jnp.stack([1 + pops, 3 + stacks, items], axis=1).reshape(-1)
        targets = jnp.zeros((count, 3), jnp.int32).at[:, 1].set(jnp.where(pops, items, 0))
        kinds = jnp.zeros((count, 3), jnp.int32).at[:, 1].set(pops)
        return Example(*(_pad(x.reshape(-1), self.length) for x in (tokens, targets, kinds)))


_NOISE = 24
"""Tokens of the sentences that the noise haystack repeats."""
_DIGITS = {"number": (10, 7), "uuid": (16, 32)}
"""Different digits of a value, and its digits."""
_ADJECTIVES = _NOUNS = 64


@dataclasses.dataclass(frozen=True)
class Needles:
    """RULER's S-NIAH-1, 2, 3 and MK-NIAH-1 in token form: sentences in a haystack, one asked for.

        ... haystack ... IS-THE adjective noun v1 ... vn STOP ... haystack ... ASK adjective noun v1 ... v(n-1)

    A key is an adjective and a noun; the needles of a sequence have different keys. Values are n
    digits. The target at the question's noun is v1, at v1 it is v2, and so on: all right under
    teacher forcing is what greedy decoding needs to find the value. The haystack is noise, the same
    sentences again and again, or words drawn by Zipf's law; needles stand anywhere between its
    tokens (between whole rounds of the noise).

    Attributes:
      length: tokens.
      needles: in the haystack; the question asks for one.
      haystack: "noise" (S-NIAH-1) or "words".
      value: "number" (7 of 10 digits) or "uuid" (32 of 16, S-NIAH-3).
      words: size of the haystack's vocabulary, of at least 24.
    """

    length: int
    needles: int = 1
    haystack: Literal["noise", "words"] = "words"
    value: Literal["number", "uuid"] = "number"
    words: int = 512
    kinds: ClassVar[tuple[str, ...]] = ("all",)

    def __post_init__(self):
        require("needles", self.needles >= 1, "at least 1", self.needles)
        require("haystack", self.haystack in ("noise", "words"), "noise or words", self.haystack)
        require("value", self.value in _DIGITS, f"one of {tuple(_DIGITS)}", self.value)
        require("words", self.words >= _NOISE, f"at least {_NOISE}", self.words)
        rounds = _NOISE * (self.needles if self.haystack == "noise" else 1)
        needed = self.length - self._hay + rounds
        require("length", self.length >= needed, f"at least {needed}", self.length)

    @property
    def questions(self) -> int:
        """Digits of the value."""
        return _DIGITS[self.value][1]

    @property
    def vocab_size(self) -> int:
        """Three marks, digits, adjectives, nouns, words."""
        return 3 + 16 + _ADJECTIVES + _NOUNS + self.words

    @property
    def _hay(self) -> int:
        return self.length - self.needles * (self.questions + 4) - (self.questions + 2)

    def example(self, key: Array) -> Example:
        """Draws a sequence."""
        key, digit, depth, hay, asked = jax.random.split(key, 5)
        is_the, stop, ask = range(3)
        first_adjective = 3 + 16
        first_noun = first_adjective + _ADJECTIVES
        first_word = first_noun + _NOUNS
        keys = _different(key, _ADJECTIVES * _NOUNS, self.needles)
        names = [first_adjective + keys // _NOUNS, first_noun + keys % _NOUNS]
        base, count = _DIGITS[self.value]
        values = jax.random.randint(digit, (self.needles, count), 3, 3 + base)

        mark = jnp.full_like(keys, is_the)
        needles = jnp.stack([mark, *names, *values.T, jnp.full_like(keys, stop)], axis=1)
        if self.haystack == "noise":
            straw = first_word + jnp.arange(self._hay) % _NOISE
            places = _NOISE * _different(depth, self._hay // _NOISE, self.needles)
        else:
            # Zipf: the logarithm of the rank is uniform.
            uniform = jax.random.uniform(hay, (self._hay,))
            rank = jnp.exp(uniform * math.log(self.words + 1)).astype(jnp.int32) - 1
            straw = first_word + jnp.clip(rank, 0, self.words - 1)
            places = _different(depth, self._hay, self.needles)
        # A stable sort by place puts each needle, in one piece, before the straw of its place.
        where = jnp.concatenate([jnp.repeat(places, needles.shape[1]), jnp.arange(self._hay)])
        context = jnp.concatenate([needles.reshape(-1), straw])[jnp.argsort(where, stable=True)]

        one = jax.random.randint(asked, (), 0, self.needles)
        question = jnp.stack([ask, names[0][one], names[1][one]])
        tokens = jnp.concatenate([context, question, values[one, :-1]])
        before = (self.length - count, 0)
        return Example(tokens, jnp.pad(values[one], before), jnp.pad(jnp.ones(count, int), before))


@dataclasses.dataclass(frozen=True)
class GroupWord:
    """State tracking: the target at every element is the product of all elements so far.

    Elements are drawn uniformly. Token i is the i-th permutation in lexicographic order, 0 is the
    identity; the product applies the first element first.

    Attributes:
      length: tokens.
      group: "parity" (two elements: bits, whose sum is tracked), "s3" (6) or "s5" (120).
    """

    length: int
    group: Literal["parity", "s3", "s5"] = "parity"
    kinds: ClassVar[tuple[str, ...]] = ("all",)

    def __post_init__(self):
        require("length", self.length >= 1, "at least 1", self.length)
        require("group", self.group in _POINTS, f"one of {tuple(_POINTS)}", self.group)

    @property
    def questions(self) -> int:
        """All tokens."""
        return self.length

    @property
    def vocab_size(self) -> int:
        """Elements."""
        return math.factorial(_POINTS[self.group])

    def example(self, key: Array) -> Example:
        """Draws a sequence."""
        tokens = jax.random.randint(key, (self.length,), 0, self.vocab_size)
        table = jnp.asarray(multiplication_table(_POINTS[self.group]))
        targets = jax.lax.associative_scan(lambda first, second: table[first, second], tokens)
        return Example(tokens, targets, jnp.ones(self.length, jnp.int32))


_POINTS = {"parity": 2, "s3": 3, "s5": 5}


@functools.cache
def multiplication_table(points: int) -> np.ndarray:
    """[n!, n!] int32: the number of the permutation that applies the row's, then the column's."""
    permutations = list(itertools.permutations(range(points)))
    number = {permutation: i for i, permutation in enumerate(permutations)}
    rows = [
        [number[tuple(second[x] for x in first)] for second in permutations]
        for first in permutations
    ]
    return np.array(rows, np.int32)


TASKS: dict[str, type[Task]] = {
    "mqar": Mqar,
    "zoology_mqar": ZoologyMqar,
    "reassigned": Reassigned,
    "palindrome": Palindrome,
    "stack": Stack,
    "needles": Needles,
    "group_word": GroupWord,
}
"""The tasks by name."""


def _different(key: Array, among: int, count: int) -> Int[Array, "{count}"]:
    """`count` different numbers below `among`, in random order."""
    return jax.random.permutation(key, among)[:count]


def _interleave(first: Array, second: Array) -> Array:
    return jnp.stack([first, second], axis=1).reshape(-1)


def _pad(x: Array, length: int) -> Int[Array, "{length}"]:
    return jnp.pad(x, (0, length - x.shape[0])).astype(jnp.int32)


def _ask(context, queries, targets, kind, length) -> Example:
    """The context, a separator and the queries; the targets are the last tokens', then blanks."""
    tokens = jnp.concatenate([*context, jnp.array([_SEPARATOR]), queries])
    start = tokens.shape[0] - targets.shape[0]
    kinds = jnp.broadcast_to(kind, targets.shape)
    targets, kinds = (jnp.pad(x, (start, 0)) for x in (targets, kinds))
    return Example(*(_pad(x, length) for x in (tokens, targets, kinds)))
