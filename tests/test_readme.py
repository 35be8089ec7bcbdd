"""The documents' examples run as written, their links lead somewhere, and the README stays a door."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for folder in (".", "docs", "experiments", "gdn2_jax", "pallas")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)


def text(page):
    return (ROOT / page).read_text()


def prose(page):
    """The page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text(page), flags=re.DOTALL)


def anchors(page):
    """The names that GitHub and the site give to a page's headings."""
    headings = re.findall(r"^#+ (.*)", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def run(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", text(page), re.DOTALL))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})  # noqa: S102
    return printed.getvalue().splitlines()


def test_the_readmes_examples_print_what_their_comments_say():
    said = re.findall(r"^print.*  # (.*)", text("README.md"), re.MULTILINE)
    assert len(said) == 3
    assert run("README.md") == said


def test_the_page_of_training_uses_a_model_as_written():
    assert run("docs/training.md") == ["(1, 16, 257) (1, 24)"]


def test_the_readme_is_a_door():
    lines = text("README.md").splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 120


def test_every_script_that_the_experiments_page_names_exists_and_the_other_way_round():
    named = set(re.findall(r"`(\w+\.py)`", text("experiments/README.md")))
    assert named == {path.name for path in (ROOT / "experiments").glob("*.py")}


@pytest.mark.parametrize("page", map(str, PAGES))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("http"):
            path, _, heading = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            assert not heading or heading in anchors(file.relative_to(ROOT)), target
