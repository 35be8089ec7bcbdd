"""The precision contract: both outputs and all seven gradients, in every hostile regime."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.testing import (
    REGIMES,
    assert_matches_recurrence,
    compare_with_recurrence,
    operator_inputs,
)

FUNCTIONS = {
    name: functools.partial(gated_delta_rule_2, implementation=name)
    for name in ("recurrent", "xla", None)
}


class Shape(NamedTuple):
    length: int
    key_dim: int
    value_dim: int
    heads: int = 1
    value_heads: int = 1
    segments: int | None = None


# Around the borders of a chunk, several chunks, and (600) several chunks in a span; key and value
# dims from 8 to 256, odd ones too; grouped value heads; segments.
SHAPES = [
    Shape(1, 8, 8),
    Shape(16, 8, 256, heads=2, value_heads=2, segments=2),
    Shape(63, 40, 24, value_heads=2),
    Shape(64, 256, 16, segments=4),
    Shape(65, 33, 8, value_heads=3),
    Shape(600, 8, 8, segments=7),
]
CASES = [
    # The third is among the shapes of test_properties.
    *(("xla", "float64", shape) for shape in SHAPES if shape.length != 63),
    ("xla", "float32", SHAPES[5]),
    ("xla", "bfloat16", SHAPES[5]),
    (None, "float16", SHAPES[1]),
    # Without optimisation its time is quadratic in T.
    ("recurrent", "float32", SHAPES[2]._replace(length=20)),
    ("recurrent", "bfloat16", SHAPES[1]._replace(value_dim=24)),
]


def draw(shape, **options):
    return operator_inputs(
        2,
        shape.length,
        shape.heads,
        shape.key_dim,
        shape.value_dim,
        value_heads=shape.value_heads,
        segments=shape.segments,
        **options,
    )


def assert_meets_the_contract_in_every_regime(fn, shape, dtype):
    failures = []
    for regime in REGIMES:
        try:
            assert_matches_recurrence(fn, draw(shape, regime=regime, dtype=dtype))
        except AssertionError as error:
            failures.append(f"{regime}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    "implementation, dtype, shape",
    CASES,
    ids=[f"{i}-{dtype}-T{s.length}-K{s.key_dim}-V{s.value_dim}" for i, dtype, s in CASES],
)
def test_outputs_and_gradients_meet_the_precision_contract(implementation, dtype, shape):
    assert_meets_the_contract_in_every_regime(FUNCTIONS[implementation], shape, dtype)


@pytest.mark.parametrize("regime", ["gentle", "mixture"])
def test_float16_inputs_lose_no_more_than_float16_holds(regime):
    inputs = operator_inputs(1, 16, 1, 8, regime=regime, dtype="float16")
    for row in compare_with_recurrence(FUNCTIONS["xla"], inputs):
        assert row.error < 5e-4, row


def test_states_beside_float16_inputs_may_leave_float16s_range():
    inputs = operator_inputs(1, 16, 1, 8, dtype="float16")
    inputs = inputs._replace(initial_state=1e6 * inputs.initial_state, q=1e-3 * inputs.q)
    for row in compare_with_recurrence(FUNCTIONS["xla"], inputs):
        # Gradients of float16 inputs are float16, and these are larger.
        assert row.passed or row.tensor in ("dq", "dk", "db"), row


def test_mixed_dtypes_meet_the_contract_of_the_coarsest():
    inputs = operator_inputs(1, 16, 2, 8)
    inputs = inputs._replace(
        q=inputs.q.astype(jnp.bfloat16),
        b=inputs.b.astype(jnp.float16),
        w=inputs.w.astype(jnp.bfloat16),
    )
    assert_matches_recurrence(FUNCTIONS["xla"], inputs)


def test_inputs_without_an_initial_state_meet_the_contract():
    inputs = operator_inputs(2, 16, 1, 16, 8, initial_state=False, dtype="float64")
    assert_matches_recurrence(FUNCTIONS["xla"], inputs)


def test_segments_may_start_at_any_token():
    # Of a shape that is judged above, whose programs are there.
    inputs = draw(SHAPES[5], dtype="float64", regime="mixture")
    length = SHAPES[5].length
    layouts = [
        [64, 128],
        [63, 65, 127, 129],
        [1, 2, 3, 62, 63, 64, 65, 128, 599],
        [599],
        [1],
        [10, 20, 30, 40, 50, 60],
        list(range(1, length)),
    ]
    for one, other in zip(layouts, layouts[1:] + layouts[:1]):
        ids = np.stack([np.isin(np.arange(length), starts).cumsum() for starts in (one, other)])
        # Ids need not be consecutive nor start at 0.
        segment_ids = jnp.asarray(3 * ids + 5, jnp.int32)
        assert_matches_recurrence(FUNCTIONS["xla"], inputs._replace(segment_ids=segment_ids))
