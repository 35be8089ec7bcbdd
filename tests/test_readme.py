"""The README's examples run as written."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_usage_examples_run_as_written():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "(2, 100, 128) (2, 100, 4, 32) (2, 4, 32, 32)",
        "(1, 16, 257) (1, 24)",
        "(2, 100, 128) (2, 100, 128) 17",
    ]


def test_every_script_the_readme_names_exists_and_the_other_way_round():
    named = set(re.findall(r"`(\w+\.py)`", (ROOT / "README.md").read_text()))
    assert named == {path.name for path in (ROOT / "experiments").glob("*.py")}
