import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Both count every preset, which is traced once a process.
pytestmark = pytest.mark.xdist_group("test_presets and test_mixer_table")


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("mixer_table")


@pytest.fixture(scope="module")
def committed():
    return (ROOT / "experiments" / "results" / "mixers" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["tiny", "30M", "100M", "305M", "1.3B"])
def test_the_page_of_the_mixers_has_the_printed_rows(script, committed, capsys, scale):
    script.main(script.Options(scale=scale))
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header in committed
    assert len(rows) == 19
    for row in rows:
        assert row in committed


def test_full_attention_keeps_more_the_longer_the_text(script):
    def cache(name, length):
        return script.row(name, name, length)[3]

    assert cache("attention_tiny", 512) == f"{2 * 512 * 128:,}"
    assert cache("attention_tiny", 1024) == f"{2 * 1024 * 128:,}"
    assert cache("gdn2_tiny", 512) == cache("gdn2_tiny", 1024)
