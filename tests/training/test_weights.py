import dataclasses

import jax
import numpy as np
import pytest

from gdn2_jax.interop.pytorch import save_pretrained
from gdn2_jax.parallel import make_mesh
from gdn2_jax.training import load_trained, open_run, open_weights, run_files, train
from gdn2_jax.training.metrics import read_metrics
from gdn2_jax.training.weights import place_weights


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_weights_of_a_run_one_of_its_checkpoints_and_pytorch_are_those_saved(
    config, finished, tmp_path
):
    trained = load_trained(finished)
    save_pretrained(tmp_path / "fla", config.model, trained.params)
    for path in (finished, finished / "checkpoints" / "8", tmp_path / "fla"):
        weights = open_weights(path)
        assert weights.tokenizer == "bytes" and weights.model.d_model == 16
        assert_same(weights.load(), trained.params)
    assert_same(
        open_weights(finished / "checkpoints" / "4").load(), load_trained(finished, 4).params
    )
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 5, but"):
        open_weights(finished / "checkpoints" / "5").load()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_weights(tmp_path / "nowhere")


def test_a_run_starts_from_weights_and_goes_on_without_reading_them_again(
    config, finished, tmp_path
):
    losses = [row["loss"] for row in read_metrics(run_files(finished).metrics) if "loss" in row]
    config = dataclasses.replace(config, init_from=str(finished), steps=2, sample_tokens=0)
    state = train(open_run(config, tmp_path / "new"))
    first, *_ = read_metrics(run_files(tmp_path / "new").metrics)
    assert first["step"] == 1 and first["loss"] < losses[0] - 0.5
    config = dataclasses.replace(config, steps=3)
    run = open_run(config, tmp_path / "new")
    assert_same(run.state.params, state.params)
    run.close()


def test_weights_of_another_model_are_refused_by_name(config, finished):
    model = dataclasses.replace(config.model, mlp_dim=48)
    config = dataclasses.replace(config, model=model, init_from=str(finished))
    with pytest.raises(ValueError, match=r"init_from: expected .* with .*mlp.* 48.*, got .* 32"):
        place_weights(config, make_mesh())


def test_weights_get_the_dtype_and_the_places_of_the_run(config, finished):
    model = dataclasses.replace(config.model, param_dtype="bfloat16")
    params = place_weights(
        dataclasses.replace(config, model=model, init_from=str(finished)), make_mesh()
    )
    kernel = params["lm_head"]["kernel"]
    assert kernel.dtype == "bfloat16" and len(kernel.devices()) == 8
