import json

import pytest

from gdn2_jax.training.metrics import MetricsLog, plot_losses, read_metrics


def test_metrics_of_later_steps_and_a_torn_line_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 5.0 - step} for step in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    log = MetricsLog(path, tmp_path / "tensorboard", step=2)
    assert read_metrics(path) == rows[:2]
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert read_metrics(path) == [*rows[:2], {"step": 3, "loss": 0.5}]


def test_row_is_readable_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0)
    log.write({"step": 1, "loss": 5.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 5.5}]
    log.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_metrics_that_json_does_not_know_are_refused(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"step": 1, "loss": float("nan")})
    log.close()


def test_plot_is_a_png(tmp_path):
    rows = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "validation_loss": 4.5}]
    plot_losses(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
