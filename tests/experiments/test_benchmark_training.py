import importlib
import json
import re
from pathlib import Path

import jax
import pytest

from gdn2_jax.timing import Event

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "experiments" / "results" / "training"


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("benchmark_training")


def arguments(script, output, **changes):
    options = {"models": ("tiny",), "lengths": (16,), "tokens": 128, "steps": 1, "repeats": 2}
    return script.Options(**options | {"implementation": "recurrent", "output": output} | changes)


@pytest.mark.slow
def test_a_step_is_timed_once_and_its_parts_are_found(
    script, tmp_path, capsys, monkeypatch, hybrid_config
):
    monkeypatch.setitem(script.PRESETS, "tiny", hybrid_config)
    output = tmp_path / "folder" / "rows.jsonl"
    script.main(arguments(script, output))
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    assert (row["model"], row["length"], row["batch"]) == ("tiny", 16, 8)
    assert row["tokens_per_second"] == pytest.approx(128 / row["median_ms"] * 1e3)
    assert row["peak_gib"] > 0 and row["compile_s"] > 0
    assert row["losses"][-1] < row["losses"][0]
    assert all(row["parts_ms"][part] > 0 for part in script.PARTS)
    assert {"forward", "backward", "optimizer"} <= set(row["passes_ms"])
    for name in ("parts_ms", "passes_ms"):
        assert sum(row[name].values()) == pytest.approx(sum(row["parts_ms"].values()))
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    first = capsys.readouterr().out

    with output.open("a") as file:
        file.write('{"cut off')
    script.main(arguments(script, output))
    assert capsys.readouterr().out.splitlines()[2:] == first.splitlines()[2:]
    assert len(output.read_text().splitlines()) == 2


def test_lengths_must_divide_the_tokens(script, tmp_path):
    with pytest.raises(SystemExit, match="lengths: expected divisors of 128 tokens, got 24"):
        script.main(arguments(script, tmp_path / "rows.jsonl", lengths=(16, 24)))


def test_an_error_is_a_row_and_is_tried_again(script, tmp_path, capsys, monkeypatch):
    def fail(training, mesh, profile):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nmore")

    monkeypatch.setattr(script, "compile_step", fail)
    output = tmp_path / "rows.jsonl"
    for _ in range(2):
        script.main(arguments(script, output))
    rows = [json.loads(line)["error"] for line in output.read_text().splitlines()]
    assert rows == ["RESOURCE_EXHAUSTED: no room"] * 2
    assert "RESOURCE_EXHAUSTED: no room" in capsys.readouterr().out


def test_instructions_are_named_by_the_operations_they_come_from(script):
    text = """
%fused (p: f32[2]) -> f32[2] {
  ROOT %mul.1 = f32[2]{0} multiply(%p, %p), metadata={op_name="a/mul" stack_frame_id=1}
}
  %fusion.3 = (f32[2]{0}, f32[2]{0}) fusion(%p), kind=kLoop, metadata={op_name="jit(step)/embed/add"}
  %custom-call.5.0 = f32[2]{0} custom-call(%p), metadata={op_name="x/dot"}, backend_config={"a = b(c)"}
  %while.2 = (f32[2]{0}) while(%t), condition=%c, body=%b, metadata={op_name="x/while"}
  %copy.1 = f32[2]{0} copy(%p)
"""
    assert script.operation_names(text) == {
        "mul.1": "a/mul",
        "fusion.3": "jit(step)/embed/add",
        "custom-call.5.0": "x/dot",
    }


def test_time_goes_to_the_part_and_pass_that_an_operation_names(script, monkeypatch):
    layers = "while/body/eval_jaxpr/layers"
    backward = "jit(step)/transpose(jvp(LanguageModel))"
    paths = {
        "embed": "jit(step)/jvp(LanguageModel)/embed/jit(_take)/gather",
        "mix": f"jit(step)/jvp(LanguageModel)/{layers}/block/mixer/mixer._mix/kernel",
        "norm": f"{backward}/{layers}/block/mixer_norm/mul",
        "attend": f"{backward}/{layers}/attention_block/mixer/q_proj/dot_general",
        "again": f"{backward}/{layers}/block/mlp/layers/block/mlp/checkpoint/rematted_computation/mul",
        "loss": "jit(step)/jvp(loss)/while/body/eval_jaxpr/dot_general",
        "adam": "jit(step)/optimizer/mul",
    }
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    events = [Event("kernel", name, 2.0 * 2**i) for i, name in enumerate(paths)]
    events.append(Event("memcpy", "", 2.0 * 2**7))
    paths["loop_fusion.9"] = paths["embed"]
    events.append(Event("loop_fusion_9", "", 2.0 * 2**8))
    found = script.breakdown(events, paths, "gdn2", 2)
    assert found["parts_ms"] == {
        "embedding + loss": 1 + 32 + 256,
        "mixer": 2 + 4,
        "attention": 8,
        "MLP": 16,
        "optimizer": 64,
        "other": 128,
    }
    assert found["passes_ms"] == {
        "forward": 1 + 2 + 32 + 256,
        "backward": 4 + 8,
        "recomputation": 16,
        "optimizer": 64,
        "other": 128,
    }
    assert found["operations_ms"]["recomputation block/mlp/mul"] == 16
    assert found["operations_ms"]["other memcpy"] == 128
    assert script.part_of(paths["mix"].split("/"), "attention") == "attention"


@pytest.mark.parametrize("file", sorted(ROWS.glob("*.jsonl")), ids=lambda file: file.name)
def test_the_pages_have_the_table_of_the_rows(script, tmp_path, file):
    committed = [file.with_name("NOTES.md").read_text(), script.PERFORMANCE.read_text()]
    assert any(f"<!-- table of training/{file.name} -->" in text for text in committed)
    page = tmp_path / "page.md"
    for text in committed:
        page.write_text(text)
        script.renew_table(page, file, script.table(script.read_rows(file)))
        assert page.read_text() == text


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md"])
def test_the_readmes_have_the_figures_of_the_row_at_4096_tokens(script, page):
    rows = [row for row in script.read_rows(ROWS / "h100.jsonl") if row["length"] == 4096]
    row = script.shown(rows[-1])
    figures = f"{row['tokens_per_second']:,.0f} tokens/s", f"{row['mfu'] * 100:.1f} %"
    (line,) = (x for x in (ROOT / page).read_text().splitlines() if re.search("1.3B.*4,096 tok", x))
    assert all(figure in line for figure in figures)
