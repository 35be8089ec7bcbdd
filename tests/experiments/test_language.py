"""The comparison of language models: what is run when, what is read out, and what is drawn."""

import dataclasses
import importlib
import json
import time
import types

import numpy as np
import pytest

from gdn2_jax.data import DataConfig
from gdn2_jax.models import model_sizes, with_parameters_of
from gdn2_jax.rows import append_row
from gdn2_jax.workers import Message, Worker


def load(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def script():
    return load("language")


@pytest.fixture
def study(script):
    return script.Study(
        scale="tiny",
        models=("gdn2", "kda"),
        learning_rates=(1e-3, 2e-3),
        seeds=(0, 1),
        tokens=2**20,
    )


DATA = DataConfig()


def rows_of(script, runs):
    """Finished runs; GDN-2 is best at 2e-3, KDA at 1e-3, where one seed diverges."""
    rows = []
    for run in runs:
        rate, seed = run.config.optimizer.learning_rate, run.config.seed
        loss = 1.4 + (rate - 2e-3) ** 2 if run.model == "gdn2" else 1.5 + rate + 0.01 * seed
        diverged = run.model == "kda" and rate == 2e-3
        row = {
            "run": run.key,
            "model": run.model,
            "phase": run.phase,
            "learning_rate": rate,
            "seed": seed,
            "bits_per_byte": None if diverged else loss,
            "tokens": 12_000,
            "tokens_per_second": 100,
            "device": "NVIDIA H200",
            "commit": "ef93f31",
            "parameters": 10,
            "state": 0,
        }
        if run.phase == "final":
            losses = [3.0] * 4 + [2.5] * 28
            row["recall"] = {"second": 0.5, "first": 0.1}
            row["position"] = {"ends": list(range(1, 33)), "losses": losses}
        if run.phase == "final" and run.model == "gdn2":
            histogram = [[0.5, 0.5]] * 3
            row["gates"] = {"erase": histogram, "write": histogram, "keep": histogram}
        rows.append(row)
    return rows


def test_every_study_names_models_and_fields_that_exist(script):
    for path in script.STUDIES.glob("*.toml"):
        study = script.read_study(script.Study, script.STUDIES, path.stem)
        for model in study.models:
            script.model_config(model, study.scale, 300)
        assert set(study.more_seeds) <= set(study.models)
    with pytest.raises(ValueError, match="study: expected one of .*mixers_30M.*, got 'mixer'"):
        script.read_study(script.Study, script.STUDIES, "mixer")
    with pytest.raises(ValueError, match="models: expected some of .*, got 'gdn3'"):
        script.model_config("gdn3", "tiny", 300)


def test_seeds_start_at_the_best_rate_of_full_runs(script, study):
    sweep = list(script.specs(study, DATA, []))
    assert [run.phase for run in sweep] == ["sweep"] * 4
    # A quarter of the tokens, in the same order for all.
    assert {run.config.steps for run in sweep} == {4}
    assert {run.config.data.seed for run in sweep} == {0}

    def finals(rows):
        """The full runs that may be started or are done."""
        runs = [run for run in script.specs(study, DATA, rows) if run.phase == "final"]
        assert all(run.config.steps == 16 for run in runs)
        return [(r.model, r.config.optimizer.learning_rate, r.config.seed) for r in runs], runs

    # The sweep of KDA is not finished; GDN-2's best rate there is tried first, then the smaller one.
    rows = rows_of(script, sweep[:2])
    names, runs = finals(rows)
    assert names == [("gdn2", 2e-3, 0)]
    rows += rows_of(script, runs)
    names, runs = finals(rows)
    assert names == [("gdn2", 2e-3, 0), ("gdn2", 1e-3, 0)]
    # It is worse, so the other seed takes the larger one.
    rows += rows_of(script, runs[1:])
    assert finals(rows)[0][2:] == [("gdn2", 2e-3, 1)]
    # It is better, so the other seed takes it.
    rows[-1]["bits_per_byte"] = 1.0
    assert finals(rows)[0][2:] == [("gdn2", 1e-3, 1)]
    # One that diverged is not the best.
    rows += rows_of(script, sweep[2:])
    assert finals(rows)[0][3:] == [("kda", 1e-3, 0)]
    rows += rows_of(script, finals(rows)[1][3:])
    names, runs = finals(rows)
    assert names[3:] == [("kda", 1e-3, 0), ("kda", 1e-3, 1)]
    assert len({run.key for run in [*sweep, *runs]}) == 9


def test_a_sweep_without_seeds_takes_all_tokens(script, study):
    study = dataclasses.replace(study, seeds=(), sweep_seeds=(0, 1))
    runs = list(script.specs(study, DATA, []))
    assert len(runs) == 8 and {run.config.steps for run in runs} == {16}
    assert list(script.specs(study, DATA, rows_of(script, runs))) == runs


def test_a_variant_changes_its_gates_only(script):
    plain, scalar = (script.model_config(n, "tiny", 300) for n in ("gdn2", "gdn2_scalar_bw"))
    mixer = dataclasses.replace(plain.mixer, erase_gate="scalar", write_gate="scalar")
    assert scalar == dataclasses.replace(plain, mixer=mixer)
    assert script.model_config("gdn2_negative", "tiny", 300).mixer.allow_negative_eigenvalues


def test_tied_gates_keep_the_parameters_and_the_state(script):
    plain, tied = (
        model_sizes(script.model_config(n, "30M", 16384), 1024) for n in ("gdn2", "gdn2_tied")
    )
    assert tied.state == plain.state
    assert abs(tied.block_parameters / plain.block_parameters - 1) < 0.01
    without = dataclasses.replace(script.model_config("gdn2", "30M", 16384), mlp_dim=None)
    with pytest.raises(ValueError, match="^config: expected one with an MLP, got mlp_dim None"):
        with_parameters_of(without, without, 1, multiple=16)


def work(script, study, tmp_path, monkeypatch, run_one, seconds=float("inf")):
    """The study without processes; returns what failed and the rows."""

    def share(next_job, prepare, run, *, in_hand, **_):
        in_hands = []
        while True:
            while len(in_hands) < 2 * in_hand and (job := next_job()):
                in_hands.append(job)
            if not in_hands:
                return
            yield Message("progress", in_hands[0], "started")
            yield run_one(in_hands.pop(0))

    monkeypatch.setattr(script, "share", share)
    job = script.Job(tmp_path, study, "commit")
    deadline, whole_runs = time.time() + seconds, seconds < float("inf")
    failed = script.work(job, DATA, tmp_path / "rows.jsonl", ["", ""], deadline, whole_runs)
    return failed, script.finished_runs(tmp_path / "rows.jsonl")


def test_all_runs_are_done_once_and_those_that_failed_again(script, study, tmp_path, monkeypatch):
    done = []

    def run_one(run):
        done.append(run.key)
        if run.model == "kda" and run.phase == "final" and len(done) < 9:
            return Message("failed", run, "out of memory")
        return Message("done", run, rows_of(script, [run])[0])

    failed, rows = work(script, study, tmp_path, monkeypatch, run_one)
    assert len(done) == len(set(done)) == 8 and len(rows) == 7
    assert all("final" in text and ": out of memory; see " in text for text in failed)
    assert len(failed) == 1
    # A killed process leaves a part of a line.
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"run": "gdn')
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text() + "\n")
    failed, rows = work(script, study, tmp_path, monkeypatch, run_one)
    assert not failed and len(done) == 10 and len(rows) == 9


