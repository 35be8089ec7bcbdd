import dataclasses
import importlib
import json
from pathlib import Path

import jax
import pytest
from matplotlib.axes import Axes

from gdn2_jax.models import PRESETS as MODELS
from gdn2_jax.training import PRESETS, DivergenceError, StoppedError

SCRIPT = Path(__file__).parents[2] / "experiments" / "compare_mixers.py"


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("compare_mixers")


@pytest.fixture(scope="module")
def options(tmp_path_factory, word_texts):
    options = {
        "steps": 4,
        "global-batch-size": 8,
        "log-every": 2,
        "validate-every": 2,
        "validation-batches": 1,
        "sample-tokens": 0,
        "data.sequence-length": 32,
        "data.cache-directory": tmp_path_factory.mktemp("cache"),
        "model.d-model": 16,
        "model.num-layers": 2,
        "model.mixer.num-heads": 1,
        "model.mixer.head-dim": 8,
        "model.implementation": "recurrent",
    }
    return [*(f"--{name}={value}" for name, value in options.items()), "--data", str(word_texts)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_runs_are_trained_once_and_land_in_one_table_and_plot(script, options, tmp_path, capsys):
    arguments = ["tiny", *options, "--directory", str(tmp_path), "--models"]
    assert script.main([*arguments, "gdn2"]) == 0
    first = (tmp_path / "gdn2-0" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    results = tmp_path / "results"
    more = [*arguments, "gdn2", "attention", "--results", str(results)]
    assert script.main(more) == 0
    printed = capsys.readouterr().out
    assert "[1/2] gdn2-0" in printed and f"is finished in {tmp_path / 'gdn2-0'}" in printed
    assert "[2/2] attention-0" in printed
    assert (tmp_path / "gdn2-0" / "metrics.jsonl").read_bytes() == first
    assert {path.name for path in results.iterdir()} == {
        *("results.jsonl", "curves.jsonl", "results.md", "results.png")
    }

    rows = lines(results / "results.jsonl")
    assert [row["run"] for row in rows] == ["gdn2-0", "attention-0"]
    for row in rows:
        assert row["finished"] and row["tokens"] == 4 * 8 * 32
        assert row["bits_per_byte"] > 0 and row["tokens_per_second"] > 0
    assert [row["state"] for row in rows] == [64, 0]
    # Keys and values of 32 tokens.
    assert rows[1]["cache"] == 2 * 32 * 16
    curves = lines(results / "curves.jsonl")
    assert {row["run"] for row in curves if "validation_loss" in row} == {"gdn2-0", "attention-0"}
    table = (results / "results.md").read_text()
    assert "| gdn2-0 |" in table and "| attention-0 |" in table
    assert "python experiments/compare_mixers.py tiny" in table
    assert (results / "results.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_between_logged_steps_is_drawn_at_its_tokens(
    script, options, tmp_path, monkeypatch
):
    drawn, plot = {}, Axes.plot

    def recorded(axes, xs, ys, **style):
        drawn.setdefault(style["label"], []).append((list(xs), list(ys)))
        return plot(axes, xs, ys, **style)

    monkeypatch.setattr(Axes, "plot", recorded)
    metrics = [
        {"step": 1, "tokens": 50, "loss": 3.0, "tokens_per_second": 9.0},
        {"step": 7, "validation_loss": 2.0, "validation_bits_per_byte": 2.5},
        {"step": 10, "tokens": 500, "loss": 1.0, "tokens_per_second": 9.0},
    ]
    runs, *_ = script.parse(["tiny", *options, "--models", "gdn2", "--seeds", "0", "1"])
    rows, curves = [], []
    for name, config in runs.items():
        own = metrics if name == "gdn2-0" else []  # the other was stopped before its first step
        rows.append(script.summarize(name, config, own))
        curves += [{"run": name, **row} for row in own]
    script.write(tmp_path, rows, curves, [])
    assert drawn["gdn2-0"] == [([50, 500], [3.0, 1.0]), ([350], [2.5])]
    assert drawn["gdn2-1"] == [([], []), ([], [])]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_table_is_that_of_the_committed_rows(script):
    results = SCRIPT.parent / "results" / "mixers"
    table = script.table(lines(results / "results.jsonl"))
    assert table in (results / "results.md").read_text()


def test_runs_differ_in_model_and_seed_alone(script):
    runs, directory, results = script.parse(
        ["--models", "gdn2", "swa_kda", "--seeds", "3", "4", "--steps", "7"]
        + ["--model.dtype", "float32", "--model.mixer.conv-size", "3"]
    )
    assert directory == results == Path("runs/compare_30M")
    assert list(runs) == ["gdn2-3", "gdn2-4", "swa_kda-3", "swa_kda-4"]
    base = dataclasses.replace(PRESETS["gdn2_30M"], steps=7)
    for name, config in runs.items():
        model, seed = name.split("-")
        own = MODELS[f"{model}_30M"]
        mixer = dataclasses.replace(own.mixer, conv_size=3)
        expected = dataclasses.replace(own, dtype="float32", mixer=mixer)
        assert config == dataclasses.replace(base, model=expected, seed=int(seed))


def test_every_recurrent_mixer_and_the_transformer_are_compared_by_default(script):
    runs, *_ = script.parse(["tiny"])
    assert {config.model.mixer.kind for config in runs.values()} == {
        *("gdn2", "kda", "gdn", "deltanet", "mamba2", "mamba3", "attention")
    }
    assert runs["mamba3_mimo-0"].model.mixer.mimo_rank == 4


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (StoppedError(15, 3), "143"),
        (DivergenceError("it has diverged"), "0"),
        (jax.errors.JaxRuntimeError("no memory"), "compare_mixers.py: failed: gdn2-0, kda-0"),
    ],
)
def test_a_stopped_run_ends_the_comparison_and_one_that_cannot_go_on_does_not(
    script, options, outcome, status, tmp_path, monkeypatch, capsys
):
    def train(run, programs):
        assert programs is None
        raise outcome

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "submit_programs", lambda config, mesh, pool: None)
    models = ["--models", "gdn2", "kda"]
    result = script.main(["tiny", *options, "--directory", str(tmp_path), *models])
    assert str(result).startswith(status)
    stopped = isinstance(outcome, StoppedError)
    assert ("kda-0" in capsys.readouterr().out) == (not stopped)
    # What a stopped run has reached is in the table, too.
    rows = lines(tmp_path / "results.jsonl")
    assert [row["finished"] for row in rows] == ([False] if stopped else [False, False])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "expected a scale, one of tiny, 30M, 100M, 305M, 1.3B, got 'huge'"),
        (["--models", "gdn3"], "models: expected some of gdn2, kda"),
        (["--model.mixer", "kda"], "--models chooses them"),
        (["--data", "/nonexistent", "--models", "gdn2"], "that exists, got /nonexistent"),
        (["--models"], "models, seeds: expected at least one of each"),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_one_clear_message(
    script, arguments, message, tmp_path
):
    assert message in script.main([*arguments, "--directory", str(tmp_path)])
