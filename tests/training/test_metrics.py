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


def test_damaged_lines_are_left_out_with_one_warning_that_counts_them(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}', b"\0\0\0", b'{"step": 2}', b"", b"\xff\xfe", b'{"lo": 1}', b"7"]
    path.write_bytes(b"\n".join([*lines, b'{"step": 3}', b'{"ste']))
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: left out damaged lines, 5 in number: 2, 4, 5, 6, 7"
    MetricsLog(path, tmp_path / "tensorboard", step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_row_is_readable_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0)
    log.write({"step": 1, "loss": 5.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 5.5}]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    log.close()


def test_full_disk_is_an_error_and_not_a_wait(tmp_path, file_size_limit):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0)
    with file_size_limit(1000), pytest.raises(OSError, match="File too large"):
        for step in range(1, 1000):
            log.write({"step": step})
    log.close()


def test_metrics_that_json_does_not_know_are_refused(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"step": 1, "loss": float("nan")})
    log.close()


def test_plot_is_a_png_and_a_pdf_of_means_with_title_and_tokens(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    rows = [{"step": step, "loss": 9.0, "mean_loss": step % 2} for step in range(1, 601)]
    rows.append({"step": 600, "validation_loss": 0.6})
    plot_losses(rows, tmp_path / "loss.png", title="a run", tokens_per_step=1000)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "loss.pdf").read_bytes().startswith(b"%PDF")
    (axes,) = figures[0].axes
    training, validation = axes.lines
    assert set(training.get_ydata()) == {0.5} and list(validation.get_ydata()) == [0.6]
    assert axes.get_title() == "a run"
    (tokens,) = axes.child_axes
    assert tokens.get_xlabel() == "tokens" and tokens.get_xlim()[1] == 1000 * axes.get_xlim()[1]
    plot_losses([], tmp_path / "empty.png")
