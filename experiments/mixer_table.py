"""Prints parameters, recurrent state and FLOPs of every mixer at every scale, as Markdown.

    python experiments/mixer_table.py
    python experiments/mixer_table.py --scale 1.3B --sequence-length 32768

The table for sequences of 4096 tokens stands in experiments/results/mixers/README.md.
"""

import dataclasses
import sys
from typing import Literal

from gdn2_jax.command import require_positive, run_command

from gdn2_jax.models import MIXERS, PRESETS, SCALES, matched_preset, model_sizes
from gdn2_jax.rows import markdown_table
from gdn2_jax.training.flops import training_flops_per_token

HEADER = ("preset", "parameters of the blocks", "state a layer", "cache a layer", "GFLOPs a token")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to print.

    Attributes:
      scale: of the presets; all of them if None.
      sequence_length: tokens that attention sees.
    """

    scale: Literal[*SCALES] | None = None
    sequence_length: int = 4096

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self)


def main(options: Options) -> None:
    """Prints the table."""
    rows = [
        row(matched_preset(reference, mixer), reference, options.sequence_length)
        for scale in ([options.scale] if options.scale else SCALES)
        for reference in (f"gdn2_{scale}", f"swa_gdn2_{scale}")
        for mixer in MIXERS
        if not (PRESETS[reference].hybrid and mixer == "sliding_window_attention")
    ]
    print(markdown_table(HEADER, rows))


def row(name: str, reference: str, sequence_length: int) -> tuple[str, ...]:
    """A preset's cells; its parameters are compared with those of `reference`."""
    config = PRESETS[name]
    sizes = model_sizes(config, sequence_length)
    ratio = (
        sizes.block_parameters / model_sizes(PRESETS[reference], sequence_length).block_parameters
    )
    flops = training_flops_per_token(config, sequence_length)
    return (
        f"`{name}`",
        f"{sizes.block_parameters:,} ({ratio - 1:+.1%})",
        f"{sizes.state:,}" if sizes.state else "-",
        f"{sizes.cache:,}",
        f"{flops / 1e9:.3g}",
    )


if __name__ == "__main__":
    sys.exit(run_command("mixer_table.py", main, Options, __doc__))
