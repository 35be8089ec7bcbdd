"""Scores and continuations of many sequences, against the model on each one alone."""

import jax
import numpy as np
import pytest

from gdn2_jax.data import load_tokenizer
from gdn2_jax.evaluation import continue_prompts, on_local_devices, readouts, score_tokens
from gdn2_jax.models import LanguageModel

BYTES = load_tokenizer("bytes")
LENGTHS = (2, 70, 9, 65, 66)


@pytest.fixture(scope="module")
def model(hybrid):
    return on_local_devices(*hybrid, jax.local_devices()[:2])


@pytest.fixture(scope="module")
def sequences():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def logits_of(hybrid):
    """A function of a sequence: the logits after each token."""
    config, params = hybrid
    apply = jax.jit(LanguageModel(config).apply)

    def run(sequence):
        # One shape for all; no token sees the padding after it.
        padded = np.pad(sequence, (0, 72 - len(sequence)))
        logits = np.asarray(apply({"params": params}, padded[None]), np.float64)
        return logits[0, : len(sequence)]

    return run


def test_scores_are_those_of_each_sequence_alone(logits_of, model, sequences):
    counts = [1, 69, 0, 64, 7]
    scores = score_tokens(model, sequences, counts, batch_size=2)
    for sequence, count, score in zip(sequences, counts, scores, strict=True):
        logits = logits_of(sequence)[:-1]
        losses = np.log(np.exp(logits).sum(-1)) - logits[range(len(logits)), sequence[1:]]
        hits = logits.argmax(-1) == sequence[1:]
        first = len(logits) - count
        np.testing.assert_allclose(score.losses, losses[first:], rtol=1e-5)
        np.testing.assert_array_equal(score.hits, hits[first:])


def test_scores_do_not_depend_on_batch_size_or_devices(hybrid, model, sequences):
    counts = [len(sequence) - 1 for sequence in sequences]
    one = on_local_devices(*hybrid, jax.local_devices()[:1])
    expected = score_tokens(one, sequences, counts, batch_size=1)
    for there, here in zip(expected, score_tokens(model, sequences, counts, batch_size=3)):
        np.testing.assert_allclose(there.losses, here.losses, rtol=1e-5)
        np.testing.assert_array_equal(there.hits, here.hits)


def test_a_program_is_compiled_for_each_power_of_two(hybrid, sequences):
    readouts.token_results.clear_cache()
    one = on_local_devices(*hybrid, jax.local_devices()[:1])
    for lengths in ((3, 40, 65), (66, 90, 128, 5)):
        score_tokens(one, [[0] * n for n in lengths], [1] * len(lengths), batch_size=2)
    assert readouts.token_results._cache_size() == 2


def test_continuations_are_those_of_each_prompt_alone(logits_of, model):
    prompts = [list(text.encode()) for text in ("a", "a longer one", "b", "x" * 15, "yz")]
    texts = continue_prompts(model, BYTES, prompts, max_new_tokens=6, batch_size=2)
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = [*prompt]
        while len(tokens) < len(prompt) + 6 and (token := logits_of(tokens)[-1].argmax()) != 256:
            tokens.append(int(token))
        assert text == BYTES.decode(tokens[len(prompt) :])


def test_scoring_the_first_token_is_refused(model):
    with pytest.raises(ValueError, match="^counts: expected fewer than the 2 tokens .* got 2"):
        score_tokens(model, [[1, 2]], [2], batch_size=1)
