"""Studies end to end on tiny shapes; GDN-2 must learn the easy setting of study 1."""

import dataclasses
import functools
import importlib
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.data.recall import Mqar, draw, draw_rows
from gdn2_jax.workers import Worker


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("recall")


@pytest.fixture(scope="module")
def tiny(script):
    """Two runs of two seeds with a test at twice the length; a window is two steps."""
    return dataclasses.replace(
        script.read_study("reassigned", steps=6),
        mixers=("gdn2",),
        lengths=(16,),
        learning_rates=(1e-3, 1e-2),
        seeds=(0, 1),
        tokens=32,
        window=2,
        test_lengths=(1, 2),
        task={"name": "reassigned", "pairs": 3, "updates": 1, "vocab_size": 16},
        model={"num_heads": 1, "head_dim": 8, "dtype": "float32", "implementation": "recurrent"},
    )


@pytest.fixture(scope="module")
def compiled(script, tiny):
    (cell,) = script.cells("reassigned", tiny, set())
    with ThreadPoolExecutor(2) as pool:
        return cell, script.compile_cell(cell, pool)


def run(script, compiled, directory, stopped=lambda: False):
    worker = Worker(lambda message: None, stopped, 0.0)
    return script.run_cell(*compiled, worker, script.Job(directory, "commit"))


def drawn(script, task, shortest, batch, count, seeds, start):
    """Training batches, drawn by one program."""
    draw = functools.partial(script.draw_batches, task, shortest, batch, count, 0)
    return jax.jit(draw)(seeds, jnp.int32(start))


class OptimisingPool(ThreadPoolExecutor):
    """Compiles with optimisation, which a thousand steps repay (see tests/conftest.py)."""

    def submit(self, compile_program):
        options = {"xla_backend_optimization_level": 1}
        return super().submit(compile_program, compiler_options=options)


TIMES = ("seconds", "tokens_per_second")


def test_gdn2_learns_the_easy_setting(script, tmp_path):
    (cell,) = script.cells("easy", script.read_study("easy", tokens=512), set())
    with OptimisingPool(2) as pool:
        (row,) = run(script, (cell, script.compile_cell(cell, pool)), tmp_path)
    assert row["accuracy"] > 0.95, row["curve"]
    assert row["steps_to_90"] <= row["steps"] <= row["all_steps"]


def test_a_stopped_cell_goes_on_where_it_was(script, compiled, tmp_path):
    whole = run(script, compiled, tmp_path / "whole")
    assert [row["finished"] for row in whole] == [True] * 4
    assert {(row["learning_rate"], row["seed"]) for row in whole} == {
        *((1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1))
    }
    answers = iter([False, True])
    parts = run(script, compiled, tmp_path, stopped=lambda: next(answers))
    assert [(row["finished"], row["steps"]) for row in parts] == [(False, 2)] * 4
    assert list((tmp_path / "checkpoints").iterdir())
    resumed = run(script, compiled, tmp_path)
    for row, expected in zip(resumed, whole, strict=True):
        assert {k: v for k, v in row.items() if k not in TIMES} == {
            k: v for k, v in expected.items() if k not in TIMES
        }
    assert not list((tmp_path / "checkpoints").iterdir())

    row = whole[0]
    assert row["curve"][-1] == list(row["accuracy_by_kind"].values())
    assert list(row["accuracy_by_kind"]) == ["untouched", "updated"]
    assert list(row["test"]) == ["1", "2"] and len(row["test"]["2"]["accuracy"]) == 2
    assert whole[0]["loss_curve"][0] == whole[1]["loss_curve"][0] or row["seed"] == 0


def test_one_program_of_many_runs_trains_each_as_if_alone(script, tiny, compiled, tmp_path):
    rows = run(script, compiled, tmp_path)
    alone = dataclasses.replace(tiny, learning_rates=(1e-2,), seeds=(1,), test_lengths=())
    (cell,) = script.cells("reassigned", alone, set())
    with ThreadPoolExecutor(2) as pool:
        (row,) = run(script, (cell, script.compile_cell(cell, pool)), tmp_path / "alone")
    (together,) = [r for r in rows if (r["learning_rate"], r["seed"]) == (1e-2, 1)]
    np.testing.assert_allclose(row["loss_curve"], together["loss_curve"], rtol=1e-4)


def test_no_batch_is_drawn_twice_and_batches_do_not_depend_on_the_window(script, tiny):
    task = script.cells("reassigned", tiny, set())[0].task()
    seeds = jnp.array([0, 1], jnp.uint32)
    first, later = (drawn(script, task, None, 2, 2, seeds, start) for start in (0, 1))
    np.testing.assert_array_equal(first.tokens[1], later.tokens[0])
    assert len(np.unique(np.asarray(first.tokens).reshape(8, -1), axis=0)) == 8
    assert first.segment_ids is None


