import dataclasses
import json
import math
import signal
import threading
import time

import pytest

from gdn2_jax.training import (
    DivergenceError,
    OptimizerConfig,
    StoppedError,
    load_trained,
    open_run,
    run_files,
    train,
)
from gdn2_jax.training.metrics import read_metrics


def test_loss_falls_and_is_logged_with_all_that_belongs_to_it(config, finished):
    rows = read_metrics(run_files(finished).metrics)
    training, validation = rows[:-1], rows[-1]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(
        row.keys()
        == {
            *("step", "time", "tokens", "epoch", "loss", "mean_loss", "learning_rate", "grad_norm"),
            "tokens_per_second",
        }
        for row in training
    )
    assert all(row["mean_loss"] == row["loss"] for row in training)  # Every step is logged.
    now = time.time()
    assert now - 1000 < training[0]["time"] <= training[-1]["time"] <= validation["time"] <= now
    assert training[-1]["epoch"] == 8 * training[0]["epoch"] and 0 < training[0]["epoch"] < 1
    assert [row["tokens"] for row in training] == [8 * 32 * step for step in range(1, 9)]
    # ln 257 and half the variance of the logits, 1/3 for a normed input and this initialisation.
    assert abs(training[0]["loss"] - (math.log(257) + 1 / 6)) < 1 / 6
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert validation["step"] == 8
    assert abs(validation["validation_loss"] - training[-1]["loss"]) < 0.5
    assert validation["validation_tokens"] == 2 * 8 * 32


def test_finished_run_leaves_all_its_files(finished):
    files = run_files(finished)
    assert all(path.exists() for path in files)
    summary = json.loads(files.summary.read_text())
    assert summary["step"] == 8 and summary["loss"] < summary["first_loss"]
    assert files.sample.read_text()


def test_a_run_that_lost_lines_of_its_metrics_is_finished_all_the_same(config, copy):
    config, files = dataclasses.replace(config, sample_tokens=0), run_files(copy)
    lines = files.metrics.read_text().splitlines(keepends=True)
    for kept in ("".join(lines[:3]), ""):
        files.metrics.write_text(kept)
        files.summary.unlink()
        train(open_run(config, copy))
        summary = json.loads(files.summary.read_text())
        assert summary["step"] == 8 and ("first_loss" in summary) == bool(kept)


@pytest.mark.slow
def test_finished_run_says_so_and_more_steps_continue_it(config, copy, capsys, monkeypatch):
    files = run_files(copy)
    before = files.metrics.read_text()
    assert train(open_run(config, copy))
    assert "is finished at step 8" in capsys.readouterr().out
    assert files.metrics.read_text() == before

    # What goes on is not made anew, nor is the program for it compiled.
    monkeypatch.delattr("gdn2_jax.training.programs.jit_initial_state")
    assert train(open_run(dataclasses.replace(config, steps=10), copy))
    assert "continuing from the checkpoint of step 8" in capsys.readouterr().out
    assert files.metrics.read_text().startswith(before)
    assert load_trained(copy).step == 10


@pytest.mark.slow
def test_diverged_run_stops_and_keeps_the_last_good_checkpoint(config, tmp_path):
    """The first update is so large that the second loss is not finite."""
    optimizer = OptimizerConfig(learning_rate=1e38, warmup=0)
    config = dataclasses.replace(config, optimizer=optimizer, checkpoint_every=1)
    with pytest.raises(DivergenceError, match=r"diverged: loss .* at step 2\. .* step 1"):
        train(open_run(config, tmp_path))
    assert [row["step"] for row in read_metrics(run_files(tmp_path).metrics)] == [1]
    assert load_trained(tmp_path).step == 1


def test_run_in_a_thread_trains_and_a_signal_stops_the_one_in_the_main_thread(
    config, programs, copy
):
    """With the checkpoint of its last step."""
    config = dataclasses.replace(config, steps=100_000, sample_tokens=0)
    states = []

    def train_briefly():
        states.append(train(open_run(dataclasses.replace(config, steps=9), copy), programs))

    thread = threading.Thread(target=train_briefly)
    thread.start()
    thread.join()
    assert int(states[0].step) == 9

    def stop_soon():
        while read_metrics(run_files(copy).metrics)[-1]["step"] < 20:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=stop_soon)
    thread.start()
    with pytest.raises(StoppedError, match="stopped after step .* with a checkpoint") as stop:
        train(open_run(config, copy), programs)
    thread.join()
    assert stop.value.signal == signal.SIGTERM
    assert load_trained(copy).step == read_metrics(run_files(copy).metrics)[-1]["step"]
