"""Gives MkDocs the repository's pages under their own paths, so that links hold on GitHub and here."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PATTERNS = (
    "*.md",
    "CITATION.cff",
    "docs/**/*.md",
    "docs/*.svg",
    "examples/*.ipynb",
    "experiments/*.md",
    "experiments/results/**/*",
    "gdn2_jax/**/*.md",
    "pallas/*.md",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of `docs` by those of the whole repository."""
    for file in list(files.documentation_pages()) + list(files.media_files()):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)}):
        if path.is_file():
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
