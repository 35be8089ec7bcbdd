import functools
import importlib
import json
import math
import re
from pathlib import Path

import pytest

from gdn2_jax.models import DeltaRule, ModelConfig
from gdn2_jax.parallel import MeshConfig
from gdn2_jax.timing import Event

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmark_scaling.py"
ROWS = SCRIPT.parent / "results" / "scaling"
MODEL = ModelConfig(
    vocab_size=64,
    d_model=16,
    num_layers=1,
    mixer=DeltaRule(num_heads=2, head_dim=4),
    mlp_dim=16,
    dtype="float32",
)


@pytest.fixture
def script(monkeypatch):
    """With a smaller model than any preset, which compiles sooner."""
    module = importlib.import_module("benchmark_scaling")
    monkeypatch.setattr(module, "PRESETS", {"tiny": MODEL})
    return module


def arguments(script, output, **changes):
    options = {"axes": ("fsdp", "sequence"), "tokens": 16, "length": 8, "steps": 1}
    options |= {"sequences": (128,), "implementation": "recurrent", "output": output}
    return script.Options(**options | changes)


def rows_in(output):
    return {
        (*row["mesh"].values(), row["batch"], row["length"]): row
        for row in map(json.loads, output.read_text().splitlines())
    }


@pytest.mark.slow
def test_meshes_are_timed_and_train_as_one_device_and_what_is_done_is_not_done_again(
    script, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "folder" / "rows.jsonl"
    options = functools.partial(arguments, script, output, axes=("fsdp",))
    script.main(options(minutes=0))
    assert (
        "not measured within 0 minutes, run again: one device, 8 x 2; " in capsys.readouterr().out
    )
    assert not output.exists()

    script.main(options())
    table = capsys.readouterr().out
    rows = rows_in(output)
    assert list(rows) == [(1, 1, 1, 1, 2, 8), (1, 1, 1, 1, 16, 8), (1, 8, 1, 1, 16, 8)]
    fsdp, one = rows[1, 8, 1, 1, 16, 8], rows[1, 1, 1, 1, 2, 8]
    assert fsdp["tokens_per_second"] == pytest.approx(128 / fsdp["ms"] * 1e3 / 8)
    assert 0 < fsdp["collectives"] < 1 and one["collectives"] == one["exposed"] == 0
    share = fsdp["tokens_per_second"] / one["tokens_per_second"]
    (line,) = (line for line in table.splitlines() if line.startswith("fsdp 8, 8 x 16"))
    compared = [line for line in table.splitlines() if re.search(r"e-\d\d$", line)]
    assert f"{share:.1%}" in line and compared == [line]
    for row in rows.values():
        assert len(row["losses"]) == script.COMPARED_STEPS
        assert row["losses"][-1] < row["losses"][0] and row["peak_gib"] > 0
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(script, "compile_run", None)
    script.main(options())
    assert capsys.readouterr().out == table
    assert rows_in(output) == rows

    fsdp["grad_norms"][2] *= 1.01
    output.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    with pytest.raises(SystemExit, match="do not train as one device does"):
        script.main(options())
    assert "1.0e-02, TOO MUCH" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["losses", "grad_norms"])
