"""Prints parameters, recurrent state and FLOPs of every mixer at every scale, as Markdown.

    python experiments/mixer_table.py
    python experiments/mixer_table.py --scale 1.3B --sequence-length 32768

The table for sequences of 4096 tokens stands in experiments/results/mixers/README.md.
"""

import argparse
import sys

from gdn2_jax.command import run_command

from gdn2_jax.models import MIXERS, PRESETS, matched_preset, model_sizes
from gdn2_jax.training.flops import training_flops_per_token

SCALES = ("tiny", "30M", "100M", "305M", "1.3B")
HEADER = """\
| preset | parameters of the blocks | state a layer | cache a layer | GFLOPs a token |
|---|---|---|---|---|"""


def main(arguments: list[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, help="all of them by default")
    parser.add_argument("--sequence-length", type=int, default=4096)
    options = parser.parse_args(arguments)
    if options.sequence_length < 1:
        raise ValueError(f"sequence_length: expected at least 1, got {options.sequence_length}")
    print(HEADER)
    for scale in [options.scale] if options.scale else SCALES:
        for reference in (f"gdn2_{scale}", f"swa_gdn2_{scale}"):
            for mixer in MIXERS:
                if PRESETS[reference].hybrid and mixer == "sliding_window_attention":
                    continue
                print(row(matched_preset(reference, mixer), reference, options.sequence_length))


def row(name: str, reference: str, sequence_length: int) -> str:
    """A preset's line; its parameters are compared with those of `reference`."""
    config = PRESETS[name]
    sizes = model_sizes(config, sequence_length)
    ratio = (
        sizes.block_parameters / model_sizes(PRESETS[reference], sequence_length).block_parameters
    )
    flops = training_flops_per_token(config, sequence_length)
    cells = (
        f"`{name}`",
        f"{sizes.block_parameters:,} ({ratio - 1:+.1%})",
        f"{sizes.state:,}" if sizes.state else "-",
        f"{sizes.cache:,}",
        f"{flops / 1e9:.3g}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(run_command("mixer_table.py", lambda: main(sys.argv[1:])))
