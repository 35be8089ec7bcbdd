import importlib
import json

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("benchmark_operator")


def test_every_implementation_and_pass_is_timed_and_written(script, tmp_path, capsys):
    output = tmp_path / "folder" / "rows.jsonl"
    config = script.Options(
        shapes=("1,12,2,4",),
        implementations=("recurrent", "pallas", "xla"),
        dtypes=("float32",),
        peers=("fla", "cudnn"),
        repeats=3,
        output=output,
    )
    script.main(config)
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["implementation"], row["pass"]) for row in rows] == [
        (implementation, name)
        for implementation in config.implementations
        for name in ("forward", "forward + backward")
    ]
    for row in rows:
        assert row["shape"] == [1, 12, 2, 4] and row["dtype"] == "float32"
        if row["implementation"] == "pallas":
            assert "pallas" in row["error"] and row["error"] in printed
        else:
            assert row["median_ms"] > 0 and row["iqr_ms"] >= 0 and row["compile_s"] > 0
            assert row["temp_ratio"] >= 0 and row["peak_gib"] > 0
    assert "forward + backward: xla takes" in printed
    if importlib.util.find_spec("torch") is None:
        assert "fla: not importable" in printed and "cudnn: not importable" in printed


def test_the_compiled_backward_of_the_recurrence_needs_more_memory_than_its_forward(script):
    arguments, cotangents = script.inputs((1, 64, 1, 16), "float32")
    forward = script.measure(script.forward("recurrent"), arguments, 1)
    both = script.measure(script.both("recurrent"), (arguments, cotangents), 1)
    state_of_each_token = 64 * 16 * 16 * 4
    assert forward["temp_bytes"] < state_of_each_token < both["temp_bytes"]


def test_both_computes_every_gradient(script):
    arguments, cotangents = script.inputs((1, 5, 1, 3), "bfloat16")
    results, gradients = jax.eval_shape(script.both("xla"), arguments, cotangents)
    assert [x.shape for x in results] == [(1, 5, 1, 3), (1, 1, 3, 3)]
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in arguments]


def test_traffic_counts_each_tensor_once(script):
    arguments, _ = script.inputs((1, 8, 1, 4), "bfloat16")
    elements = 8 * 4
    assert script.traffic(arguments, "forward") == elements * (5 * 2 + 4 + 2)
    # Forward; then the inputs and the output's cotangent are read and six gradients written.
    both = elements * ((14 + 2) + (14 + 2) + 14)
    assert script.traffic(arguments, "forward + backward") == both
    kda, _ = script.inputs((1, 8, 1, 4), "bfloat16", "kda")
    assert script.traffic(kda, "forward") == elements * (3 * 2 + 4 + 2) + 2 * 8 * 2


def test_memory_is_reported_for_a_length_and_its_double(script, monkeypatch):
    monkeypatch.setattr(script, "MEMORY_SHAPE", (1, 8, 1, 4))
    short, long = script.memory_rows()
    assert (short["shape"], long["shape"]) == ((1, 8, 1, 4), (1, 16, 1, 4))
    assert short["temp_ratio"] > 0 and "median_ms" not in short


def test_spread_is_the_median_and_the_interquartile_range(script):
    assert script.spread([4.0]) == {"median_ms": 4.0, "iqr_ms": 0.0}
    assert script.spread([1.0, 2.0, 3.0, 4.0, 100.0]) == {"median_ms": 3.0, "iqr_ms": 50.5}


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,0", "1,2,3,4,5"])
def test_a_bad_shape_is_named(script, text):
    with pytest.raises(ValueError, match=f"shapes: expected B,T,H,d, got '{text}'"):
        script.parse_shape(text)


def test_inputs_are_gentle_and_on_the_device(script):
    arguments, cotangents = script.inputs((2, 6, 2, 4), "bfloat16")
    g = arguments[3]
    assert g.dtype == jnp.float32 and -10 < g.min() and g.max() < 0
    assert all(isinstance(x, jax.Array) for x in (*arguments, *cotangents))
