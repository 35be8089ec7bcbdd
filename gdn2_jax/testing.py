"""What to run after changing a kernel: hostile inputs, and the judges of outputs and gradients.

`operator_inputs` draws inputs of the Gated Delta Rule-2 in the gate regimes that break chunkwise
implementations, `compare_with_recurrence` measures an implementation against the recurrence in
float64, and `check_gradients` compares any function's reverse mode with finite differences.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_vjp
from jaxtyping import Array, Float, Int

from gdn2_jax.fields import require
from gdn2_jax.ops import gated_delta_rule_2

ERROR_BOUNDS = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 1e-2, "float16": 1e-2}
"""Relative error allowed for each dtype of q, k, v, b, w (the coarsest one decides)."""

HALF_PRECISION_BOUND_ON_HARD_INPUTS = 3e-2
"""Bound in bfloat16 and float16 where keys repeat or an erase gate exceeds 1."""


class Regime(NamedTuple):
    """How the inputs of a gate regime are drawn.

    Attributes:
      decay: log-decay of every token and channel; or "gentle" (as a layer's gates at
        initialisation); or, drawn for each token and channel: "mixture" (mostly weak, some down to
        -1000), "uniform" (0 to -50), "extremes" (0, weak, strong and -1000 equally often), "borders"
        (weak where blocks of 16 rows begin, end and are halved, strong between, or the other way
        round) or "resets" (as "extremes", down to float32's smallest number and -inf).
      keys: unit-length keys: "random", "repeated" (one key for all tokens of a head) or "positive".
      erase: range of the erase gate b, uniform.
      write: range of the write gate w, uniform.
    """

    decay: float | Literal["gentle", "mixture", "uniform", "extremes", "borders", "resets"]
    keys: Literal["random", "repeated", "positive"] = "random"
    erase: tuple[float, float] = (0.0, 1.0)
    write: tuple[float, float] = (0.0, 1.0)


REGIMES = {
    "gentle": Regime("gentle"),
    "g=0": Regime(0.0),
    "g=-1e-4": Regime(-1e-4),
    "g=-5": Regime(-5.0),
    "g=-20": Regime(-20.0),
    "g=-50": Regime(-50.0),
    "g=-1000": Regime(-1000.0),
    "mixture": Regime("mixture"),
    "uniform": Regime("uniform"),
    "extremes": Regime("extremes"),
    "borders": Regime("borders"),
    "resets": Regime("resets"),
    "repeated_keys": Regime(0.0, keys="repeated", erase=(1.0, 1.0)),
    "repeated_keys_mixture": Regime("mixture", keys="repeated", erase=(1.0, 1.0)),
    "repeated_keys_borders": Regime("borders", keys="repeated", erase=(1.0, 1.0)),
    "positive_keys": Regime(0.0, keys="positive", erase=(2.0, 2.0)),
    "positive_keys_extremes": Regime("extremes", keys="positive", erase=(2.0, 2.0)),
    "wide_gates": Regime("gentle", erase=(0.0, 2.0), write=(0.0, 2.0)),
}


class OperatorInputs(NamedTuple):
    """The array arguments of `gated_delta_rule_2`, in its order."""

    q: Float[Array, "B T Hk K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hv V"]
    g: Float[Array, "B T Hk K"]
    b: Float[Array, "B T Hk K"]
    w: Float[Array, "B T Hv V"]
    initial_state: Float[Array, "B Hv K V"] | None = None
    segment_ids: Int[Array, "B T"] | None = None


def operator_inputs(
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    value_heads: int | None = None,
    regime: str | Regime = "gentle",
    dtype: str = "float32",
    initial_state: bool = True,
    segments: int | None = None,
    seed: int = 0,
) -> OperatorInputs:
    """Draws inputs of `gated_delta_rule_2`; the same numbers for every dtype, up to rounding.

    Args:
      batch: B.
      length: T.
      heads: key-side heads Hk.
      key_dim: K.
      value_dim: V; K if None.
      value_heads: Hv; Hk if None.
      regime: a name in `REGIMES`, or a `Regime` of your own.
      dtype: of q, k, v, b and w; g and the state are float64 with "float64", else float32.
      initial_state: draw a state before the first token, or leave it None.
      segments: number of segments of each row, the borders anywhere and different in each row;
        segment_ids is None if None.
      seed: of the generator.

    Returns:
      The inputs, on the default device.

    Raises:
      ValueError: the regime or dtype is unknown, or a row cannot hold so many segments.
    """
    if not isinstance(regime, Regime) and regime not in REGIMES:
        raise ValueError(f"regime: expected one of {tuple(REGIMES)}, got {regime!r}")
    require("dtype", dtype in ERROR_BOUNDS, f"one of {tuple(ERROR_BOUNDS)}", dtype)
    fits = segments is None or 1 <= segments <= length
    require("segments", fits, f"1 to {length} (the length)", segments)
    settings = regime if isinstance(regime, Regime) else REGIMES[regime]
    value_dim = value_dim or key_dim
    value_heads = value_heads or heads
    rng = np.random.default_rng(seed)
    key_side = (batch, length, heads, key_dim)
    value_side = (batch, length, value_heads, value_dim)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    q = unit(rng.standard_normal(key_side))
    if settings.keys == "repeated":
        k = np.broadcast_to(unit(rng.standard_normal((batch, 1, heads, key_dim))), key_side)
    elif settings.keys == "positive":
        k = unit(np.abs(rng.standard_normal(key_side)))
    else:
        k = unit(rng.standard_normal(key_side))
    v = rng.standard_normal(value_side)
    b = rng.uniform(*settings.erase, key_side)
    w = rng.uniform(*settings.write, value_side)
    state = rng.standard_normal((batch, value_heads, key_dim, value_dim))
    g = _log_decay(settings.decay, key_side, rng)

    with jax.enable_x64(dtype == "float64"):
        wide = "float64" if dtype == "float64" else "float32"
        ids = None if segments is None else jnp.asarray(_segment_ids(segments, batch, length, rng))
        q, k, v, b, w = (jnp.asarray(x, dtype) for x in (q, k, v, b, w))
        state = jnp.asarray(state, wide) if initial_state else None
        return OperatorInputs(q, k, v, jnp.asarray(g, wide), b, w, state, ids)


class Comparison(NamedTuple):
    """One tensor's distance from the recurrence in float64.

    Attributes:
      tensor: "o", "final_state", or "d" and the name of the input whose gradient it is.
      error: Frobenius norm of the difference over the reference's; inf where a value is not finite.
      bound: the largest error that passes.
    """

    tensor: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


def compare_with_recurrence(
    fn: Callable[..., tuple[Array, Array]], inputs: OperatorInputs, *, seed: int = 0
) -> list[Comparison]:
    """Measures both outputs and all gradients of an implementation of the operator.

    The reference is the recurrence in float64, on the CPU, for the same rounded inputs and random
    cotangents of both outputs. The outputs are computed twice, also by a program of their own, as
    users run a forward, and the worse ones count. The gradients of b and g in bfloat16 and float16 are measured
    against at least a hundredth of q's, because they vanish when every gate is strong; a reference
    of norm 0 is compared absolutely.

    Args:
      fn: called as `gated_delta_rule_2`: six arrays, `initial_state=` and `segment_ids=`; compiled
        once for each function object and shape, so pass the same object again.
      inputs: as from `operator_inputs`; one gradient less without an initial state.
      seed: of the cotangents.

    Returns:
      One row for each tensor: o, final_state, dq, dk, dv, dg, db, dw, dinitial_state.

    Raises:
      ValueError: the recurrence itself is not finite on these inputs.
    """
    *arrays, segment_ids = inputs
    rng = np.random.default_rng(seed)
    state_shape = (*inputs.v.shape[:1], inputs.v.shape[2], inputs.k.shape[-1], inputs.v.shape[-1])
    with jax.enable_x64(inputs.g.dtype == jnp.float64):
        cotangents = (
            jnp.asarray(rng.standard_normal(inputs.v.shape), inputs.v.dtype),
            jnp.asarray(rng.standard_normal(state_shape), inputs.g.dtype),
        )
        outputs_alone = _outputs(fn, arrays, segment_ids)
        results = _outputs_and_gradients(fn, arrays, segment_ids, cotangents)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = jax.tree.map(_float64, (arrays, cotangents))
        segment_ids = None if segment_ids is None else np.asarray(segment_ids)
        # A few tokens take less time than optimising for them.
        judge = _outputs_and_gradients if inputs.v.shape[1] <= 32 else _reference
        reference = judge(_recurrence, wide[0], segment_ids, wide[1])

    names = ("o", "final_state", *(f"d{name}" for name in OperatorInputs._fields[:-1]))
    results, reference = (
        dict(zip(names, map(_float64, jax.tree.leaves(tree)))) for tree in (results, reference)
    )
    if not all(np.isfinite(x).all() for x in reference.values()):
        raise ValueError("inputs: the recurrence in float64 is not finite on them")
    bound = error_bound(inputs)
    norms: dict[str, Any] = {name: np.linalg.norm(x) for name, x in reference.items()}
    if bound >= ERROR_BOUNDS["bfloat16"]:
        for name in ("dg", "db"):
            norms[name] = max(norms[name], 1e-2 * norms["dq"])
    rows = []
    for name, value in results.items():
        values = [value, _float64(outputs_alone)] if name == "o" else [value]
        errors = [np.linalg.norm(x - reference[name]) / (norms[name] or 1.0) for x in values]
        error = np.max(errors)  # NaN where any is
        rows.append(Comparison(name, float(error) if np.isfinite(error) else np.inf, bound))
    return rows


def assert_matches_recurrence(
    fn: Callable[..., tuple[Array, Array]], inputs: OperatorInputs, *, seed: int = 0
) -> None:
    """Raises an AssertionError naming each tensor of `compare_with_recurrence` out of its bound."""
    failed = [row for row in compare_with_recurrence(fn, inputs, seed=seed) if not row.passed]
    if failed:
        raise AssertionError(
            "; ".join(f"{r.tensor}: relative error {r.error:.2e} > {r.bound:.0e}" for r in failed)
        )


def error_bound(inputs: OperatorInputs) -> float:
    """The relative error that an implementation may have on these inputs."""
    bound = max(ERROR_BOUNDS[x.dtype.name] for x in (*inputs[:3], inputs.b, inputs.w))
    if bound < ERROR_BOUNDS["bfloat16"]:
        return bound
    keys = _float64(inputs.k)
    rows = np.moveaxis(keys, 1, -2).reshape(-1, *keys.shape[1::2])
    repeated = any(len(np.unique(row, axis=0)) < len(row) for row in rows)
    hard = repeated or _float64(inputs.b).max() > 1
    return HALF_PRECISION_BOUND_ON_HARD_INPUTS if hard else bound


def check_gradients(
    fn: Callable[..., Any],
    args: tuple,
    *,
    atol: float = 1e-7,
    rtol: float = 1e-5,
    eps: float = 1e-5,
) -> None:
    """Compares the reverse mode of any function with central differences in float64.

    Each argument is checked by itself, along one random direction and for random cotangents of all
    outputs, so that a small gradient cannot hide behind a large one.

    Args:
      fn: any function of arrays or trees of arrays, differentiable near `args`.
      args: its arguments; floating-point ones are cast to float64 and checked, the others are
        passed through.
      atol: absolute tolerance on the projected gradient.
      rtol: relative tolerance on the projected gradient.
      eps: step of the differences.

    Raises:
      AssertionError: a gradient disagrees; the message names the argument's position.
      ValueError: no argument is floating-point.
    """
    with jax.enable_x64(True):
        args = tuple(jax.tree.map(_widen, arg) for arg in args)
        checked = [
            i
            for i, arg in enumerate(args)
            if (leaves := jax.tree.leaves(arg))
            and all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)
        ]
        if not checked:
            raise ValueError("args: expected at least one floating-point argument")

        @jax.jit
        def forward(*parts):
            return fn(*_merge(args, checked, parts))

        @jax.jit
        def pullback(cotangents, *parts):
            return jax.vjp(forward, *parts)[1](cotangents)

        parts = [args[i] for i in checked]
        for n, i in enumerate(checked):

            def along(x, n=n):
                return forward(*_merge(parts, [n], [x]))

            def along_vjp(x, n=n):
                replaced = _merge(parts, [n], [x])
                return forward(*replaced), lambda ct: (pullback(ct, *replaced)[n],)

            check_vjp(
                along,
                along_vjp,
                (parts[n],),
                atol=atol,
                rtol=rtol,
                eps=eps,
                err_msg=f"argument {i}",
            )


_recurrence = functools.partial(gated_delta_rule_2, implementation="recurrent")


@functools.partial(jax.jit, static_argnames="fn")
def _outputs(fn, arrays, segment_ids):
    *six, initial_state = arrays
    return fn(*six, initial_state=initial_state, segment_ids=segment_ids)[0]


def _run_both_ways(fn, arrays, segment_ids, cotangents):
    def outputs(*arrays):
        *six, initial_state = arrays
        return tuple(fn(*six, initial_state=initial_state, segment_ids=segment_ids))

    results, pullback = jax.vjp(outputs, *arrays)
    return results, pullback(cotangents)


_outputs_and_gradients = jax.jit(_run_both_ways, static_argnames="fn")
# It runs on a CPU and a few times only, so that less optimisation takes less time. But without XLA's
# newer emitters, which the test-suite switches off, each step of a scan copies all that the scan stacks.
_reference = jax.jit(
    _run_both_ways,
    static_argnames="fn",
    compiler_options={"xla_backend_optimization_level": 1, "xla_backend_extra_options": ""},
)


def _float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _widen(x):
    x = jnp.asarray(x)
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _merge(values, positions, replacements):
    merged = list(values)
    for i, replacement in zip(positions, replacements, strict=True):
        merged[i] = replacement
    return merged


def _log_decay(decay, shape, rng) -> np.ndarray:
    if decay == "gentle":
        # A layer at initialisation: one rate A per head, one time step dt per channel, and a
        # projection of the token that moves the time step a little.
        rate = rng.uniform(1, 16, shape[2])[:, None]
        step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape[2:]))
        bias = step + np.log(-np.expm1(-step))
        return -rate * np.logaddexp(0, bias + 0.5 * rng.standard_normal(shape))
    if decay == "mixture":
        levels = [0.0, -1e-4, -0.05, -5.0, -50.0, -1000.0]
        return rng.choice(levels, shape, p=[0.3, 0.3, 0.25, 0.07, 0.04, 0.04])
    if decay == "uniform":
        return -50 * rng.uniform(size=shape)
    if isinstance(decay, float):
        return np.full(shape, decay)
    weak = -np.exp(rng.uniform(np.log(1e-5), np.log(0.3), shape)) * rng.integers(0, 2, shape)
    strong = np.where(rng.uniform(size=shape) < 0.7, -rng.uniform(3, 90, shape), -1000.0)
    if decay == "borders":
        # Blockwise kernels move sums from reference to reference: what a single factor loses is a
        # weak gate between strong ones.
        at_border = np.isin(np.arange(shape[1]) % 16, [0, 7, 8, 15])[:, None, None]
        inverted = rng.uniform(size=shape[3]) < 0.3
        return np.where(at_border != inverted, weak, strong)
    if decay == "resets":
        lowest = np.finfo(np.float32).min
        strong = rng.choice([-30.0, -1000.0, lowest, -np.inf], shape)
        # And tokens that reset all channels.
        strong[:, 3::7] = rng.choice([lowest, -np.inf], strong[:, 3::7].shape)
        return np.where(rng.uniform(size=shape) < 0.5, weak, strong)
    return np.where(rng.uniform(size=shape) < 0.5, weak, strong)


def _segment_ids(segments, batch, length, rng) -> np.ndarray:
    starts = np.zeros((batch, length), np.int32)
    for row in starts:
        row[1 + rng.permutation(length - 1)[: segments - 1]] = 1
    return np.cumsum(starts, axis=1, dtype=np.int32)
