import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.mamba.mamba2 import mamba2, mamba2_step
from gdn2_jax.ops.mamba.scalar_decay import Layout, layout_for

ARRAYS = ("q", "k", "v", "g", "dt", "initial_state")


@pytest.fixture
def draw(log_decay):
    """A function that draws the array arguments of `mamba2`, [B, T, H] = [2, length, 4]."""

    def arguments(length, regime="gentle", dtype="float64", groups=2):
        rng = np.random.default_rng(0)
        normal = rng.standard_normal
        q, k = normal((2, 2, length, groups, 6))
        v, state = normal((2, length, 4, 5)), normal((2, 4, 6, 5))
        dt = np.abs(normal((2, length, 4)))
        g = log_decay(rng, dt.shape, regime)
        wide = "float64" if dtype == "float64" else "float32"
        with jax.enable_x64(True):
            low = (jnp.asarray(x, dtype) for x in (q, k, v))
            return (*low, *(jnp.asarray(x, wide) for x in (g, dt, state)))

    return arguments


def segments(length):
    """Borders inside chunks, at one and at the end of a span, and a segment of a single token."""
    ids = np.zeros((2, length), np.int32)
    for row, starts in enumerate(([16, 40, 41, 128], [3, 64, 200])):
        for start in starts:
            ids[row, start:] += 1
    return jnp.asarray(ids)


def run(*arrays, implementation="xla", segment_ids=None):
    *five, state = arrays
    return mamba2(
        *five, initial_state=state, segment_ids=segment_ids, implementation=implementation
    )


recurrence = functools.partial(run, implementation="recurrent")


def run_packed(*arrays, **options):
    return run(*arrays, segment_ids=segments(arrays[0].shape[1]), **options)


packed_recurrence = functools.partial(run_packed, implementation="recurrent")


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float64", 1e-10), ("float32", 2e-5), ("bfloat16", 1e-2)]
)
@pytest.mark.parametrize("regime", ["gentle", "mixture"])
def test_chunkwise_form_is_the_recurrence(draw, assert_same, regime, dtype, bound):
    # 300 tokens: spans of two chunks, the last one not full.
    assert layout_for(300) == Layout(300, chunk_size=64, spans=3, padded=384)
    assert_same(run_packed, packed_recurrence, draw(300, regime, dtype), bound)


def test_second_derivatives_are_those_of_the_recurrence(draw, assert_same):
    def curvature(*arrays, implementation):
        def loss(*arrays):
            return jnp.sum(jnp.sin(run(*arrays, implementation=implementation)[0]))

        return jax.grad(loss, argnums=tuple(range(6)))(*arrays)

    # Of a chunk and a half, so that states pass.
    forms = (functools.partial(curvature, implementation=x) for x in ("xla", "recurrent"))
    assert_same(*forms, draw(96), 1e-10)


@pytest.mark.parametrize("regime", ["0", "-20", "-1000"])
def test_extreme_decays_keep_full_precision(draw, assert_same, regime):
    # At -20 a gradient of g that took differences would be rounding error only.
    assert_same(run, recurrence, draw(37, regime, "float32", groups=1), 2e-5)


def test_worked_example():
    ones = jnp.ones((1, 3, 1, 1))
    dt = jnp.full((1, 3, 1), np.log(2))
    for implementation in ("xla", "recurrent"):
        o, _ = mamba2(ones, ones, ones, -dt, dt, implementation=implementation)
        np.testing.assert_allclose(o.ravel(), np.log(2) * np.array([1, 1.5, 1.75]), rtol=1e-6)


def test_without_decay_it_is_linear_attention(draw):
    q, k, v, g, dt, _ = draw(20, dtype="float32", groups=4)
    o, _ = mamba2(q, k, v, 0 * g, dt)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * np.tri(20)
    expected = jnp.einsum("bhts,bsh,bshv->bthv", scores, dt, v)
    np.testing.assert_allclose(o, expected, atol=1e-4)


def test_segments_are_sequences_of_their_own(draw):
    *tokens, state = map(np.asarray, draw(70, dtype="float32"))
    ids = np.asarray([[5] * 3 + [6] * 67] * 2)
    packed, last = jax.jit(run)(*tokens, state, segment_ids=ids)
    first, _ = jax.jit(run)(*tokens, state)
    second, alone = jax.jit(run)(*(x[:, 3:] for x in tokens), 0 * state)
    np.testing.assert_allclose(packed[:, :3], first[:, :3], atol=1e-5)
    np.testing.assert_allclose(packed[:, 3:], second, atol=1e-5)
    np.testing.assert_allclose(last, alone, atol=1e-5)


