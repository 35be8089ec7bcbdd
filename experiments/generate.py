r"""Continues a prompt with a trained model: of a run, or of a PyTorch checkpoint with its tokenizer.

python experiments/generate.py
python experiments/generate.py runs/tiny --prompt "import " --temperature 0.7 --top-p 0.9
python experiments/generate.py huggingface-model --prompt "Once upon a time" --stop "\n\n" --stop "The end"
git diff | python experiments/generate.py --prompt-file - --prompt-file notes.txt
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from gdn2_jax.command import run_command

import tyro

from gdn2_jax.data import Tokenizer, load_tokenizer
from gdn2_jax.evaluation import sample_text
from gdn2_jax.interop.pytorch import load_pretrained
from gdn2_jax.layers.delta_rule_layer import StateRounding
from gdn2_jax.models import ModelConfig, with_state_rounding
from gdn2_jax.training import CheckpointError, load_trained

_ESCAPES = {r"\\": "\\", r"\n": "\n", r"\t": "\t", r"\r": "\r"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to sample, and how."""

    run_dir: Annotated[Path, tyro.conf.Positional] = Path("runs/tiny")
    """The directory of a run of train.py, of which the latest checkpoint is used, one of its
    checkpoints, or a directory with config.json, weights and tokenizer.json."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The beginning of the document; empty by default. May be given several times."""

    prompt_file: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A UTF-8 file with a prompt, whose last line break is left out; - is stdin. May be given
    several times."""

    special_tokens: bool = False
    """Read special tokens that a prompt spells out as such, not as text."""

    tokens: int = 512
    """How many to add; a sample ends earlier at the end of its document."""

    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text before which a sample ends, with escapes for line break, tab and return. May be given
    several times."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""

    top_k: int | None = None
    """Sample among the k most likely tokens only."""

    top_p: float | None = None
    """Sample among the most likely tokens that together reach this probability."""

    seed: int = 0
    """The same seed gives the same text."""

    state_rounding: StateRounding | None = None
    """Keep the states of a delta rule in bfloat16, rounded so after each token, instead of float32."""

    batch: int = 1
    """Number of samples of each prompt; the first of all is shown while it grows."""


def _load(directory: Path, rounding: StateRounding | None) -> tuple[ModelConfig, Any, Tokenizer]:
    if (directory / "config.json").is_file() and not (directory / "checkpoints").is_dir():
        tokenizer = load_tokenizer(directory / "tokenizer.json")
        config, params = load_pretrained(directory)
    else:
        step = None
        if directory.parent.name == "checkpoints" and directory.name.isdecimal():
            directory, step = directory.parents[1], int(directory.name)
        trained = load_trained(directory, step)
        config, params, tokenizer = trained.config.model, trained.params, trained.tokenizer
    return with_state_rounding(config, rounding), params, tokenizer


def _prompts(options: Options) -> list[str]:
    texts = [*options.prompt]
    for name in options.prompt_file:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        try:
            texts.append(re.sub(r"\r?\n\Z", "", data.decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file: expected UTF-8, got {name} ({error})") from error
    return texts or [""]


def _unescaped(text: str) -> str:
    """The text with its escapes replaced by their characters."""
    return re.sub(r"\\[\\ntr]", lambda match: _ESCAPES[match[0]], text)


def main(options: Options) -> int | str:
    """Returns the exit status, or a message for it to be 1."""
    # A character that the terminal's encoding lacks must not end the text.
    sys.stdout.reconfigure(errors="replace")
    try:
        texts = sample_text(
            *_load(options.run_dir, options.state_rounding),
            _prompts(options),
            max_new_tokens=options.tokens,
            batch_size=options.batch,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            stop=[_unescaped(stop) for stop in options.stop],
            special_tokens=options.special_tokens,
            stream=sys.stdout,
        )
    except (ValueError, OSError, CheckpointError) as error:
        return f"generate.py: {error}"
    print()
    for number, text in enumerate(texts[1:], start=2):
        print(f"\n--- sample {number} ---\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("generate.py", main, Options, __doc__, keep_programs=True))
