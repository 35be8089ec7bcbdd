"""Scripts as functions, and a run for those that need one."""

import functools
import importlib

from gdn2_jax.command import read_options

import jax
import numpy as np
import pytest

from gdn2_jax.data.tokenizer import ByteTokenizer
from gdn2_jax.models import LanguageModel
from gdn2_jax.training import TrainingConfig, run_files
from gdn2_jax.training.checkpoint import open_checkpoints, save_checkpoint
from gdn2_jax.training.config_file import save_config
from gdn2_jax.training.step import initial_state


@pytest.fixture
def command(capsys):
    """A function of a script and its arguments: its exit status or message, output and errors."""

    def call(name, *arguments):
        module = importlib.import_module(name.removesuffix(".py"))
        status = module.main(read_options(module.Options, list(map(str, arguments))))
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def run(tmp_path_factory, hybrid_config, random_params):
    """A run's directory, as train.py leaves it before the first step, and its parameters."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    config = TrainingConfig(model=hybrid_config, steps=1, global_batch_size=8)
    state = jax.eval_shape(functools.partial(initial_state, config))
    params = random_params(LanguageModel(hybrid_config), np.zeros((1, 1), np.int32))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    state = jax.device_put(zeros._replace(params=params))
    files = run_files(directory)
    checkpoints = open_checkpoints(files.checkpoints, 1)
    save_checkpoint(checkpoints, state, {})
    checkpoints.close()
    save_config(config, files.config)
    ByteTokenizer().save(files.tokenizer)
    return directory, state.params
