"""The tuner of the Triton kernels, with made-up times."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops.gated_delta_rule_2.triton_kernels import form, plans
from gdn2_jax.ops.gated_delta_rule_2.triton_kernels.plans import Plan
from gdn2_jax.rows import append_row


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script beside a GPU of compute capability 8.9, where wide blocks of values are fast but large."""
    module = importlib.import_module("tune_triton")
    module.rounds = []

    def kernel_times(trial, operands, repeats):
        module.rounds.append(trial)
        if any(plan.block_v == 128 for plan in trial.values()):
            raise RuntimeError("out of shared memory")
        return {case.split()[0]: 1 / plan.block_v for case, plan in trial.items()}

    monkeypatch.setattr(module, "kernel_times", kernel_times)
    monkeypatch.setattr(module, "inputs", lambda shape, dtype, value_dim: ())
    monkeypatch.setattr(plans, "capability", lambda: 89)
    monkeypatch.setattr(form, "import_error", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plans.tuned.cache_clear()
    yield module
    plans.tuned.cache_clear()


def test_the_fastest_plans_that_ran_are_taken_from_the_next_start_on(script, tmp_path, capsys):
    options = script.Options(shapes=("8,64,16,128",))
    case = plans.case("state_pass_forward", 128, 128, True, 8 * 16)
    # An RTX 4090 has 99 KiB for a program: nothing in flight.
    assert plans.plan(case) == Plan(128, 64, 4, 1)
    script.main(options)
    assert str(tmp_path / "gdn2_jax" / "triton_plans.jsonl") in capsys.readouterr().out
    plans.tuned.cache_clear()
    for kernel in script.KERNELS:
        case = plans.case(kernel, 128, 128, True, 8 * 16)
        assert plans.plan(case).block_v == 64
        other = case._replace(half=False)
        assert plans.plan(other) == plans.rule(other, 89)


def test_a_key_head_may_have_other_value_channels(script, monkeypatch):
    drawn = []
    monkeypatch.setattr(script, "inputs", lambda *x, **options: drawn.append(options))
    script.main(script.Options(shapes=("8,64,16,128",), value_channels=256))
    assert drawn == [{"value_dim": 256}]
    plans.tuned.cache_clear()
    for kernel in script.KERNELS:
        case, square = (plans.case(kernel, 128, values, True, 8 * 16) for values in (256, 128))
        assert plans.plan(case).block_v == 64
        assert str(square) not in plans.tuned()


def test_inputs_are_drawn_with_these_value_channels():
    (q, _, v, *_, w), (d_outputs, d_state) = importlib.import_module("tune_triton").inputs(
        (1, 2, 3, 4), "bfloat16", value_dim=6
    )
    assert q.shape == (1, 2, 3, 4) and v.shape == w.shape == d_outputs.shape == (1, 2, 3, 6)
    assert d_state.shape == (1, 3, 4, 6)


def test_a_second_start_measures_what_is_left(script, monkeypatch):
    options = script.Options(shapes=("8,64,16,128",))
    script.main(options)
    measured = len(script.rounds)
    script.main(options)
    assert len(script.rounds) == measured
    path = plans.cache_path()
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    script.main(options)
    assert len(script.rounds) == measured + 1
    # Times of other kernels' sources count for nothing.
    monkeypatch.setattr(plans, "provenance", lambda: {"device": "cpu", "kernels": "changed"})
    assert not plans.measured(path)


def test_a_file_that_is_damaged_is_reported_and_left_out(script, caplog):
    path = plans.cache_path()
    path.parent.mkdir()
    path.write_text("{\n")
    case = plans.case("key_backward", 128, 128, True, 1)
    assert plans.plan(case) == plans.rule(case, 89)
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"plan": [64, 64, 4]},
        {"plan": [64, 48, 4, 1]},
        {"plan": "fast"},
        {"plan": [64, 64, 3, 1]},
        {"plan": [64, 64.0, 4, 1]},
        {"ms": float("nan")},
        {"case": None},
    ],
    ids=str,
)
def test_a_row_that_is_no_measurement_is_reported_and_left_out(script, caplog, change):
    case = plans.case("key_backward", 128, 128, True, 1)
    row = plans.provenance() | {"case": str(case), "plan": [64, 64, 4, 1], "ms": 1.0}
    append_row(plans.cache_path(), row)
    assert plans.plan(case) == Plan(64, 64, 4, 1)
    plans.tuned.cache_clear()
    plans.cache_path().unlink()
    append_row(plans.cache_path(), row | change)
    assert plans.plan(case) == plans.rule(case, 89)
    assert "no measurement" in caplog.text


def test_without_a_file_that_can_be_read_the_rule_serves(script, monkeypatch, caplog):
    case = plans.case("key_backward", 128, 128, True, 1)
    plans.cache_path().mkdir(parents=True)
    assert plans.plan(case) == plans.rule(case, 89)
    assert "Is a directory" in caplog.text

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    plans.tuned.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(plans.Path, "home", no_home)
    assert plans.plan(case) == plans.rule(case, 89)
    assert "home" in caplog.text


def test_without_a_gpu_it_says_so(script, monkeypatch):
    monkeypatch.setattr(plans, "capability", lambda: None)
    with pytest.raises(SystemExit, match="expected an NVIDIA GPU of compute capability 8.0"):
        script.main(script.Options())


def test_without_what_the_kernels_need_nothing_counts_as_measured(script, monkeypatch):
    monkeypatch.setattr(form, "import_error", lambda: "jax_triton cannot be imported (why)")
    with pytest.raises(SystemExit, match=r"^tune_triton.py: jax_triton cannot be imported \(why\)"):
        script.main(script.Options())
    assert not plans.cache_path().exists()


def test_no_plan_is_blamed_for_a_gpu_without_memory(script, monkeypatch):
    def kernel_times(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(script, "kernel_times", kernel_times)
    with pytest.raises(SystemExit, match="^tune_triton.py: --shapes: expected what fits into the"):
        script.main(script.Options())
    assert not plans.cache_path().exists()


def test_no_plan_is_blamed_for_heads_that_the_kernels_do_not_take(script, monkeypatch):
    wide = [jnp.zeros((1, 2, 1, 320))] * 6
    monkeypatch.setattr(
        script, "kernel_times", lambda *_: gated_delta_rule_2(*wide, implementation="triton")
    )
    with pytest.raises(SystemExit, match="^tune_triton.py: --shapes: .*up to 256 channels in q"):
        script.main(script.Options(shapes=("1,2,1,320",)))
    assert not plans.cache_path().exists()


def test_a_profiler_that_shows_no_kernels_is_an_error(monkeypatch):
    module = importlib.import_module("tune_triton")
    monkeypatch.setattr(module, "both", lambda _: jax.jit(lambda: 0))
    monkeypatch.setattr(module, "device_events", lambda run: [])
    with pytest.raises(SystemExit, match="^tune_triton.py: expected times of all kernels from"):
        module.kernel_times({}, (), 1)
