"""Converts a language model's weights to PyTorch's names and files, from a run or from PyTorch.

    python experiments/convert_weights.py runs/tiny exported              # a run of train.py
    python experiments/convert_weights.py runs/tiny exported.pth --style paper
    python experiments/convert_weights.py model.pth converted --preset swa_gdn2_1.3B
    python experiments/convert_weights.py huggingface-model converted.safetensors --style paper

Style "fla" is that of flash-linear-attention's Hugging Face checkpoints: a directory with config.json
and the tokenizer, if the source has one, which generate.py and `load_pretrained` read; "paper" is that of
the paper's repository. No number changes, and nothing is overwritten.
"""

import contextlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from gdn2_jax.command import run_command

import tyro
from tqdm import tqdm

from gdn2_jax.fields import require
from gdn2_jax.interop.pytorch import convert_pretrained, save_pretrained
from gdn2_jax.models import PRESETS
from gdn2_jax.training import CheckpointError, load_trained

# Of a Hugging Face checkpoint.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to convert, and to what."""

    source: Annotated[Path, tyro.conf.Positional]
    """A run of train.py, or a checkpoint: a directory, or a .safetensors, .pt, .pth or .bin file."""

    output: Annotated[Path, tyro.conf.Positional]
    """A directory, or a .safetensors, .pt, .pth or .bin file."""

    style: Literal["fla", "paper"] = "fla"
    """Whose names the tensors get."""

    file_format: Literal["safetensors", "bin"] = "safetensors"
    """Of the files in a directory."""

    shard_gigabytes: float = 5.0
    """A directory's files are no larger than this, nor is the memory needed."""

    preset: str | None = None
    """The model, where it is in the paper's style and its shapes do not tell all."""

    def __post_init__(self):
        size = self.shard_gigabytes
        require("shard_gigabytes", 0 < size < float("inf"), "a positive number", size)


def main(options: Options) -> int | str:
    """Returns the exit status, or a message for it to be 1."""
    if options.preset is not None and options.preset not in PRESETS:
        return f"convert_weights.py: --preset: there is no {options.preset!r}"
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024) as bar, warnings.catch_warnings():

        def show(name, tensor):
            bar.set_postfix_str(name)
            bar.update(tensor.bytes)

        arguments = {
            "style": options.style,
            "file_format": options.file_format,
            "shard_bytes": int(options.shard_gigabytes * 2**30),
            "on_tensor": show,
        }
        warnings.showwarning = lambda message, *_: bar.write(f"note: {message}", file=sys.stderr)
        try:
            names = [name for name in TOKENIZER_FILES if (options.source / name).is_file()]
            if taken := [name for name in names if (options.output / name).exists()]:
                return f"convert_weights.py: {options.output} has a {taken[0]} already"
            if (options.source / "checkpoints").is_dir():
                trained = load_trained(options.source)
                model = trained.config.model
                files = save_pretrained(options.output, model, trained.params, **arguments)
            else:
                config = PRESETS[options.preset] if options.preset else None
                files = convert_pretrained(
                    options.source, options.output, config=config, **arguments
                )
            if options.output.is_dir():
                with contextlib.ExitStack() as undo:
                    for file in files:
                        undo.callback(file.unlink)
                    for name in names:
                        files.append(options.output / name)
                        undo.callback(files[-1].unlink, missing_ok=True)
                        files[-1].write_bytes((options.source / name).read_bytes())
                    undo.pop_all()
        except (ValueError, OSError, CheckpointError) as error:
            return f"convert_weights.py: {error}"
        except KeyboardInterrupt:
            return "convert_weights.py: stopped before it was done"
    print("\n".join(f"wrote {file}" for file in files))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("convert_weights.py", main, Options, __doc__))
