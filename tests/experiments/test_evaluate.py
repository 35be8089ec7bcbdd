"""experiments/evaluate.py on a run and on its PyTorch checkpoint."""

import dataclasses
from pathlib import Path

import pytest

from gdn2_jax.evaluation import needles, on_local_devices, text_perplexity
from gdn2_jax.rows import read_rows
from gdn2_jax.training import load_trained
from gdn2_jax.training.weights import Weights


@pytest.mark.slow
def test_a_run_and_its_pytorch_checkpoint_have_the_perplexity_of_the_model(run, command, tmp_path):
    text = "über den Fluss und in die Wälder\n" * 3
    (tmp_path / "text.txt").write_text(text)
    assert command("convert_weights.py", run[0], tmp_path / "fla")[0] == 0
    options = ["--text", tmp_path / "text.txt", "--window", 40, "--stride", 25]
    options += ["--output", tmp_path / "out"]
    for model in (run[0], tmp_path / "fla"):
        status, output, _ = command("evaluate.py", model, *options)
        assert status == 0
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    assert [row["model"] for row in rows] == [str(run[0]), str(tmp_path / "fla")]
    # The checkpoint does not say by which implementation the run computed.
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-5)
    trained = load_trained(run[0])
    model = on_local_devices(trained.config.model, trained.params)
    expected = text_perplexity(model, trained.tokenizer, [text], length=40, stride=25)
    assert rows[0]["loss"] == pytest.approx(expected.total.loss, rel=1e-6)
    assert f"{expected.total.bits_per_byte:.4f}" in output
    assert rows[0]["losses"] == pytest.approx(expected.losses, rel=1e-6)
    assert (tmp_path / "out" / "loss_by_tokens_read.png").stat().st_size > 0


def test_tasks_of_the_harness_and_what_is_missing_are_printed(run, command, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason='needs pip install ".[eval]"')
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    folder = Path(__file__).parents[1] / "evaluation"
    (tmp_path / "tasks").mkdir()
    choice = (folder / "tasks" / "choice.yaml").read_text()
    (tmp_path / "tasks" / "choice.yaml").write_text(choice)
    (tmp_path / "tasks" / "absent.yaml").write_text(
        choice.replace("toy_choice", "absent").replace("toy/choice", "toy/absent")
    )
    options = ["--task-folder", tmp_path / "tasks", "--data-folder", folder / "data_sets"]
    options += ["--output", tmp_path / "out", "--tasks", "toy_choice", "absent"]
    status, output, errors = command("evaluate.py", run[0], *options)
    assert status == 3
    assert "|toy_choice|" in output and "|acc_norm|" in output
    assert "absent: no data (" in errors and "--download True fetches them" in errors
    (row,) = read_rows(tmp_path / "out" / "results.jsonl")
    assert row["task"] == "toy_choice" and 0 <= row["metrics"]["acc,none"] <= 1


def test_needles_are_scored_by_task_and_length(run, command, tmp_path, monkeypatch):
    monkeypatch.setattr(needles, "_words", lambda: (["green"], ["sea"]))
    monkeypatch.setattr(needles, "NEW_TOKENS", 2)
    options = ["--tasks", "niah_single_1", "--lengths", 640, "--limit", 2]
    status, output, _ = command("evaluate.py", run[0], *options, "--output", tmp_path)
    assert status == 0
    assert output.splitlines()[-1] == "| niah_single_1 | 0.0 |"
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["score"] == 0 and row["samples"] == 2 and row["prompt_tokens"][2] <= 638
    assert len(read_rows(tmp_path / "niah_single_1_640.jsonl")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "text: expected files for task perplexity, got none"),
        (["--text", "a", "--first", "ab"], "first: expected the name of one token, got 'ab'"),
    ],
)
def test_what_cannot_be_evaluated_is_named(run, command, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        command("evaluate.py", run[0], *arguments)


@pytest.mark.parametrize("task", [["--text"], ["--tasks", "niah_single_2", "--essays"]])
def test_a_file_that_is_not_utf8_is_named(run, command, tmp_path, task):
    (tmp_path / "latin").write_bytes(b"\xfc")
    with pytest.raises(ValueError, match=f"^{task[-1][2:]}: expected UTF-8, got .*latin "):
        command("evaluate.py", run[0], *task, tmp_path / "latin")


def test_texts_without_a_character_are_named(run, command, tmp_path):
    (tmp_path / "a").write_text("")
    # Nothing but the mark of its encoding.
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(
        ValueError, match="^text: expected files with a text, got the empty .*a, .*b$"
    ):
        command("evaluate.py", run[0], "--text", tmp_path / "a", tmp_path / "b")


def test_line_breaks_of_a_text_are_evaluated_as_they_are(run, command, tmp_path):
    (tmp_path / "text").write_bytes("\ufeffeins\r\nzwei\r\n".encode())
    command("evaluate.py", run[0], "--text", tmp_path / "text", "--output", tmp_path)
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["tokens"] == len(b"eins\r\nzwei\r\n")


def test_a_checkpoint_without_its_tokenizer_is_not_read_as_one_of_bytes(
    run, command, monkeypatch, hybrid_config
):
    wide = dataclasses.replace(hybrid_config, vocab_size=32000)
    weights = Weights(wide, None, "bytes", "", lambda: pytest.fail("weights were read"))
    monkeypatch.setattr("evaluate.open_weights", lambda path: weights)
    with pytest.raises(
        ValueError, match="^tokenizer: expected one for the 32000 ids of .* got none$"
    ):
        command("evaluate.py", run[0], "--text", "a")


def test_essays_without_a_word_are_named(run, command, tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="^essays: expected a text, got the empty .*empty$"):
        command("evaluate.py", run[0], "--tasks", "niah_single_2", "--essays", tmp_path / "empty")
