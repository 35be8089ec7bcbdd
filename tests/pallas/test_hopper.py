"""The Hopper kernels on a CPU: in GPU interpret mode, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops import dispatch
from gdn2_jax.testing import assert_matches_recurrence, operator_inputs
from pallas.mosaic import interpret_mode
from pallas.state_pass import Tuning

kernels = functools.partial(gated_delta_rule_2, implementation="pallas")


def draw(length=100, key_dim=128, **options):
    options = {"dtype": "bfloat16", **options}
    return operator_inputs(1, length, 1, key_dim, **options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"regime": "mixture", "segments": 4}, id="gates from 0 to -1000, segments"),
        pytest.param({"regime": "repeated_keys", "value_heads": 2}, id="repeated keys, grouped"),
        pytest.param({"regime": "g=-20", "dtype": "float16"}, id="strong gates, fp16"),
        pytest.param({"key_dim": 64, "value_heads": 3, "segments": 3}, id="64 channels, grouped"),
        pytest.param({"value_dim": 64}, id="128 key and 64 value channels"),
    ],
)
def test_kernels_match_the_recurrence_without_races(options):
    with interpret_mode(detect_races=True):
        assert_matches_recurrence(kernels, draw(**options))
    assert not interpret_pallas_call.get_races().races_found


def test_forward_without_gradients_equals_the_one_that_saves_for_them():
    *arrays, state, _ = draw(value_heads=2)
    with interpret_mode():
        alone = kernels(*arrays, initial_state=state)
        saving = jax.vjp(lambda *x: kernels(*x, initial_state=state), *arrays)[0]
    for x, y in zip(alone, saving, strict=True):
        np.testing.assert_array_equal(x, y)


def both(arrays, state, cotangents, segment_ids):
    run = functools.partial(kernels, segment_ids=segment_ids)
    results, pullback = jax.vjp(lambda x, s: run(*x, initial_state=s), arrays, state)
    return results, pullback(cotangents)


@pytest.mark.parametrize("segments", [None, 3])
def test_kernels_lower_for_cuda_on_a_host_without_one(segments):
    *arrays, state, segment_ids = draw(segments=segments, value_heads=2)
    traced = jax.jit(both).trace(arrays, state, (arrays[2], state), segment_ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 4


@pytest.mark.parametrize("implementation", ["pallas", None])
def test_kernels_under_shard_map_lower_to_kernels_of_each_shard(implementation, monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_attached", lambda: True)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "tensor")
    inputs = operator_inputs(2, 100, 2, 128, dtype="bfloat16", initial_state=False)

    @jax.grad
    def gradient(arrays):
        run = functools.partial(gated_delta_rule_2, implementation=implementation)
        sharded = jax.shard_map(lambda *x: run(*x)[0], mesh=mesh, in_specs=spec, out_specs=spec)
        return sharded(*arrays).astype(jnp.float32).sum()

    text = jax.jit(gradient).trace(inputs[:6]).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 4


def test_kernels_refuse_more_sequences_than_a_grid_holds():
    shape = jax.ShapeDtypeStruct((65536, 1, 1, 128), jnp.bfloat16)
    g = jax.ShapeDtypeStruct(shape.shape, jnp.float32)
    with pytest.raises(NotImplementedError, match="up to 65535 sequences"):
        jax.eval_shape(kernels, shape, shape, shape, g, shape, shape)
    jax.eval_shape(gated_delta_rule_2, shape, shape, shape, g, shape, shape)


def test_a_state_pass_without_a_chunk_on_its_way_is_refused():
    with pytest.raises(ValueError, match="stages: expected at least 2, got 1"):
        Tuning(stages=1)


def test_the_default_is_the_kernels_where_a_hopper_gpu_is_attached(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_attached", lambda: True)
    *arrays, _, _ = draw(initial_state=False)
    traced = jax.jit(gated_delta_rule_2).trace(*arrays)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x._replace(v=x.v.astype(jnp.float32)), "v in bfloat16 or float16, got float32"),
        (
            lambda x: x._replace(**{n: getattr(x, n)[..., :96] for n in "qkgb"}),
            r"\(64, 128\) channels in q, got 96",
        ),
        (
            lambda x: x._replace(**{n: getattr(x, n)[..., :96] for n in "vw"}),
            "multiples of 64 value channels a key head, got 96",
        ),
    ],
)
def test_kernels_say_which_inputs_they_cannot_serve(change, why):
    inputs = change(draw(length=4, initial_state=False))
    with pytest.raises(NotImplementedError, match=why):
        kernels(*inputs[:6])
    gated_delta_rule_2(*inputs[:6])