def test_a_mesh_that_diverges_after_steps_that_agree_does_not_train_as_one_device(
    script, capsys, name
):
    key = dict.fromkeys(("device", "jax", "remat", "unroll", "implementation"))
    key |= {"model": "tiny", "batch": 8, "length": 8, "accumulation": 1, "peak_gib": 1.0}
    key |= {"losses": [2.0, 1.0], "grad_norms": [2.0, 1.0]}
    one = key | {"mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}}
    mesh = key | {"mesh": {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}}
    assert not script.print_row(mesh, [one, mesh])
    assert script.print_row(mesh | {name: [2.0, math.nan]}, [one, mesh])
    assert "TOO MUCH" in capsys.readouterr().out


def test_a_mesh_that_cannot_be_measured_ends_the_script_with_an_error(
    script, tmp_path, capsys, monkeypatch
):
    def fail(run):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(script, "compile_run", fail)
    with pytest.raises(SystemExit, match="some meshes could not be measured"):
        script.main(arguments(script, tmp_path / "rows.jsonl"))
    assert "failed, see above: one device, 8 x 2; " in capsys.readouterr().out


def test_what_is_worth_most_comes_first_and_references_before_what_is_set_against_them(script):
    runs = script.plan(script.Options(devices=4, tokens=16, length=8, sequences=(64, 256)))
    assert [(run.training.mesh, run.training.data.sequence_length, run.timed) for run in runs] == [
        (MeshConfig(data=1), 8, True),
        (MeshConfig(data=1), 8, False),
        (MeshConfig(data=4), 8, True),
        (MeshConfig(data=1, fsdp=4), 8, True),
        (MeshConfig(data=2, tensor=2), 8, True),
        (MeshConfig(data=1), 16, True),
        (MeshConfig(data=1, sequence=4), 64, True),
        (MeshConfig(data=2, fsdp=2), 8, True),
        (MeshConfig(data=1, sequence=4), 16, False),
        (MeshConfig(data=1), 64, True),
        (MeshConfig(data=1, sequence=4), 256, True),
    ]
    assert [run.training.global_batch_size for run in runs] == [2, 8, 8, 8, 8, 1, 1, 8, 1, 1, 1]
    assert [run.training.accumulation for run in runs] == [1, 4, *[1] * 9]


def test_tensor_also_goes_as_far_as_the_heads_divide_and_data_takes_the_rest(script):
    def tensor(devices, heads):
        return [
            (sizes.data, sizes.tensor) for sizes in script.batch_meshes({"tensor"}, devices, heads)
        ]

    assert tensor(8, 2) == [(4, 2)]
    assert tensor(8, 12) == [(4, 2), (2, 4)]
    assert tensor(8, 16) == [(4, 2), (1, 8)]
    assert tensor(9, 6) == [(3, 3)]
    assert tensor(8, 3) == []


def test_communication_is_exposed_where_nothing_else_runs_on_its_device(script):
    events = [
        Event("gemm", "", 2.0, 0.0, "one"),
        Event("ncclAllReduce", "", 4.0, 1.0, "one"),
        Event("gemm", "", 1.0, 3.0, "one"),
        Event("copy", "", 1.0, 3.5, "one"),
        Event("gemm", "", 5.0, 0.0, "two"),
    ]
    shares = script.communication(events)
    # Of the second device nothing; of the first 2 to 3 and 4.5 to 5, of 5 ms busy.
    assert shares == pytest.approx({"collectives": 4 / 13, "exposed": 1.5 / 10})


@pytest.mark.parametrize("file", sorted(ROWS.glob("*.jsonl")), ids=lambda file: file.name)
def test_the_readme_has_the_table_of_the_rows(script, tmp_path, file):
    committed = [file.with_name("README.md").read_text(), script.PERFORMANCE.read_text()]
    assert f"<!-- table of scaling/{file.name} -->" in committed[0]
    page = tmp_path / "page.md"
    for text in committed:
        page.write_text(text)
        script.renew_table(page, file, script.table(script.read_rows(file)))
        assert page.read_text() == text


def test_a_readme_gets_the_table_where_it_names_the_rows_file_and_stays_as_it_is_otherwise(
    script, tmp_path
):
    readme, rows = tmp_path / "README.md", tmp_path / "rows" / "a.jsonl"
    script.renew_table(readme, rows, "| new |")
    assert not readme.exists()
    place = "<!-- table of rows/a.jsonl -->\nold\n<!-- end of rows/a.jsonl -->"
    prose = "a line `<!-- table of rows/a.jsonl -->`\nand <!-- end of rows/a.jsonl -->"
    text = f"{prose}\n{place}\nafter\n"
    readme.write_text(text)
    script.renew_table(readme, rows.with_name("b.jsonl"), "| new |")
    script.renew_table(readme, tmp_path / "other" / "a.jsonl", "| new |")
    assert readme.read_text() == text
    script.renew_table(readme, rows, "| new |")
    assert readme.read_text() == text.replace("old", "\n| new |\n")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"devices": 0}, ValueError, "devices: expected at least 1, got 0"),
        ({"devices": 9}, SystemExit, "devices: expected 1 to 8, got 9"),
        ({"length": 7}, SystemExit, "length: expected a divisor of 16 tokens, got 7"),
        (
            {"sequences": (24,)},
            SystemExit,
            "sequences: expected multiples of 64, so .* 8 devices .*, got 24",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    script, tmp_path, changes, error, message
):
    output = tmp_path / "folder" / "rows.jsonl"
    with pytest.raises(error, match=message):
        script.main(arguments(script, output, **changes))
    assert not output.parent.exists()
