"""experiments/check_fla_parity.py, as far as the machine has PyTorch and flash-linear-attention."""

import importlib.util
import os
import subprocess
import sys
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
