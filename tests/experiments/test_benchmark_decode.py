"""experiments/benchmark_decode.py on whole models of a few channels."""

import dataclasses

import pytest
from matplotlib.figure import Figure

from gdn2_jax.models import PRESETS, DeltaRule, SoftmaxAttention
from gdn2_jax.rows import append_row, read_rows


@pytest.fixture
def tiny_presets(monkeypatch):
    base = dataclasses.replace(
        PRESETS["gdn2_tiny"],
        vocab_size=17,
        d_model=16,
        num_layers=1,
        mixer=DeltaRule(num_heads=1, head_dim=16),
        mlp_dim=16,
        dtype="float32",
        implementation="recurrent",
    )
    attention = SoftmaxAttention(kind="attention", num_heads=1)
    monkeypatch.setitem(PRESETS, "small_gdn2", base)
    monkeypatch.setitem(PRESETS, "small_attention", dataclasses.replace(base, mixer=attention))


@pytest.mark.slow
def test_models_are_measured_once_and_attention_alone_grows(
    tiny_presets, command, tmp_path, monkeypatch
):
    save, labels = Figure.savefig, []

    def savefig(self, *args, **options):
        labels[:] = [axes.get_ylabel() for axes in self.axes]
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    options = ["--models", "small_gdn2", "small_attention", "--batches", 2, "--contexts", 32, 64]
    options += ["--new-tokens", 2, "--repeats", 2, "--output", tmp_path / "rows.jsonl"]
    options += ["--states", "float32", "nearest"]
    _, output, _ = command("benchmark_decode.py", *options)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row["model"], row["state"], row["context"]) for row in rows] == [
        *(("small_gdn2", "float32", 32), ("small_gdn2", "float32", 64)),
        *(("small_gdn2", "nearest", 32), ("small_gdn2", "nearest", 64)),
        *(("small_attention", "float32", 32), ("small_attention", "float32", 64)),
    ]
    assert not any("error" in row for row in rows)
    assert all(row["step_ms"] > 0 and row["first_token_ms"] > row["step_ms"] for row in rows)
    wide, other, narrow, *_ = (row["cache_bytes"] for row in rows)
    assert wide == other and wide - narrow == 2 * 2 * 16 * 16
    # Keys and values, float32, two rows, and the documents of tokens.
    assert rows[5]["cache_bytes"] - rows[4]["cache_bytes"] == 32 * 2 * (2 * 16 + 1) * 4
    assert (tmp_path / "rows.png").stat().st_size > 0
    assert labels == ["a decoding step (ms)", "prefill (tokens/s)", "cache (bytes)"]
    _, output, _ = command("benchmark_decode.py", *options)
    assert "small" not in output.replace(str(tmp_path), "")
    assert len(read_rows(tmp_path / "rows.jsonl")) == 6


def test_a_step_is_timed_with_each_form_of_the_state(command, tmp_path):
    options = ["--batches", 1, "--heads", 1, "--head-dim", 16, "--layers", 1, "--repeats", 2]
    options += ["--states", "float32", "stochastic", "--output", tmp_path / "rows.jsonl"]
    command("benchmark_decode.py", *options)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["state"] for row in rows] == ["float32", "stochastic"]
    assert all(row["clock_us"] > 0 for row in rows)


def test_rows_after_the_last_minute_are_named(tiny_presets, command):
    options = ["--models", "small_gdn2", "--batches", 2, "--contexts", 32, "--minutes", 0]
    _, output, _ = command("benchmark_decode.py", *options)
    assert "not measured within 0 minutes, run again: small_gdn2 B=2 32" in output


def test_rows_of_the_operator_and_of_before_the_states_had_forms_are_read(
    tiny_presets, command, tmp_path
):
    measured = {"step_ms": 1.0, "prefill_tokens_per_s": 1.0, "cache_bytes": 1}
    model = {"device": "a GPU", "model": "small_gdn2", "batch": 2, "context": 32}
    append_row(tmp_path / "rows.jsonl", {"device": "a GPU", "implementation": "xla", "batch": 2})
    append_row(tmp_path / "rows.jsonl", model | measured)
    options = ["--models", "small_gdn2", "--batches", 2, "--contexts", 32, "--minutes", 0]
    _, output, _ = command("benchmark_decode.py", *options, "--output", tmp_path / "rows.jsonl")
    assert "not measured" not in output and (tmp_path / "rows.png").exists()
