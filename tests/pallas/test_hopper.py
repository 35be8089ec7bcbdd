"""The Hopper kernels on a CPU: in GPU interpret mode, and lowered for CUDA."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import layout_inference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops import choice
from gdn2_jax.pallas.intra_chunk_forward import intra_chunk_forward
from gdn2_jax.pallas.mosaic import interpret_mode
from gdn2_jax.testing import assert_matches_recurrence, operator_inputs

kernels = functools.partial(gated_delta_rule_2, implementation="pallas")


def draw(length=100, key_dim=128, one_channel="", **options):
    """Inputs in which the gates named have one number a head."""
    inputs = operator_inputs(1, length, 1, key_dim, **{"dtype": "bfloat16", **options})
    return inputs._replace(**{name: getattr(inputs, name)[..., :1] for name in one_channel})


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"regime": "repeated_keys_borders", "value_heads": 2, "segments": 4},
            id="repeated keys, grouped, segments",
        ),
        pytest.param(
            {"regime": "borders", "dtype": "float16", "value_dim": 64},
            id="weak between strong, fp16, 128 key and 64 value channels",
        ),
        pytest.param(
            {"regime": "resets", "key_dim": 64, "value_heads": 3, "segments": 3},
            id="gates from 0 to -inf, 64 channels, grouped, segments",
        ),
        pytest.param(
            {"regime": "mixture", "length": 67, "one_channel": "bw"},
            id="one number a head to erase and to write",
        ),
        pytest.param(
            {"regime": "resets", "length": 67, "key_dim": 64, "value_dim": 128, "segments": 3}
            | {"one_channel": "gbw"},
            id="all gates one number a head, segments",
        ),
    ],
)
def test_kernels_match_the_recurrence_without_races(options, races_found):
    with interpret_mode(detect_races=True):
        assert_matches_recurrence(kernels, draw(**options))
    assert not races_found()


def test_a_race_is_found(races_found):
    def kernel(x, out, shared):
        thread = jax.lax.axis_index("wg")
        pl.when(thread == 0)(lambda: shared.__setitem__(..., x[...]))
        pl.when(thread == 1)(lambda: out.__setitem__(..., shared[...]))

    x = jnp.ones((64, 64))
    options = {"num_threads": 2, "thread_name": "wg", "out_type": jax.typeof(x)}
    with interpret_mode(detect_races=True):
        plgpu.kernel(kernel, scratch_types=[plgpu.SMEM(x.shape, x.dtype)], **options)(x)
    assert races_found()


@jax.jit
def both(arrays, state, cotangents, segment_ids):
    run = functools.partial(kernels, segment_ids=segment_ids)
    results, pullback = jax.vjp(lambda x, s: run(*x, initial_state=s), arrays, state)
    return results, pullback(cotangents)


def by_token(results):
    """What belongs to a token: o, dq, dk, dv, dg, db and dw, one array [T, 7, ...]."""
    (outputs, _), (gradients, _) = results
    arrays = (outputs, *gradients)
    return np.stack([np.asarray(x[0], np.float32) for x in arrays], axis=1)


def test_forward_without_gradients_equals_the_one_that_saves_for_them():
    *arrays, state, _ = draw(value_heads=2)
    with interpret_mode():
        alone = kernels(*arrays, initial_state=state)
        saving = jax.vjp(lambda *x: kernels(*x, initial_state=state), *arrays)[0]
    for x, y in zip(alone, saving, strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_bit_of_the_past_depends_on_the_future():
    *arrays, state, _ = draw(60, 64, regime="extremes")
    *others, _, _ = draw(60, 64, regime="borders", seed=1)
    ids = jnp.zeros((1, 60), jnp.int32)
    for cut in (5, 24, 56):
        past = (np.arange(60) < cut)[:, None, None]
        cotangents = jnp.where(past, 1, 0) * arrays[2], 0 * state
        changed = [jnp.where(past, x, y) for x, y in zip(arrays, others)]
        with interpret_mode():
            first, second = (by_token(both(x, state, cotangents, ids)) for x in (arrays, changed))
        np.testing.assert_array_equal(first[:cut], second[:cut])
        assert (first[cut:] != second[cut:]).any()


def test_a_nan_stays_in_its_document():
    *arrays, state, _ = draw(60, 64, regime="mixture")
    ids = jnp.asarray(np.repeat([0, 1, 2], [20, 16, 24])[None])
    rows = np.asarray(ids[0]) == 1

    def run(arrays, d_outputs):
        with interpret_mode():
            results = both(arrays, state, (d_outputs, state), ids)
        (_, final_state), (_, d_state) = results
        return by_token(results), np.stack([final_state, d_state])

    clean, clean_states = run(arrays, arrays[2])
    # k, v, g and the cotangent
    for n, value in ((1, np.nan), (2, np.nan), (3, np.nan), (3, np.inf), (6, np.nan)):
        dirty = [x if i != n else x.at[0, 25, 0, 3].set(value) for i, x in enumerate(arrays)]
        d_outputs = arrays[2] if n < 6 else arrays[2].at[0, 25, 0, 3].set(value)
        tokens, states = run(dirty, d_outputs)
        # dg is a sum over a chunk's rows, and an unknown gate moves the rounding of sums in its block
        # of 16; nothing else moves a bit.
        for i, (x, y) in enumerate(zip(np.moveaxis(tokens, 1, 0), np.moveaxis(clean, 1, 0))):
            tolerance = 1e-2 if n == 3 else 1e-5 if i == 4 else 0
            np.testing.assert_allclose(x[~rows], y[~rows], rtol=0, atol=tolerance)
        np.testing.assert_allclose(states, clean_states, rtol=0, atol=1e-2 if n == 3 else 0)
        lost = np.isnan(tokens).any(axis=(1, 2, 3))
        assert lost[25:36].all() and not lost[~rows].any()
        outputs_lost = np.isnan(tokens[:, 0]).any(axis=(1, 2))
        assert (outputs_lost[rows] == ((np.arange(20, 36) >= 25) & (n < 6))).all()


def test_the_default_lowers_for_cuda_to_the_kernels_on_each_shard_beside_a_hopper_gpu(monkeypatch):
    """On a host without one, in 64-bit mode too; for other platforms it lowers to none."""
    monkeypatch.setattr(choice, "hopper_attached", lambda: True)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec, of_states = P("data", None, "tensor"), P("data", "tensor")
    options = {"value_heads": 4, "segments": 3, "dtype": "bfloat16"}
    *arrays, ids = operator_inputs(2, 100, 2, 64, **options)

    @jax.jit
    @jax.grad
    def gradient(arrays):
        sharded = jax.shard_map(
            lambda ids, state, *x: gated_delta_rule_2(*x, initial_state=state, segment_ids=ids),
            mesh=mesh,
            in_specs=(P("data"), of_states, *[spec] * 6),
            out_specs=(spec, of_states),
        )
        outputs, final_state = sharded(ids, arrays[6], *arrays[:6])
        return outputs.astype(jnp.float32).sum() + final_state.sum()

    with jax.enable_x64(True):
        traced = gradient.trace(arrays)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 4
        assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_layouts_are_inferred_with_few_guesses_and_without_verifying_names(monkeypatch):
    """Both take time with the size of a kernel: they were most of what lowering takes."""
    guesses, same_names = [], []
    guess, name = layout_inference.conjure_assignment, layout_inference.ValueSite.__str__

    def count(*arguments):
        guesses.append(None)
        return guess(*arguments)

    def compare(site):
        if len(same_names) < 20:  # verifying takes long
            same_names.append(name(site) == name.__wrapped__(site))
        return name(site)

    monkeypatch.setattr(layout_inference, "conjure_assignment", count)
    monkeypatch.setattr(layout_inference.ValueSite, "__str__", compare)
    inputs = draw(64, 64, initial_state=False)[:6]
    gradient = jax.jit(jax.grad(lambda arrays: kernels(*arrays)[0].astype(jnp.float32).sum()))
    gradient.trace(inputs).lower(lowering_platforms=("cuda",))
    assert len(guesses) < 100  # 204 with a layout named at every load
    assert all(same_names)
    assert same_names or jax.__version_info__ >= (0, 12)  # which sorts no names


def test_kernels_refuse_more_sequences_than_a_grid_holds():
    shape = jax.ShapeDtypeStruct((65536, 1, 1, 128), jnp.bfloat16)
    g = jax.ShapeDtypeStruct(shape.shape, jnp.float32)
    with pytest.raises(NotImplementedError, match="up to 65535 sequences"):
        jax.eval_shape(kernels, shape, shape, shape, g, shape, shape)
    jax.eval_shape(gated_delta_rule_2, shape, shape, shape, g, shape, shape)


def test_a_kernel_refuses_an_operand_of_another_shape():
    x = jax.ShapeDtypeStruct((1, 64, 2, 128), jnp.bfloat16)
    short = jax.ShapeDtypeStruct((1, 64, 1, 128), jnp.float32)
    run = functools.partial(intra_chunk_forward, masks=None, scale=1.0, save=False)
    with pytest.raises(
        ValueError, match=r"^g: expected shape \(1, 64, 2, 128\), got \(1, 64, 1, 128"
    ):
        jax.eval_shape(run, x, x, x, short, x, x)


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
        (lambda x: x._replace(g=x.g[..., :1]), "one channel in g where b has one, too, got 128"),
    ],
)
def test_kernels_say_which_inputs_they_cannot_serve(change, why):
    inputs = change(draw(length=4, initial_state=False))
    with pytest.raises(NotImplementedError, match=why):
        kernels(*inputs[:6])
    gated_delta_rule_2(*inputs[:6])
