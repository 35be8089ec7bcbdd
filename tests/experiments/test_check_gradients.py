import importlib

import pytest

from gdn2_jax import gated_delta_rule_2

SMALL = {"dtypes": ("float32",), "length": 12, "heads": 1, "key_dim": 4, "value_dim": 3}


@pytest.fixture
def script():
    return importlib.import_module("check_gradients")


def test_a_right_implementation_passes_in_every_regime_chosen(script, capsys):
    options = script.Options(
        **SMALL,
        implementations=("recurrent", "xla"),
        regimes=("mixture", "repeated_keys"),
        value_heads=2,
        segments=3,
        finite_differences=False,
    )
    assert script.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        [regime, implementation, "float32"]
        for implementation in ("recurrent", "xla")
        for regime in ("mixture", "repeated_keys")
    ]
    assert all(line.endswith("yes") for line in lines[1:])
    assert "dinitial_state" in lines[0]


def test_finite_differences_of_right_gradients_pass(script, capsys):
    options = script.Options(**SMALL, implementations=("recurrent",), regimes=("gentle",))
    assert script.main(options) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("finite differences") and last.endswith("yes")


def test_a_wrong_gradient_fails_the_table_and_the_finite_differences(script, capsys, monkeypatch):
    import jax

    @jax.custom_jvp
    def wrong(x):
        return x

    wrong.defjvp(lambda primals, tangents: (primals[0], 1.001 * tangents[0]))

    def broken(q, k, v, g, b, w, **options):
        return gated_delta_rule_2(q, k, v, wrong(g), b, w, **options)

    monkeypatch.setattr(script, "gated_delta_rule_2", broken)
    options = script.Options(
        **SMALL, implementations=("recurrent",), regimes=("gentle",), initial_state=False
    )
    assert script.main(options) == 1
    header, table, numerical = capsys.readouterr().out.splitlines()
    assert "dinitial_state" not in header
    assert table.endswith("NO") and table.count("!") == 1
    assert "NO: " in numerical and "argument 3" in numerical


def test_an_implementation_that_cannot_serve_says_so_and_is_not_a_pass(script, capsys):
    options = script.Options(**SMALL, implementations=("pallas",), regimes=("gentle",))
    assert script.main(options) == 1
    assert "not served" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["length", "segments"])
def test_sizes_that_make_no_sense_are_named_before_anything_runs(script, name):
    with pytest.raises(ValueError, match=f"^{name}: expected at least 1, got 0"):
        script.Options(**SMALL | {name: 0})
