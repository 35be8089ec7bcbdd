"""experiments/evaluate.py on a run and on its PyTorch checkpoint."""

import pytest

from gdn2_jax.evaluation import on_local_devices, text_perplexity
from gdn2_jax.rows import read_rows
from gdn2_jax.training import load_trained


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
