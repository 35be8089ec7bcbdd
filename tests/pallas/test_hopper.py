"""The Hopper kernels on a CPU: in GPU interpret mode, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.testing import assert_matches_recurrence, operator_inputs
from pallas.mosaic import interpret_mode

kernels = functools.partial(gated_delta_rule_2, implementation="pallas")


def draw(length=100, **options):
    options = {"dtype": "bfloat16", **options}
    return operator_inputs(1, length, 1, 128, **options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"regime": "mixture", "segments": 4}, id="gates from 0 to -1000, segments"),
        pytest.param({"regime": "repeated_keys", "value_heads": 2}, id="repeated keys, grouped"),
        pytest.param({"regime": "g=-20", "dtype": "float16"}, id="strong gates, fp16"),
    ],
)
def test_kernels_match_the_recurrence(options):
    with interpret_mode():
        assert_matches_recurrence(kernels, draw(**options))


def test_forward_without_gradients_equals_the_one_that_saves_for_them():
    *arrays, state, _ = draw(value_heads=2)
    with interpret_mode():
        alone = kernels(*arrays, initial_state=state)
        saving = jax.vjp(lambda *x: kernels(*x, initial_state=state), *arrays)[0]
    for x, y in zip(alone, saving, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("segments", [None, 3])
def test_kernels_lower_for_cuda_on_a_host_without_one(segments):
    *arrays, state, segment_ids = draw(segments=segments, value_heads=2)

    @jax.jit
    def both(arrays, state, cotangents):
        run = functools.partial(kernels, segment_ids=segment_ids)
        results, pullback = jax.vjp(lambda x, s: run(*x, initial_state=s), arrays, state)
        return results, pullback(cotangents)

    lowered = both.trace(arrays, state, (arrays[2], state)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x._replace(v=x.v.astype(jnp.float32)), "v in bfloat16 or float16, got float32"),
        (lambda x: x._replace(**{n: getattr(x, n)[..., :64] for n in "qkgb"}), "128 channels in q"),
        (lambda x: x._replace(**{n: getattr(x, n)[..., :64] for n in "vw"}), "128 value channels"),
    ],
)
def test_kernels_say_which_inputs_they_cannot_serve(change, why):
    inputs = change(draw(length=4, initial_state=False))
    with pytest.raises(NotImplementedError, match=why):
        kernels(*inputs[:6])
    gated_delta_rule_2(*inputs[:6])
