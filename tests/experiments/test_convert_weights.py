"""experiments/convert_weights.py: from a run to PyTorch's files and on."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gdn2_jax.interop.pytorch import load_pretrained, open_tensors


@pytest.mark.slow
def test_a_run_is_exported_converted_and_sampled_from(run, command, tmp_path):
    directory, params = run
    status, output, errors = command("convert_weights.py", directory, tmp_path / "fla")
    names = ["model.safetensors", "config.json", "tokenizer.json"]
    assert status == 0
    assert output == "".join(f"wrote {tmp_path / 'fla' / name}\n" for name in names)
    assert "note: the model gates its output with silu" in errors
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "fla").params, params)

    arguments = tmp_path / "fla", tmp_path / "m.pth", "--style=paper"
    status, _, errors = command("convert_weights.py", *arguments)
    assert status == 0 and "note" not in errors
    assert "transformer.h.1.attn.attn.weight" in open_tensors(tmp_path / "m.pth")

    options = ["--prompt=ab", "--tokens=5", "--temperature=0"]
    trained = command("generate.py", directory, *options)
    assert trained == command("generate.py", tmp_path / "fla", *options)
    assert trained[0] == 0 and trained[1].startswith("ab")


def test_failures_are_one_line(run, command, tmp_path):
    (tmp_path / "taken.pth").touch()
    (tmp_path / "tokenizer.json").touch()
    for arguments, message in (
        ([tmp_path / "nothing", tmp_path / "out"], "nothing does not exist"),
        ([run[0], tmp_path / "taken.pth", "--style=paper"], "taken.pth exists already"),
        ([run[0], tmp_path / "out", "--preset=huge"], "--preset: there is no 'huge'"),
        ([run[0], tmp_path], f"{tmp_path} has a tokenizer.json already"),
    ):
        status, _, _ = command("convert_weights.py", *arguments)
        assert status.startswith("convert_weights.py: ") and status.endswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_disk_that_was_full_does_not_block_the_next_attempt(
    run, command, tmp_path, monkeypatch, name
):
    write_text, write_bytes = Path.write_text, Path.write_bytes

    def full(write):
        def write_unless(path, *arguments, **options):
            if path.name.startswith(name):
                write(path, *[content[:5] for content in arguments], **options)
                raise OSError(28, "No space left on device", str(path))
            return write(path, *arguments, **options)

        return write_unless

    monkeypatch.setattr(Path, "write_text", full(write_text))
    monkeypatch.setattr(Path, "write_bytes", full(write_bytes))
    arguments = run[0], tmp_path / "out", "--shard-gigabytes=1e-6"
    status, _, _ = command("convert_weights.py", *arguments)
    assert status.startswith("convert_weights.py: [Errno 28] No space left on device")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    assert command("convert_weights.py", *arguments)[0] == 0
    status, output, _ = command("convert_weights.py", tmp_path / "out", tmp_path / "again")
    assert status == 0 and f"wrote {tmp_path / 'again' / 'tokenizer.json'}" in output
