"""Judges the operator's outputs and gradients: run this after changing a kernel.

    python experiments/check_gradients.py
    python experiments/check_gradients.py --length 1000 --segments 7 --value-heads 4
    python experiments/check_gradients.py --implementations pallas --regimes mixture g=-50

One line for each regime of inputs, implementation and dtype: the relative errors of both outputs
and of every gradient against the recurrence in float64, the bound, and whether all are within it.
Then finite differences in float64. The exit status is 1 when anything failed.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Literal

from gdn2_jax.command import require_positive, run_command

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops import Implementation
from gdn2_jax.rows import Column, format_header, format_row
from gdn2_jax.testing import (
    ERROR_BOUNDS,
    REGIMES,
    OperatorInputs,
    check_gradients,
    compare_with_recurrence,
    operator_inputs,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The inputs, and what to judge on them.

    Attributes:
      implementations: what is judged.
      dtypes: of q, k, v, b and w.
      regimes: how gates and keys are drawn.
      batch: number of sequences.
      length: tokens in a sequence.
      heads: key-side heads.
      value_heads: value heads, a multiple of the key-side heads (the same if None).
      key_dim: channels of a key.
      value_dim: channels of a value (as a key if None).
      segments: packed documents in each sequence, starting anywhere (no segment ids if None).
      initial_state: start from a state that is not zero.
      finite_differences: also check float64 gradients numerically, on inputs of at most 40 tokens.
      seed: of the inputs.
    """

    implementations: tuple[Implementation, ...] = ("xla",)
    dtypes: tuple[Literal[*ERROR_BOUNDS], ...] = tuple(ERROR_BOUNDS)
    regimes: tuple[Literal[*REGIMES], ...] = tuple(REGIMES)
    batch: int = 2
    length: int = 200
    heads: int = 2
    value_heads: int | None = None
    key_dim: int = 64
    value_dim: int | None = None
    segments: int | None = None
    initial_state: bool = True
    finite_differences: bool = True
    seed: int = 0

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self, seed=0)


def main(options: Options) -> int | str:
    """Prints the table; returns the exit status, or a message for it to be 1."""
    tensors = ["o", "final_state", *(f"d{name}" for name in OperatorInputs._fields[:-1])]
    if not options.initial_state:
        tensors.remove("dinitial_state")
    named = [Column(name, name, width=-21) for name in ("inputs", "implementation", "dtype")]
    errors = [Column(name, name, width=8) for name in tensors]
    columns = [*named, *errors, Column("bound", "bound", ".0e"), Column("pass", "verdict")]
    print(format_header(columns))
    served = failed = 0
    for implementation in options.implementations:
        fn = functools.partial(gated_delta_rule_2, implementation=implementation)
        for dtype in options.dtypes:
            for regime in options.regimes:
                label = {"inputs": regime, "implementation": implementation, "dtype": dtype}
                try:
                    rows = compare_with_recurrence(fn, draw(options, regime, dtype))
                except NotImplementedError as error:
                    print(format_row(named, label | {"error": f"not served: {error}"}))
                    continue
                except ValueError as error:  # sizes that do not fit together
                    return f"check_gradients.py: {error}"
                passed = all(row.passed for row in rows)
                served, failed = served + 1, failed + (not passed)
                cells = (f"{row.error:.1e}{' ' if row.passed else '!'}" for row in rows)
                label |= dict(zip(tensors, cells))
                label |= {"bound": rows[0].bound, "verdict": "yes" if passed else "NO"}
                print(format_row(columns, label), flush=True)
        if options.finite_differences:
            verdict = check_numerically(fn, options)
            label = {"inputs": "finite differences", "implementation": implementation}
            print(format_row(named, label | {"dtype": "float64", "error": verdict}))
            failed += verdict.startswith("NO")
    if failed or not served:
        print(f"FAILED: {failed} checks out of bounds, {served} tables served", file=sys.stderr)
    return int(failed > 0 or served == 0)


def draw(options: Options, regime: str, dtype: str, max_length: int | None = None):
    """The inputs of one line of the table."""
    length = min(options.length, max_length or options.length)
    return operator_inputs(
        options.batch,
        length,
        options.heads,
        options.key_dim,
        options.value_dim,
        value_heads=options.value_heads,
        regime=regime,
        dtype=dtype,
        initial_state=options.initial_state,
        segments=options.segments and min(options.segments, length),
        seed=options.seed,
    )


def check_numerically(fn, options: Options) -> str:
    """The verdict of finite differences on a short input with gentle gates."""
    inputs = draw(options, "gentle", "float64", max_length=40)

    def outputs(q, k, v, g, b, w, initial_state, segment_ids):
        return fn(q, k, v, g, b, w, initial_state=initial_state, segment_ids=segment_ids)

    try:
        check_gradients(outputs, inputs)
    except NotImplementedError as error:
        return f"not served: {error}"
    except AssertionError as error:
        return f"NO: {' '.join(str(error).split())}"
    return "yes"


if __name__ == "__main__":
    sys.exit(run_command("check_gradients.py", main, Options, __doc__))
