import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "plan_memory.py"
# One mesh, one layer and the recurrence, which compile sooner. In a process of its own: the script
# sets the number of devices.
CODE = """
import dataclasses, sys
sys.path.insert(0, sys.argv[1])
import plan_memory
from gdn2_jax.command import read_options
changes = {"num_layers": 1, "implementation": "recurrent"}
model = dataclasses.replace(plan_memory.PRESETS["gdn2_tiny"], **changes)
plan_memory.PRESETS = {"tiny": model}
plan_memory.meshes = lambda devices: {"data": plan_memory.MeshConfig()}
options = ["--models", "tiny", "--devices", "1", "--length", "64", "--check", "True"]
plan_memory.main(read_options(plan_memory.Options, options))
"""


def test_the_compilers_count_stands_beside_the_prediction_where_the_readme_asks_for_it():
    assert "`--check True`" in SCRIPT.with_name("README.md").read_text()
    result = subprocess.run(
        [sys.executable, "-c", CODE, SCRIPT.parent], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("predicted") == 1
