import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "plan_memory.py"


def test_the_compilers_count_stands_beside_the_prediction_where_the_readme_asks_for_it():
    assert "`--check True`" in SCRIPT.with_name("README.md").read_text()
    arguments = ["--models", "tiny", "--devices", "1", "--length", "64", "--check", "True"]
    result = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("predicted") == 2
