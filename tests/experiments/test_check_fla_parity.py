"""experiments/check_fla_parity.py, as far as the machine has PyTorch and flash-linear-attention."""

import importlib.util
import os
import runpy
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def parity(*options):
    script = ROOT / "experiments" / "check_fla_parity.py"
    return subprocess.run(
        [sys.executable, script, *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch_it_says_so():
    result = parity()
    assert result.returncode == 1
    assert result.stderr.strip() == "check_fla_parity.py: No module named 'torch'"


def test_the_layers_agree():
    pytest.importorskip("torch")
    pytest.importorskip("fla.ops")
    small = ["--width=32", "--heads=1", "--value-heads=2", "--head-dim=16", "--length=20"]
    result = parity("--dtypes", "float32", *small)
    assert result.returncode == 0, result.stderr
    assert "float32: 17 weights there and back, changed: []" in result.stdout


def test_triton_runs_the_smallest_listed_configuration_that_fits(monkeypatch):
    class OutOfResources(Exception):
        pass

    class Autotuner:
        def __init__(self, configs):
            self.configs = configs

        def run(self, memory):
            (config,) = self.configs
            if config.kwargs["BV"] * config.num_stages * config.num_warps > memory:
                raise OutOfResources
            return config

    triton = types.ModuleType("triton.runtime.autotuner")
    triton.Autotuner, triton.OutOfResources = Autotuner, OutOfResources
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.runtime", types.ModuleType("triton.runtime"))
    monkeypatch.setitem(sys.modules, "triton.runtime.autotuner", triton)
    script = runpy.run_path(str(ROOT / "experiments" / "check_fla_parity.py"))
    script["tune_nothing"]()

    Config = namedtuple("Config", "kwargs num_warps num_stages")
    listed = [
        Config({"BV": width}, warps, stages)
        for stages in (3, 2)
        for warps in (8, 4, 2)
        for width in (64, 32)
    ]
    assert Autotuner(list(listed)).run(memory=1000) == Config({"BV": 32}, 4, 2)
    assert Autotuner(list(listed)).run(memory=128) == Config({"BV": 32}, 2, 2)
    with pytest.raises(OutOfResources):
        Autotuner(list(listed)).run(memory=1)