def test_half_of_the_rows_hold_shorter_sequences_in_turn(script):
    task = Mqar(24, pairs=6, vocab_size=24)
    seeds = jnp.array([7], jnp.uint32)
    batches = drawn(script, task, 6, 3, 2, seeds, 4)
    tokens, segment_ids = batches.tokens[:, 0], batches.segment_ids[:, 0]
    whole = draw(task, 7, 0, jnp.array([12, 13, 15, 16]))
    np.testing.assert_array_equal(tokens[:, :2].reshape(4, 24), whole.tokens)
    for row, number, documents in ((0, 14, 2), (1, 17, 4)):
        part = draw_rows(task, documents, 7, 0, jnp.array([number]))
        np.testing.assert_array_equal(tokens[row, 2], part.tokens[0])
        np.testing.assert_array_equal(segment_ids[row, 2], np.arange(24) // (24 // documents))
    assert not segment_ids[:, :2].any()
    asked = batches.asked
    assert (asked.kinds[:, 0, :2] == 1).all() and set(np.unique(asked.kinds[:, 0, 2])) <= {0, 2}


def test_short_sequences_are_learnt_from_and_not_counted(script, tiny):
    (cell,) = script.cells("reassigned", tiny, set())
    config, task = script.model_config(cell), cell.task()
    seeds = jnp.array([0], jnp.uint32)
    state = jax.jit(lambda seeds: script.initial_state(cell, config, seeds))(seeds)
    params = jax.tree.map(lambda x: x[0], state.params)
    batch = drawn(script, task, 8, 64, 1, seeds, 0)
    answer = jax.jit(script.answer, static_argnums=(0, 1))
    mixed, whole = (
        answer(config, 2, params, part)
        for part in (
            jax.tree.map(lambda x: x[0, 0], batch),
            jax.tree.map(lambda x: x[0, 0, :32], batch),
        )
    )
    assert mixed[0] != whole[0] and whole[1].accuracy.sum() > 0
    np.testing.assert_array_equal(mixed[1].accuracy, whole[1].accuracy)
    assert mixed[1].exact == whole[1].exact


def test_finished_runs_are_skipped_and_rows_of_several_files_merge(script, tiny, tmp_path):
    (cell,) = script.cells("reassigned", tiny, set())
    keys = [script.run_key(cell.settings, *run) for run in cell.runs]
    (rest,) = script.cells("reassigned", tiny, set(keys[:3]))
    assert rest.runs == cell.runs[3:] and not script.cells("reassigned", tiny, set(keys))
    # What the study grows by, or how it is cut, does not change a run; what matters does.
    same = dataclasses.replace(tiny, seeds=(0, 1, 2), lengths=(16, 32), runs_at_once=2)
    assert not set(keys) - {
        script.run_key(c.settings, *r)
        for c in script.cells("reassigned", same, set())
        for r in c.runs
    }
    other = dataclasses.replace(tiny, steps=8)
    assert script.cells("reassigned", other, set(keys))[0].runs == cell.runs

    def row(run, steps, finished):
        return json.dumps({"run": run, "steps": steps, "finished": finished}) + "\n"

    (tmp_path / "a").write_text(row("x", 6, False) + row("y", 4, True))
    (tmp_path / "b").write_text(row("x", 4, True) + row("y", 2, False) + row("z", 2, False))
    merged = script.merged_rows(tmp_path / "a", tmp_path / "b", tmp_path / "none")
    assert [(r["run"], r["steps"], r["finished"]) for r in merged] == [
        *(("x", 4, True), ("y", 4, True), ("z", 2, False))
    ]


def test_small_cells_come_first_and_sizes_make_cells(script):
    study = script.read_study("capacity", lengths=(1024, 512), mixers=("gdn2",), runs_at_once=9)
    found = script.cells("capacity", study, set())
    assert [cell.length for cell in found] == [512] * 6 + [1024] * 6
    assert [(cell.size["pairs"], cell.size["head_dim"]) for cell in found[:6]] == [
        *((32, 64), (32, 128), (64, 64), (64, 128), (128, 64), (128, 128))
    ]
    assert script.model_config(found[0]).d_model == 128 and found[0].task().pairs == 32


@pytest.mark.parametrize("mixer", ["kda", "gdn", "deltanet", "mamba2", "mamba3", "attention"])
def test_every_mixer_has_gdn2s_parameters_and_state(script, mixer):
    study = script.read_study("mqar", mixers=(mixer,), lengths=(256,))
    (cell,) = script.cells("mqar", study, set())
    sizes = script.check_sizes(cell, script.model_config(cell))
    assert sizes["state"] == (0 if mixer == "attention" else 2 * 128 * 128)
    wrong = dataclasses.replace(script.model_config(cell), mlp_dim=8)
    with pytest.raises(ValueError, match="expected parameters within 2 %"):
        script.check_sizes(cell, wrong)


def test_the_task_gives_the_vocabulary_where_sizes_vary_it(script):
    study = script.read_study("mqar", sizes={"vocab_size": (64, 128)}, lengths=(32,))
    for cell in script.cells("mqar", study, set()):
        assert cell.task().vocab_size == cell.size["vocab_size"]
        assert script.model_config(cell).vocab_size == cell.size["vocab_size"]


def test_every_study_can_be_read(script):
    for path in script.STUDIES.glob("*.toml"):
        assert script.cells(path.stem, script.read_study(path.stem), set())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "study: expected one of calib"),
        (["none"], "study: expected one of calib"),
        (["mqar", "--mixers", "gdn3"], "mixers: expected some of gdn2, "),
        (["capacity", "--lengths", "64"], "length: expected an even number, at least 4 pairs"),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_one_clear_message(
    script, arguments, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        script.main([*arguments, "--directory", str(tmp_path)])


def test_what_is_not_finished_in_time_is_said(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "share", lambda *_, **__: ())
    status = script.main(["easy", "--devices", "1", "--directory", str(tmp_path)])
    assert status == "recall.py: stopped; start again to continue"


@pytest.mark.slow
def test_two_processes_share_the_cells(script, tmp_path, monkeypatch, capsys):
    study = (script.STUDIES / "easy.toml").read_text()
    study = study.replace("tokens = 2048", "tokens = 64").replace("window = 50", "window = 2")
    (tmp_path / "easy.toml").write_text(study)
    monkeypatch.setattr(script, "STUDIES", tmp_path)
    # `share` sets them for its processes.
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    command = ["easy", "--seeds", "0", "1", "--lengths", "16", "32", "--mixers", "attention"]
    command += ["--steps", "4", "--devices", "2", "--directory", str(tmp_path)]
    assert script.main(command) == 0
    printed = capsys.readouterr().out
    assert "4 runs in 2 cells in 2 processes" in printed and "[4/4 runs]" in printed
    rows = script.merged_rows(tmp_path / "easy.jsonl")
    assert sorted((row["length"], row["seed"]) for row in rows) == [
        *((16, 0), (16, 1), (32, 0), (32, 1))
    ]
    assert all(row["finished"] for row in rows)
    same = {"seeds": (0, 1), "lengths": (16, 32), "mixers": ("attention",), "steps": 4}
    assert not script.cells_of(script.Options(studies=("easy",), directory=tmp_path, **same))


def test_the_report_takes_the_best_rate_and_gives_the_range_over_seeds(script, tmp_path):
    report = importlib.import_module("report")

    def row(mixer, rate, seed, accuracy, finished=True, **fields):
        return {
            "run": f"{mixer}{rate}{seed}",
            "mixer": mixer,
            "learning_rate": rate,
            "seed": seed,
            "finished": finished,
            "length": 256,
            "size": {},
            "steps": 200,
            "all_steps": 200,
            "window": 100,
            "accuracy": accuracy,
            "accuracy_by_kind": {"all": accuracy},
            "curve": [[0.0], [accuracy]],
            "steps_to_90": 200 if accuracy > 0.9 else None,
            "test": {"1": {"exact": accuracy / 2}},
            "seconds": 60.0,
            "waited_seconds": 6.0,
            "runs_at_once": 2,
            "tokens_per_second": 2_000_000,
            "device": "a GPU",
            "commit": "abc",
        } | fields

    rows = [
        *(row("kda", 1e-3, 0, 0.95), row("kda", 1e-3, 1, 0.85), row("kda", 1e-4, 0, 0.5)),
        *(row("kda", 1e-4, 1, 0.7), row("gdn2", 1e-3, 0, 0.25, finished=False, steps=100)),
    ]
    (tmp_path / "mqar.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report.main([tmp_path])
    page = (tmp_path / "README.md").read_text()
    best = (
        "| 256 tokens | kda | 0.900 (0.850 to 0.950) | 200, 1 of 2 seeds | 200 | 0.001 | 2 | 2.00 |"
    )
    assert best in page
    assert "| 256 tokens | gdn2 (unfinished) | 0.250 | - | 100 | 0.001 | 1 | 2.00 |" in page
    assert "| 256 tokens | kda | 0.600 (0.500 to 0.700) | 0.900 (0.850 to 0.950) |" in page
    assert "| 256 tokens | kda | 0.450 (0.425 to 0.475) |" in page
    assert "4 finished runs and 1 unfinished ones; 2.5 minutes of a GPU, 0.2 more" in page
    for name in ("mqar", "summary"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("relation", "second", "verdict"),
    [
        (">", [0.1, 0.2, 0.3], "held"),
        (">", [0.1, 0.2, 0.6], "undecided"),
        (">", [0.8, 0.8, 0.9], "not held"),
        (">", [0.1, 0.2], "undecided"),
        (">=", [0.4, 0.6, 0.83], "held"),
        (">", [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.65], "held"),
    ],
)
def test_a_comparison_is_held_where_seeds_are_apart_or_many_lean_one_way(
    script, relation, second, verdict
):
    report = importlib.import_module("report")
    values = {"gdn2": [0.5, 0.6, 0.7], "kda": second}
    mixers = {name: {1e-3: [{"accuracy": x} for x in xs]} for name, xs in values.items()}
    judged = report.judge(mixers, report.Comparison("accuracy", "gdn2", relation, "kda"))
    assert judged[0] == verdict
