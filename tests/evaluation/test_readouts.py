"""Read-outs of language models, against what they are made of."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.data.packing import PackedSequences
from gdn2_jax.data.store import StoreWriter, TokenStore
from gdn2_jax.evaluation import readouts
from gdn2_jax.layers.delta_rule_layer import DeltaRuleLayer
from gdn2_jax.models import PRESETS, DeltaRule, LanguageModel

CONFIG = dataclasses.replace(
    PRESETS["gdn2_tiny"],
    vocab_size=40,
    d_model=16,
    num_layers=2,
    mixer=DeltaRule(num_heads=2, head_dim=8),
    mlp_dim=16,
)
END = 39


@pytest.fixture(scope="module")
def params(random_params):
    model = LanguageModel(dataclasses.replace(CONFIG, implementation="recurrent"))
    return random_params(model, jnp.zeros((1, 1), jnp.int32))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    writer = StoreWriter(directory, "text", 40, END)
    random = np.random.default_rng(0)
    for length in (10, 40, 70, 5, 64, 90, 66):
        writer.append(random.integers(0, 38, length), length)
    writer.close()
    return TokenStore(directory, "text")


def test_token_results_are_those_of_the_logits(params):
    tokens = np.random.default_rng(1).integers(0, 40, (2, 33))
    losses, hits = readouts.token_results(CONFIG, params, tokens[:, :-1], tokens[:, 1:])
    logits = np.asarray(jax.jit(LanguageModel(CONFIG).apply)({"params": params}, tokens[:, :-1]))
    normalizer = np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
    expected = np.take_along_axis(normalizer - logits, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    np.testing.assert_array_equal(hits, np.argmax(logits, -1) == tokens[:, 1:])


def test_losses_by_position_are_of_the_starts_of_long_documents(params, store, monkeypatch):
    read = []

    def results(config, params, inputs, targets):
        read.append(inputs)
        return np.tile(np.arange(32.0), (len(inputs), 1)), None

    monkeypatch.setattr(readouts, "token_results", results)
    measured = readouts.loss_by_position(CONFIG, params, store, length=32, bins=4, batch_size=2)
    assert measured == ([8, 16, 24, 32], [3.5, 11.5, 19.5, 27.5], 5, True)
    starts = np.flatnonzero(np.diff(store.offsets) > 32)
    np.testing.assert_array_equal(
        np.concatenate(read)[:5], [store.tokens[store.offsets[i] :][:32] for i in starts]
    )
    # Where documents are shorter, they follow each other.
    assert readouts.loss_by_position(CONFIG, params, store, length=32 * 4, bins=4)[2:] == (2, False)


def test_pairs_are_counted_in_the_training_text(store):
    pairs, counts = readouts.count_in_training(store, store, 40)
    tokens = store.tokens.astype(int)
    numbers = tokens[:-1] * 40 + tokens[1:]
    assert pairs.tolist() == sorted(set(numbers))
    assert counts.tolist() == [int((numbers == pair).sum()) for pair in pairs]


def test_only_later_occurrences_occurred_before():
    numbers = np.array([[5, 6, 5, 5], [6, 6, 7, 5]])
    before = [[False, False, True, True], [False, True, False, False]]
    assert readouts.occurred_before(numbers).tolist() == before


def test_recall_is_the_share_of_right_guesses_at_repeated_rare_pairs(params, store, monkeypatch):
    sequences = PackedSequences(store, 50)
    pairs, counts = readouts.count_in_training(store, store, 40)

    def results(config, params, inputs, targets):
        """Right where the pair of tokens occurred before."""
        numbers = np.concatenate([inputs, targets[:, -1:]], 1).astype(int)
        return None, readouts.occurred_before(numbers[:, :-1] * 40 + numbers[:, 1:])

    monkeypatch.setattr(readouts, "token_results", results)
    options = {"pairs": pairs, "counts": counts, "batch_size": len(sequences)}
    recall = readouts.rare_recall(CONFIG, params, sequences, rare=10**9, **options)
    assert (recall.second, recall.first) == (1, 0)
    assert recall.second_count + recall.first_count == 50 * len(sequences)
    assert 0 < recall.second_count
    once = readouts.rare_recall(CONFIG, params, sequences, rare=2, **options)
    assert once.second_count == 0 < once.first_count < recall.first_count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"allow_negative_eigenvalues": True, "erase_gate": "scalar"},
        {"allow_negative_eigenvalues": True, "write_gate": "tied"},
    ],
)
def test_gates_are_those_that_the_operator_receives(params, changes, monkeypatch):
    """The layer's own gates, seen where it hands them to the operator."""
    mixer = dataclasses.replace(CONFIG.mixer, **changes)
    config = dataclasses.replace(CONFIG, mixer=mixer)
    tokens = jax.random.randint(jax.random.key(2), (2, 24), 0, 40)
    mix = DeltaRuleLayer._mix

    def spy(self, q, k, v, g, b, w, *rest):
        self.sow("intermediates", "gates", (b, w, jnp.exp(g)))
        return mix(self, q, k, v, g, b, w, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(DeltaRuleLayer, "_mix", spy)
        options = {"head": False, "mutable": ["intermediates"]}
        apply = jax.jit(functools.partial(LanguageModel(config).apply, **options))
        _, variables = apply({"params": params}, tokens)
    (seen,) = variables["intermediates"]["layers"]["block"]["mixer"]["gates"]
    statistics = readouts.gate_statistics(config, params, tokens, bins=10)
    top = 2 if config.mixer.allow_negative_eigenvalues else 1
    for layer, gates in enumerate(zip(*seen, strict=True)):
        names = zip(("erase", "write", "keep"), gates, (top, 1, 1), strict=True)
        for name, gate, upper in names:
            expected = np.histogram(gate, 10, (0, upper))[0] / gate.size
            np.testing.assert_allclose(getattr(statistics, name)[layer], expected, atol=2e-3)
        b, w = (np.float64(x).mean(-1).reshape(48, -1) for x in gates[:2])  # tokens, heads
        np.testing.assert_allclose(statistics.difference[layer], np.abs(b - w).mean(), rtol=1e-3)
        heads = [np.corrcoef(b[:, h], w[:, h])[0, 1] for h in range(b.shape[1])]
        np.testing.assert_allclose(statistics.correlation[layer], np.mean(heads), atol=2e-3)
    assert len(statistics.keep) == 2


def test_gates_of_another_mixer_are_refused(params):
    config = dataclasses.replace(CONFIG, mixer=DeltaRule(kind="kda"))
    with pytest.raises(ValueError, match="mixer: expected gdn2, got kda"):
        readouts.gate_statistics(config, params, np.zeros((1, 8), np.int32))
