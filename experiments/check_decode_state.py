r"""Measures what a decoding state in bfloat16 costs in accuracy, step by step, against float64.

    python experiments/check_decode_state.py
    python experiments/check_decode_state.py --implementations pallas --key-dim 128

One line for each regime of inputs and form of the state: kept in float32, or in bfloat16, to which each
step rounds it, to the nearest number or stochastically. The relative errors (Frobenius norm) are those
of the state after so many steps, and of the last hundred outputs. All forms and the recurrence in
float64 read the same inputs in bfloat16.
"""

import functools
import sys
from dataclasses import dataclass

from gdn2_jax.command import require_positive, run_command

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax import gated_delta_rule_2_step
from gdn2_jax.ops import Implementation, rounding_seeds
from gdn2_jax.rows import Column, format_header, format_row
from gdn2_jax.testing import Regime, operator_inputs

# The last two are the hardest: nothing is erased, so that errors add up for as long as the decay lets
# them; and a decay so weak that the nearest number to a decayed one is itself.
REGIMES = {
    "gentle": Regime("gentle"),
    "g=-1e-4": Regime(-1e-4),
    "g=0": Regime(0.0),
    "written only": Regime(-1e-3, erase=(0.0, 0.0)),
    "decayed only": Regime(-1e-3, erase=(0.0, 0.0), write=(0.0, 0.0)),
}
STATES = ("float32", "nearest", "stochastic")
PIECE = 100


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
      implementations: of the step.
      steps: at which the error is printed, multiples of a hundred.
      batch: number of sequences.
      heads: of each.
      key_dim: key and value channels.
      seed: of the inputs.
    """

    implementations: tuple[Implementation, ...] = ("xla",)
    steps: tuple[int, ...] = (100, 1000, 10000)
    batch: int = 4
    heads: int = 4
    key_dim: int = 64
    seed: int = 0

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self, seed=0)
        if any(steps % PIECE for steps in self.steps):
            raise ValueError(f"steps: expected multiples of {PIECE}, got {self.steps}")


def main(options: Options) -> None:
    """Prints the table."""
    steps = sorted(options.steps)
    columns = [
        Column("inputs", "inputs", width=-12),
        Column("implementation", "implementation"),
        Column("state", "state", width=-10),
        *(Column(f"state {n:,}", f"state_{n}", ".1e") for n in steps),
        *(Column(f"outputs {n:,}", f"outputs_{n}", ".1e") for n in steps),
    ]
    print(format_header(columns), flush=True)
    for name, regime in REGIMES.items():
        inputs = operator_inputs(
            *(options.batch, steps[-1], options.heads, options.key_dim),
            regime=regime,
            dtype="bfloat16",
            seed=options.seed,
        )
        arrays = [np.asarray(x) for x in (inputs.initial_state, *inputs[:6])]
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            wide = [x.astype(np.float64) for x in arrays]
            reference = run(wide, steps, "xla", "float64")
        for implementation in options.implementations:
            for form in STATES:
                row = {"inputs": name, "implementation": implementation, "state": form}
                found = run(arrays, steps, implementation, form)
                for key, value in found.items():
                    difference = np.linalg.norm(value - reference[key])
                    row[key] = difference / np.linalg.norm(reference[key])
                print(format_row(columns, row), flush=True)


def run(arrays: list, steps: list[int], implementation: str, form: str) -> dict[str, np.ndarray]:
    """The states, and the last outputs before them, after these numbers of steps."""
    state, *tokens = arrays
    if form in ("nearest", "stochastic"):
        state = state.astype(jnp.bfloat16)
    position, results = np.zeros(len(state), np.uint32), {}
    for start in range(0, steps[-1], PIECE):
        piece = [np.moveaxis(x[:, start : start + PIECE], 1, 0) for x in tokens]
        state, position, outputs = advance(
            state, position, piece, implementation, form == "stochastic"
        )
        if start + PIECE in steps:
            results[f"state_{start + PIECE}"] = np.asarray(state, np.float64)
            results[f"outputs_{start + PIECE}"] = np.asarray(outputs, np.float64)
    return results


@functools.partial(jax.jit, static_argnums=(3, 4))
def advance(state, position, tokens, implementation: str, stochastic: bool):
    """State and position after some tokens [T, B, H, d], and the outputs."""

    def step(carry, token):
        state, position = carry
        position += np.uint32(1)
        seeds = rounding_seeds(position, state.shape[1]) if stochastic else None
        state, output = gated_delta_rule_2_step(
            state, *token, rounding_seeds=seeds, implementation=implementation
        )
        return (state, position), output

    (state, position), outputs = jax.lax.scan(step, (state, position), tokens)
    return state, position, outputs


if __name__ == "__main__":
    sys.exit(run_command("check_decode_state.py", main, Options, __doc__))
