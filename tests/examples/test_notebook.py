"""The notebook's cells run as they stand, with fewer steps, and show what its text says."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "gdn2_in_a_transformer.ipynb"


@pytest.mark.slow
def test_the_swapped_model_recalls_decodes_as_the_whole_call_and_shows_its_gates():
    plt.switch_backend("agg")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join(
        "".join([*cell["source"], "\n"]) for cell in cells if cell["cell_type"] == "code"
    )
    assert code.count("STEPS = 150") == 1
    names = {}
    exec(code.replace("STEPS = 150", "STEPS = 75"), names)  # noqa: S102
    assert names["test_accuracy"] > 0.8
    assert names["difference"] < 1e-4
    assert len(set(names["sizes"])) == 1
    for gate in names["gates"]("Block_0").values():
        assert gate.shape == (13, 32) and (gate >= 0).all() and (gate <= 1).all()
    plt.close("all")