def test_prefill_and_steps_equal_one_pass(draw):
    *tokens, state = map(np.asarray, draw(70, dtype="float32"))
    expected, final = jax.jit(run)(*tokens, state)
    outputs, state = jax.jit(run)(*(x[:, :67] for x in tokens), state)
    np.testing.assert_allclose(outputs, expected[:, :67], atol=1e-5)
    step = jax.jit(mamba2_step)
    for t in range(67, 70):
        state, o = step(state, *(x[:, t] for x in tokens))
        np.testing.assert_allclose(o, expected[:, t], atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)


def test_the_past_and_other_rows_do_not_depend_on_a_token_to_the_last_bit(draw):
    *tokens, state = draw(70, dtype="float32")
    fn = jax.jit(run)
    changed = [x.at[1, 23:].multiply(1.5) for x in tokens]
    before, after = fn(*tokens, state)[0], fn(*changed, state)[0]
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1, :23], after[1, :23])
    assert jnp.all(jnp.any(before[1, 23:] != after[1, 23:], axis=(-1, -2)))


def test_it_maps_over_an_outer_axis(draw):
    arrays = draw(20, dtype="float32")
    mapped, _ = jax.jit(jax.vmap(lambda *x: run(*(a[None] for a in x))))(*arrays)
    np.testing.assert_allclose(mapped[:, 0], jax.jit(run)(*arrays)[0], atol=1e-5)


def test_memory_of_forward_and_backward_is_linear_in_time():
    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.bfloat16)
        v = jax.ShapeDtypeStruct((1, length, 16, 64), jnp.bfloat16)
        g = jax.ShapeDtypeStruct((1, length, 16), jnp.float32)

        def fn(arrays, cotangent):
            return jax.vjp(lambda *x: mamba2(*x)[0], *arrays)[1](cotangent)

        compiled = jax.jit(fn).lower((q, q, v, g, g), v).compile()
        return compiled.memory_analysis().temp_size_in_bytes, v.size * 2

    size, values = temporary(4096)
    assert size < 16 * values
    assert temporary(8192)[0] < 2.1 * size


BAD = {
    "q without groups": ({"q": np.ones((2, 5, 6))}, r"q: .*\[B T G K\].*\(2, 5, 6\)"),
    "k of another shape": ({"k": np.ones((2, 5, 2, 7))}, r"k: .*\(2, 5, 2, 6\).*\(2, 5, 2, 7\)"),
    "v of another length": ({"v": np.ones((2, 6, 4, 5))}, r"v: .*\(2, 5\).*\(2, 6\)"),
    "heads that do not divide": ({"v": np.ones((2, 5, 3, 5))}, "v: .*multiple of q's 2.*3"),
    "g with channels": ({"g": np.ones((2, 5, 4, 1))}, r"g: .*\(2, 5, 4\).*\(2, 5, 4, 1\)"),
    "dt of groups": ({"dt": np.ones((2, 5, 2))}, r"dt: .*\(2, 5, 4\).*\(2, 5, 2\)"),
    "integer q": ({"q": np.ones((2, 5, 2, 6), np.int32)}, "q: .*float32.*int32"),
    "g in bfloat16": ({"g": jnp.ones((2, 5, 4), jnp.bfloat16)}, "g: .*float32.*bfloat16"),
    "state transposed": (
        {"initial_state": np.ones((2, 4, 5, 6))},
        r"initial_state: .*\(2, 4, 6, 5\).*\(2, 4, 5, 6\)",
    ),
    "segment ids of floats": ({"segment_ids": np.ones((2, 5))}, "segment_ids: .*integer"),
    "implementation": ({"implementation": "cuda"}, "implementation: .*xla.*'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_is_named(draw, case):
    changes, message = BAD[case]
    arguments = dict(zip(ARRAYS, draw(5, dtype="float32")))
    changes = {
        name: x.astype(np.float32) if getattr(x, "dtype", None) == np.float64 else x
        for name, x in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        mamba2(**arguments | changes)


def test_there_is_no_kernel(draw):
    with pytest.raises(NotImplementedError, match="pallas"):
        run(*draw(5, dtype="float32"), implementation="pallas")