def test_whole_runs_are_those_that_end_in_time(script, study, tmp_path, monkeypatch):
    sweep = list(script.specs(study, DATA, []))
    rows = rows_of(script, sweep[:3])
    whole = script.expected_seconds(list(script.specs(study, DATA, rows))[2], rows)
    part = script.expected_seconds(sweep[3], rows)
    assert whole == pytest.approx(4 * part) and script.expected_seconds(sweep[3], []) == 0
    for row in rows:
        append_row(tmp_path / "rows.jsonl", row)

    def run_one(run):
        return Message("done", run, rows_of(script, [run])[0])

    _, rows = work(script, study, tmp_path, monkeypatch, run_one, seconds=(whole + part) / 2)
    assert [row["run"] for row in rows[3:]] == [sweep[3].key]
    _, rows = work(script, study, tmp_path, monkeypatch, run_one, seconds=1000 * whole)
    assert len(rows) == 9


def test_the_table_gives_means_and_spreads_in_order(script, study, tmp_path, capsys):
    rows = []
    while len(runs := list(script.specs(study, DATA, rows))) > len(rows):
        rows = rows_of(script, runs)
    path = tmp_path / "study.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script.show(path) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = (
        "| gdn2 | 0.002 (edge) | 2 | 1.4000 ± 0.0000 | -0.500 ± 0.000 | 0.500 ± 0.000 | 0.100"
    )
    assert lines[2].startswith(expected)
    assert (
        "minutes of training on NVIDIA H200; commits ef93f31; rows in `study.jsonl`." in lines[-1]
    )
    assert lines[3].startswith("| kda | 0.001 (edge) | 2 | 1.5060 ± 0.0071 |")
    assert {file.name for file in tmp_path.iterdir()} == {
        *("study.jsonl", "study.md", "study.png", "study_gates.png")
    }
    assert "expected rows, found none" in script.show(tmp_path / "none.jsonl")


