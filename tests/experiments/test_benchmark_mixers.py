import importlib
import json

import jax
import pytest

from gdn2_jax.models import PRESETS


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("benchmark_mixers")


def test_layers_and_operators_are_timed_and_compared_with_gdn2(script, tmp_path, capsys):
    output = tmp_path / "folder" / "rows.jsonl"
    mixers = ("gdn2", "mamba2", "attention")
    script.main(script.Options(mixers=mixers, batch=1, length=20, repeats=2, output=output))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["mixer"], row["part"]) for row in rows] == [
        *(("gdn2", "operator"), ("gdn2", "layer")),
        *(("mamba2", "operator"), ("mamba2", "layer")),
        ("attention", "layer"),
    ]
    assert all(row["median_ms"] > 0 and row["peak_gib"] > 0 for row in rows)
    # The header, then a line for each row with its ratio to gdn2's.
    lines = capsys.readouterr().out.splitlines()[2:]
    for line, row, base in zip(lines, rows, [0, 1, 0, 1, 1], strict=True):
        assert line.split()[4] == f"{row['median_ms'] / rows[base]['median_ms']:.2f}"


def test_a_kernel_that_does_not_exist_is_reported(script, capsys):
    script.main(script.Options(mixers=("mamba2",), batch=1, length=4, implementation="pallas"))
    assert 'implementation="pallas"' in capsys.readouterr().out


@pytest.mark.parametrize("mixer", ["gdn2", "kda", "gdn", "mamba3_mimo"])
def test_every_parameter_and_input_gets_a_gradient(script, mixer):
    model = PRESETS[f"{mixer}_tiny"]
    for build in (script.layer, script.operator):
        case = build(model, 2, 3)
        if case is None:
            assert build is script.operator and mixer in ("kda", "gdn")
            continue
        function, arguments, cotangent = case
        outputs, gradients = jax.eval_shape(script.with_gradients(function), arguments, cotangent)
        assert outputs.shape == cotangent.shape and outputs.dtype == cotangent.dtype
        assert jax.tree.structure(gradients) == jax.tree.structure(arguments)
