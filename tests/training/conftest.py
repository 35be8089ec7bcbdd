import random
import shutil

import pytest

from gdn2_jax.data import DataConfig
from gdn2_jax.models import DeltaRule, ModelConfig
from gdn2_jax.training import OptimizerConfig, TrainingConfig


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory):
    """Twenty documents of words in random order."""
    directory = tmp_path_factory.mktemp("text")
    words = [
        "the",
        "a",
        "red",
        "blue",
        "green",
        "cat",
        "dog",
        "bird",
        "sits",
        "runs",
        "flies",
        "on",
        "under",
        "over",
        "mat",
        "tree",
    ]
    draw = random.Random(0)
    for i in range(20):
        (directory / f"{i}.txt").write_text(" ".join(draw.choices(words, k=400)))
    return directory


@pytest.fixture(scope="session")
def config(corpus_directory):
    """The smallest run that has every part; the recurrence compiles fastest."""
    return TrainingConfig(
        model=ModelConfig(
            vocab_size=257,
            d_model=16,
            num_layers=1,
            mixer=DeltaRule(num_heads=1, head_dim=16),
            mlp_dim=32,
            dtype="float32",
            implementation="recurrent",
        ),
        data=DataConfig(
            paths=(str(corpus_directory),),
            sequence_length=32,
            cache_directory=str(corpus_directory.with_name("cache")),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        steps=8,
        global_batch_size=8,
        log_every=1,
        validate_every=8,
        validation_batches=2,
        checkpoint_every=4,
        sample_tokens=4,
    )


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    """The directory of a run of `config` that has reached its last step."""
    from gdn2_jax.training import open_run, train

    directory = tmp_path_factory.mktemp("runs") / "finished"
    assert train(open_run(config, directory))
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that directory, to be altered."""
    return shutil.copytree(finished, tmp_path / "copy")
