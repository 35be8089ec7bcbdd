import importlib
import io
from pathlib import Path
from types import SimpleNamespace

from gdn2_jax.command import read_options

import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("generate")


@pytest.fixture
def call(script, monkeypatch):
    """A function of a command line: the arguments of `sample_text`, or the script's message."""

    def run(*arguments):
        calls = []
        monkeypatch.setattr(script, "_load", lambda directory, rounding: (directory,))
        monkeypatch.setattr(
            script, "sample_text", lambda *args, **options: calls.append((args, options)) or [""]
        )
        monkeypatch.setattr(script.sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        status = script.main(read_options(script.Options, [str(a) for a in arguments]))
        return calls[0] if status == 0 else status

    return run


def test_prompts_come_from_options_files_and_stdin(call, script, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("über\n\r\n".encode())
    monkeypatch.setattr(script.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"piped\n")))
    files = ["--prompt-file", tmp_path / "a.txt", "--prompt-file", "-"]
    (directory, prompts), _ = call("--prompt", "one", "--prompt=two", *files, "runs/mine")
    assert directory == Path("runs/mine")
    assert prompts == ["one", "two", "über\n", "piped"]
    assert call()[0][1] == [""]


def test_escapes_of_stop_strings_are_read(call):
    _, options = call("--stop", r"\n\n", "--stop", r"\\n", "--special-tokens", "True")
    assert options["stop"] == ["\n\n", r"\n"] and options["special_tokens"]


def test_a_prompt_that_cannot_be_read_is_one_line(call, tmp_path):
    (tmp_path / "latin").write_bytes(b"\xfc")
    for name in ("latin", "missing"):
        message = call("--prompt-file", tmp_path / name)
        assert message.startswith("generate.py: ") and "\n" not in message and name in message


def test_one_checkpoint_of_a_run_is_read(script, run):
    directory, params = run
    for path in (directory, directory / "checkpoints" / "0"):
        _, found, _ = script._load(path, None)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 7, but .*0"):
        script._load(directory / "checkpoints" / "7", None)
