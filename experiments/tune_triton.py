"""Finds the fastest plans of the Triton kernels on this machine's GPU.

    python experiments/tune_triton.py                                   # heads of 128 channels, bf16
    python experiments/tune_triton.py --shapes 4,8192,8,256 --dtypes bfloat16 float32
    python experiments/tune_triton.py --value-channels 256              # expand_v=2, or two value heads a key head

Each kernel is timed with every candidate, all kernels at once: a round is one training step of the
operator. What was measured goes to a file in the user's cache folder at once, so that a second start
goes on; from there `implementation="triton"` takes the best plan of each case. Give the shapes that
you train with: few sequences times heads want other plans than many.
"""

import collections
import dataclasses
import itertools
import math
import sys
from pathlib import Path
from typing import Any, Literal

from gdn2_jax.command import require_positive, run_command

import jax
from benchmark_operator import both, inputs, parse_shape

from gdn2_jax.ops.gated_delta_rule_2.triton_kernels import form, plans
from gdn2_jax.ops.gated_delta_rule_2.triton_kernels.plans import Case, Plan
from gdn2_jax.rows import Column, append_row, format_header, format_row
from gdn2_jax.timing import device_events

KERNELS = (
    "intra_chunk_forward",
    "state_pass_forward",
    "state_pass_backward",
    "value_backward",
    "key_backward",
)
COLUMNS = (
    Column("kernel", "kernel", width=-20),
    Column("best plan", "plan", width=-18),
    Column("ms", "ms", ".3f", 8),
    Column("default's ms", "rule_ms", ".3f", 12),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to tune for.

    Attributes:
      shapes: each "B,T,H,d".
      dtypes: of q, k, v, b and w.
      repeats: profiled calls of each candidate.
      value_channels: of a key head: those of a value head, times the value heads that share it; d if None.
    """

    shapes: tuple[str, ...] = ("8,4096,16,128", "1,32768,16,128")
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16",)
    repeats: int = 5
    value_channels: int | None = None

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self)
        for shape in self.shapes:
            parse_shape(shape)


def main(options: Options) -> None:
    """Tunes for each shape and dtype and prints the best plans."""
    if plans.capability() is None:
        raise SystemExit(
            "tune_triton.py: expected an NVIDIA GPU of compute capability 8.0 or more, found none"
        )
    if obstacle := form.import_error():
        raise SystemExit(f"tune_triton.py: {obstacle}")
    path = plans.cache_path()
    print(f"measurements of {jax.local_devices()[0].device_kind} go to {path}", flush=True)
    for text, dtype in itertools.product(options.shapes, options.dtypes):
        batch, _, heads, dim = parse_shape(text)
        values = options.value_channels or dim
        cases = [plans.case(k, dim, values, dtype != "float32", batch * heads) for k in KERNELS]
        print(f"\n{text} {dtype}", flush=True)
        operands = inputs(parse_shape(text), dtype, value_dim=values)
        tune(cases, operands, options.repeats, path)
        print(format_header(COLUMNS))
        times = plans.measured(path)
        for case in cases:
            best, *_ = sorted(times[str(case)].items(), key=lambda x: x[1])
            row = {"kernel": case.kernel, "plan": str(tuple(best[0])), "ms": best[1]}
            row["rule_ms"] = times[str(case)].get(
                plans.rule(case, plans.capability() or 0), math.nan
            )
            print(format_row(COLUMNS, row))
    print(f"\nbest plans are taken from {path} from the next start on")


def candidates(case: Case) -> list[Plan]:
    """What to try for a kernel, the default first."""
    key_tile, value_tile = case.key_tile, case.value_tile
    first = plans.rule(case, plans.capability() or 0)
    if case.kernel.startswith("state_pass"):
        if key_tile * (1 if case.half else 2) > 128:  # Two chunks do not fit into any GPU.
            cuts = [(64, 8, 1), (32, 4, 1), (32, 8, 1), (128, 8, 1), (64, 4, 1), (16, 4, 1)]
        else:
            cuts = [(64, 8, 2), (128, 8, 2), (128, 8, 1), (64, 4, 2), (64, 4, 1), (32, 4, 2)]
            cuts += [(32, 4, 1), (32, 4, 3), (16, 4, 3), (16, 4, 2), (16, 4, 1)]
        found = [Plan(key_tile, *cut) for cut in cuts if cut[0] <= value_tile]
    else:
        # value_backward takes no key channels.
        keys = [32] if case.kernel == "value_backward" else [16, 32, 64]
        pairs = itertools.product(keys, (32, 64, 128))
        pairs = [(k, v) for k, v in pairs if k <= key_tile and v <= value_tile]
        found = [Plan(k, v, first.warps, 1) for k, v in pairs]
    return [first, *(plan for plan in found if plan != first)]


def tune(cases: list[Case], operands: tuple, repeats: int, path: Path) -> None:
    """Times the candidates that the file does not hold yet, and adds them to it."""
    times = plans.measured(path)
    left = {c: [p for p in candidates(c) if p not in times[str(c)]] for c in cases}
    rounds = max(map(len, left.values()))
    for number in range(rounds):
        cuts = {case: queue[number] for case, queue in left.items() if number < len(queue)}
        measured = try_plans(cuts, operands, repeats)
        for case, (plan, ms, error) in measured.items():
            row = {"case": str(case), "plan": plan, "ms": ms, "error": error}
            append_row(path, plans.provenance() | row)
        shown = (f"{case.kernel} {ms:.3f}" for case, (_, ms, _) in measured.items())
        print(f"{number + 1}/{rounds}: {', '.join(shown)} ms", flush=True)


def try_plans(
    cuts: dict[Case, Plan], operands: tuple, repeats: int
) -> dict[Case, tuple[Plan, float, str | None]]:
    """Plan, time and error of each kernel; a plan that fails takes infinitely long.

    Raises SystemExit where no plan is at fault, so that nothing of it is stored.
    """
    try:
        times = kernel_times({str(case): plan for case, plan in cuts.items()}, operands, repeats)
        return {case: (plan, times[case.kernel], None) for case, plan in cuts.items()}
    except NotImplementedError as error:
        raise SystemExit(f"tune_triton.py: --shapes: {error}") from None
    except (RuntimeError, ValueError) as error:
        if str(error).startswith("RESOURCE_EXHAUSTED"):
            raise SystemExit(
                f"tune_triton.py: --shapes: expected what fits into the GPU's free memory, got {error}"
            ) from None
        if len(cuts) == 1:
            ((case, plan),) = cuts.items()
            return {case: (plan, math.inf, str(error)[:200])}
        results: dict[Case, Any] = {}
        for case, plan in cuts.items():
            results |= try_plans({case: plan}, operands, repeats)
        return results


def kernel_times(trial: dict[str, Plan], operands: tuple, repeats: int) -> dict[str, float]:
    """Mean milliseconds of each kernel in the operator's forward and backward with these plans."""
    with plans.trial(trial):
        compiled = both("triton").lower(*operands).compile()
    jax.block_until_ready(compiled(*operands))
    times = collections.defaultdict(float)
    for event in device_events(lambda: [compiled(*operands) for _ in range(repeats)]):
        times[event.name] += event.milliseconds / repeats
    if not all(times[name] for name in KERNELS):
        raise SystemExit(
            "tune_triton.py: expected times of all kernels from the profiler, got some of "
            f"{sorted(times)}; may this user read the GPU's counters?"
        )
    return times


if __name__ == "__main__":
    sys.exit(run_command("tune_triton.py", main, Options, __doc__))