def test_a_run_gives_a_line_with_all_readouts(script, tmp_path, monkeypatch):
    """With what training would return: GDN-2 at a tiny size, and the metrics of two steps."""
    import jax
    import jax.numpy as jnp

    from gdn2_jax.data import prepare
    from gdn2_jax.evaluation.readouts import count_in_training
    from gdn2_jax.models import MIXERS, LanguageModel

    text = tmp_path / "corpus.txt"
    text.write_text("\n\n".join(f"document {i}, {i * i} words" * 3 for i in range(99)))
    data = DataConfig(
        paths=(str(text),),
        document_separator="\n\n",
        validation_fraction=0.3,
        cache_directory=str(tmp_path / "cache"),
    )
    study = script.Study(
        scale="tiny",
        models=("gdn2",),
        learning_rates=(1e-3,),
        tokens=64,
        sequence_length=32,
        batch_size=1,
        windows=2,
    )
    mixer = dataclasses.replace(MIXERS["gdn2"], num_heads=2, head_dim=8)
    small = {"d_model": 16, "num_layers": 2, "mlp_dim": 16, "mixer": mixer}
    run = script.spec(study, data, "gdn2", "final", 1e-3, 0)
    model = dataclasses.replace(run.config.model, **small)
    run = run._replace(config=dataclasses.replace(run.config, model=model))
    corpus = prepare(run.config.data)
    pairs, counts = count_in_training(corpus.validation.store, corpus.train.store, 257)
    np.savez(tmp_path / "pairs.npz", pairs=pairs, counts=counts)

    def train(directory, programs):
        directory.mkdir()
        points = [{"tokens": 32 * (i + 1), "mean_loss": 5.0, "loss": 5.0} for i in range(2)]
        last = {"validation_loss": 4.0, "validation_bits_per_byte": 2.0}
        lines = [*({**p, "step": 1, "tokens_per_second": 9.0} for p in points), {"step": 2, **last}]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in lines))
        initial = LanguageModel(dataclasses.replace(model, implementation="recurrent")).init
        params = initial(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return types.SimpleNamespace(params=params)

    monkeypatch.setattr(script, "open_run", lambda config, directory: directory)
    monkeypatch.setattr(script, "train", train)
    worker = Worker(lambda message: None, lambda: False, 0.0)
    row = script.run_one(run, None, worker, script.Job(tmp_path, study, "commit"))
    row = json.loads(json.dumps(row))
    assert (row["bits_per_byte"], row["tokens_per_second"], row["tokens"]) == (2.0, 9, 64)
    assert row["position"]["ends"][-1] == 8 * 32 and len(row["position"]["losses"]) == 32
    assert row["position"]["losses"][0] == pytest.approx(np.log(257), rel=0.1)
    assert row["recall"]["second_count"] > 0
    assert [len(row["gates"][name]) for name in ("erase", "write", "keep")] == [2, 2, 2]
    assert not (tmp_path / run.key).exists()
