import shutil

import pytest

from gdn2_jax.data import DataConfig
from gdn2_jax.models import DeltaRule, ModelConfig
from gdn2_jax.parallel import make_mesh
from gdn2_jax.training import OptimizerConfig, TrainingConfig, open_run, train
from gdn2_jax.training.programs import compile_programs


@pytest.fixture(scope="session")
def config(word_texts):
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
            paths=(str(word_texts),),
            sequence_length=32,
            cache_directory=str(word_texts.with_name("cache")),
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
def programs(config):
    """Compiled for runs of `config`, of any number of steps."""
    return compile_programs(config, make_mesh(config.mesh))


@pytest.fixture(scope="session")
def finished(config, programs, tmp_path_factory):
    """The directory of a run of `config` that has reached its last step."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    assert train(open_run(config, directory), programs)
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that directory, to be altered."""
    return shutil.copytree(finished, tmp_path / "copy")
