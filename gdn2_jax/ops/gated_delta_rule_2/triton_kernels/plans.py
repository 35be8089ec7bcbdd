"""How the Triton kernels are cut and compiled, for each kind of GPU and size of heads.

A plan is looked for among those that `experiments/tune_triton.py` found on this card, then among the
stored ones, else made by a rule. The blocks of one kernel do not bind another.
"""

import collections
import contextlib
import functools
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import jax

from gdn2_jax.ops.choice import compute_capabilities
from gdn2_jax.rows import read_rows

_LOG = logging.getLogger(__name__)

MIN_TILE = 16
_FEW = 64


class Plan(NamedTuple):
    """How one kernel is cut and compiled.

    Attributes:
      block_k: key channels that a program holds at a time; the passes over states hold all.
      block_v: value channels that it holds at a time.
      warps: its warps.
      stages: 1, or how many chunks' loads a pass over states has in flight.
    """

    block_k: int
    block_v: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Constants and options of the kernel."""
        return {
            "BLOCK_K": self.block_k,
            "BLOCK_V": self.block_v,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Case(NamedTuple):
    """What a plan depends on beside the GPU.

    Attributes:
      kernel: its name.
      key_tile: key channels of a head, rounded up as `tile` does.
      value_tile: value channels of a key head, likewise.
      half: whether operands are bf16, not fp32.
      few: whether there are few sequences times heads, which matters to the passes over states.
    """

    kernel: str
    key_tile: int
    value_tile: int
    half: bool
    few: bool = False

    def __str__(self):
        dtype = "bfloat16" if self.half else "float32"
        few = " few" if self.few else ""
        return f"{self.kernel} {self.key_tile} {self.value_tile} {dtype}{few}"


def tile(channels: int) -> int:
    """The smallest size of a tile that holds these channels: a power of two from 16."""
    return max(MIN_TILE, 1 << (channels - 1).bit_length())


def case(kernel: str, key_dim: int, value_dim: int, half: bool, sequences: int) -> Case:
    """The case of a kernel for heads of this size, and this number of sequences times key heads."""
    few = kernel.startswith("state_pass") and sequences < _FEW
    return Case(kernel, tile(key_dim), tile(value_dim), half, few)


SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""KiB of shared memory that a program may take, by compute capability; 99 where it has another one."""

STORED: dict[int, dict[str, Plan]] = {
    90: {
        "state_pass_forward 128 128 bfloat16": Plan(128, 128, 8, 2),
        "state_pass_forward 256 256 bfloat16": Plan(256, 64, 8, 1),
        "state_pass_backward 256 256 bfloat16": Plan(256, 32, 4, 1),
        "value_backward 256 256 bfloat16": Plan(32, 64, 4, 1),
        "state_pass_forward 128 128 float32": Plan(128, 64, 8, 1),
        "state_pass_backward 128 128 float32": Plan(128, 64, 8, 1),
        "state_pass_forward 64 64 float32": Plan(64, 64, 4, 2),
        "state_pass_backward 64 64 float32": Plan(64, 64, 4, 2),
    },
}
"""Plans that were measured to be better than the rule's, by compute capability and case."""

_trial: dict[str, Plan] = {}


def plan(case: Case) -> Plan:
    """The plan of a kernel on the first local GPU that can run it."""
    here = capability() or 90
    for plans in (_trial, tuned(), STORED.get(here, {})):
        if found := plans.get(str(case)):
            return found
    return rule(case, here)


def rule(case: Case, capability: int) -> Plan:
    """A plan for any case on a GPU of this compute capability."""
    small = case.half and case.key_tile <= 128
    if not case.kernel.startswith("state_pass"):
        # Tensor cores of other GPUs than Hopper take operands from registers, where less fits.
        block_k, block_v = (32, 128) if capability == 90 else (16, 64)
        warps = 4
        if not case.half:  # Two warps have the 32 rows of a chunk; more would compute them again.
            block_k, block_v, warps = 16, 32, 2
        return Plan(min(block_k, case.key_tile), min(block_v, case.value_tile), warps, 1)
    block_v = 64 if small and not case.few else 16
    stages = 1
    if small and case.few:
        shared = SHARED.get(capability, 99)
        stages = 3 if shared > 200 else 2 if shared > 120 else 1
    return Plan(case.key_tile, min(block_v, case.value_tile), 4 if case.half else 8, stages)


def capability() -> int | None:
    """Compute capability of the first local GPU that can run the kernels, as 90; None without one."""
    return next((round(10 * x) for x in compute_capabilities() if x >= 8), None)


def cache_path() -> Path:
    """Where measurements are kept that were made on this machine's cards."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gdn2_jax" / "triton_plans.jsonl"


@functools.cache
def provenance() -> dict[str, str]:
    """What a measurement holds for: this card, the kernels' sources and their compiler."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.blake2b(b"".join(x.read_bytes() for x in sources), digest_size=8)
    triton = next((x.version for x in distributions(name="triton")), "")
    device = jax.local_devices()[0].device_kind
    return {"device": device, "kernels": digest.hexdigest(), "triton": triton}


def measured(path: Path) -> dict[str, dict[Plan, float]]:
    """Milliseconds by case and plan, of those rows that hold for this card and these kernels.

    Rows without a plan or a time are left out with a warning.
    """
    times = collections.defaultdict(dict)
    for row in read_rows(path, "ms"):
        if not provenance().items() <= row.items():
            continue
        match row:
            case {"case": str(name), "plan": [*sizes], "ms": ms} if _is_plan(sizes) and ms > 0:
                times[name][Plan(*sizes)] = ms
            case _:
                _LOG.warning("%s: left out a row that is no measurement: %s", path, row)
    return times


def _is_plan(sizes: list) -> bool:
    """Whether these are a plan's: two blocks, each a tile, warps, a power of two, and stages."""
    if len(sizes) != len(Plan._fields) or any(type(x) is not int or x < 1 for x in sizes):
        return False
    return all(tile(x) == x for x in sizes[:2]) and sizes[2] in (1, 2, 4, 8, 16, 32)


@functools.cache
def tuned() -> dict[str, Plan]:
    """The fastest plans that were measured on this card, by their cases; read once."""
    try:
        times = measured(cache_path())
    except (OSError, RuntimeError) as error:  # It may not be read, or there is no home.
        _LOG.warning("no tuned plans of Triton kernels: %s", error)
        return {}
    best = {case: min(plans, key=plans.__getitem__) for case, plans in times.items()}
    return {case: plan for case, plan in best.items() if times[case][plan] < math.inf}


@contextlib.contextmanager
def trial(plans: Mapping[str, Plan]) -> Iterator[None]:
    """Inside, what is traced has these plans, by their cases."""
    before = dict(_trial)
    _trial.update(plans)
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)
