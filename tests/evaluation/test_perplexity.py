import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gdn2_jax.data import DataConfig, prepare
from gdn2_jax.evaluation import evaluate_perplexity, lower_evaluation
from gdn2_jax.evaluation.perplexity import _summed_losses
from gdn2_jax.models import Batch, LanguageModel
from gdn2_jax.parallel import batch_sharding, make_mesh, put_batch


@pytest.fixture(scope="module")
def config(hybrid):
    return hybrid[0]


@pytest.fixture(scope="module")
def params(hybrid):
    return hybrid[1]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """Sequences of which 8 devices leave a rest."""
    directory = tmp_path_factory.mktemp("text")
    text = np.random.default_rng(0).integers(97, 123, (40, 50), np.uint8)
    (directory / "text.txt").write_text("\n".join(bytes(row).decode() for row in text))
    data = DataConfig(
        paths=(str(directory),),
        document_separator="\n",
        sequence_length=15,
        validation_fraction=0.3,
        cache_directory=str(directory / "cache"),
    )
    return prepare(data).validation


def test_every_token_counts_once_and_padding_not_at_all(config, params, sequences):
    assert len(sequences) % 8
    rows = [sequences[i] for i in range(len(sequences))]
    inputs, targets = (np.stack(arrays) for arrays in zip(*(row[:2] for row in rows)))
    logits = LanguageModel(config).apply({"params": params}, inputs)
    picked = np.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    expected = -np.mean(np.asarray(picked), dtype=np.float64)

    result = evaluate_perplexity(config, params, sequences, mesh=make_mesh(), batch_size=8)
    assert result.tokens == targets.size
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_bits_are_per_byte_of_the_text_evaluated(config, params, sequences):
    result = evaluate_perplexity(config, params, sequences, mesh=make_mesh(), batch_size=8)
    targets = np.stack([sequences[i].targets for i in range(len(sequences))])
    assert 0 < (targets == 256).sum()
    expected = result.loss / math.log(2) * targets.size / (targets < 256).sum()
    assert result.bits_per_byte == pytest.approx(expected)


def test_max_batches_are_spread_over_the_whole_split(config, params, sequences):
    """Their bytes too: some of these sequences hold two ends of documents, some none."""
    mesh = make_mesh()
    n = len(sequences)
    chosen = [(2 * i + 1) * n // 16 for i in range(8)]
    assert n > 16 and chosen[0] > 0
    result = evaluate_perplexity(config, params, sequences, mesh=mesh, batch_size=8, max_batches=1)
    assert result.tokens == 8 * 15
    batch = jax.tree.map(lambda *rows: np.stack(rows), *(sequences[i] for i in chosen))
    targets = batch.targets
    expected, _ = _summed_losses(config, mesh, params, put_batch(mesh, batch))
    assert result.loss == pytest.approx(float(expected) / targets.size, rel=1e-6)
    bits = float(expected) / math.log(2) / (targets < 256).sum()
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-6)


def test_more_batches_than_there_are_evaluate_all(config, params, sequences):
    options = {"mesh": make_mesh(), "batch_size": 8}
    assert evaluate_perplexity(
        config, params, sequences, max_batches=99, **options
    ) == evaluate_perplexity(config, params, sequences, **options)


def test_what_is_compiled_ahead_is_all_that_an_evaluation_runs(
    config, params, sequences, monkeypatch
):
    mesh = make_mesh()
    expected = evaluate_perplexity(config, params, sequences, mesh=mesh, batch_size=8)
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(params, everywhere)
    batch = [
        jax.ShapeDtypeStruct((8, 15), dtype, sharding=batch_sharding(mesh))
        for dtype in ("int32", "int32", "float32")
    ]
    summed_losses = lower_evaluation(config, mesh, params, Batch(*batch)).compile()
    monkeypatch.delattr("gdn2_jax.evaluation.perplexity._summed_losses")
    result = evaluate_perplexity(
        config, params, sequences, mesh=mesh, batch_size=8, summed_losses=summed_losses
    )
    assert result == expected


def test_documents_are_kept_apart_where_the_sequences_say_so(config, params, sequences):
    apart = dataclasses.replace(sequences, reset_at_documents=True)
    losses = [
        evaluate_perplexity(config, params, part, mesh=make_mesh(), batch_size=8).loss
        for part in (sequences, apart)
    ]
    assert abs(losses[0] - losses[1]) > 1e-6
