"""What every script does with a mistake: one line that names it, and no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

MISTAKES = {
    ("benchmark_operator.py", "--shapes", "1,64,2"): "shapes: expected B,T,H,d, got '1,64,2'",
    ("benchmark_operator.py", "--shapes", "1,64,2,d"): "shapes: expected B,T,H,d, got '1,64,2,d'",
    ("profile_operator.py", "--repeats", "0"): "repeats: expected at least 1, got 0",
    ("tune_triton.py", "--repeats", "0"): "repeats: expected at least 1, got 0",
    ("benchmark_mixers.py", "--batch", "0"): "batch: expected at least 1, got 0",
    ("benchmark_decode.py", "--batches", "4", "0"): "batches: expected at least 1, got (4, 0)",
    ("benchmark_decode.py", "--models", "huge"): "models: expected names of presets, got huge",
    ("benchmark_training.py", "--steps", "0"): "steps: expected at least 1, got 0",
    ("benchmark_scaling.py", "--devices", "-1"): "devices: expected at least 1, got -1",
    ("check_gradients.py", "--length", "0"): "length: expected at least 1, got 0",
    ("check_fla_parity.py", "--seed", "-1"): "seed: expected at least 0, got -1",
    ("plan_memory.py", "--devices", "0"): "devices: expected at least 1, got 0",
    ("mixer_table.py", "--sequence-length", "0"): "sequence_length: expected at least 1, got 0",
    ("convert_weights.py", "a", "b", "--shard-gigabytes", "-1"): (
        "shard_gigabytes: expected a positive number, got -1.0"
    ),
    ("compare_mixers.py", "--seeds", "4294967296"): (
        "seed: expected less than 2**32 = 4294967296, got 4294967296"
    ),
    ("train.py", "--seed", str(2**64)): (
        f"seed: expected less than 2**32 = 4294967296, got {2**64}"
    ),
    ("generate.py", "runs/huge"): "generate.py: out of device memory, allocating 128 bytes",
}
RUN = """
import json, runpy, sys
import jax, gdn2_jax.training

def load_trained(directory, step=None):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 128 bytes.")

gdn2_jax.training.load_trained = load_trained
sys.path.insert(0, sys.argv[2])
cases = json.loads(sys.argv[1])
for name, *arguments in cases:
    sys.argv = [name, *arguments]
    try:
        runpy.run_path(f"{sys.path[0]}/{name}", run_name="__main__")
    except SystemExit as error:
        print(error.code, file=sys.stderr)
        print(error.code not in (0, None))
"""


def test_numbers_that_make_no_sense_are_named_in_one_line():
    arguments = [json.dumps(list(MISTAKES)), EXPERIMENTS]
    result = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stdout.splitlines() == ["True"] * len(MISTAKES)
    for message in MISTAKES.values():
        assert message in result.stderr


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['tyro'] = None")
    result = subprocess.run(
        [sys.executable, EXPERIMENTS / "train.py"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{EXPERIMENTS.parent}"},
    )
    assert result.returncode == 1
    assert result.stderr == 'train.py: tyro is not installed: pip install ".[train]"\n'
