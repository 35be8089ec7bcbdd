import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.mamba.mamba2 import mamba2
from gdn2_jax.ops.mamba.mamba3 import (
    Mamba3Inputs,
    Mamba3State,
    Mamba3Weights,
    mamba3,
    mamba3_initial_state,
    mamba3_step,
)
from gdn2_jax.ops.mamba.scalar_decay import Layout, layout_for


@pytest.fixture
def draw(log_decay):
    """A function that draws inputs, weights and a state, B = 2, H = 4."""

    def arguments(length, ranks=1, regime="gentle", dtype="float64", groups=2):
        rng = np.random.default_rng(0)
        normal = rng.standard_normal
        heads, key_dim, value_dim, angles = 4, 6, 5, 2
        low = (
            *normal((2, 2, length, ranks, groups, key_dim)),
            *normal((2, 2, length, heads, value_dim)),
        )
        dt = np.abs(normal((2, length, heads)))
        g = log_decay(rng, dt.shape, regime)
        trapezoid = rng.uniform(size=dt.shape)
        rotation = np.pi * np.tanh(normal((2, length, angles)))
        weights = [*normal((2, heads, ranks, key_dim)), normal(heads)]
        weights += list(normal((3, heads, ranks, value_dim))) if ranks > 1 else []
        state = (
            rng.uniform(-3, 3, (2, heads, angles)),
            normal((2, heads, key_dim, value_dim)),
            normal((2, heads, ranks, key_dim)),
            normal((2, heads, value_dim)),
        )
        wide = "float64" if dtype == "float64" else "float32"
        # NumPy's: jnp would compile each small operation.
        low = [x.astype(jnp.dtype(dtype)) for x in low]
        full, weights, state = (
            [x.astype(wide) for x in arrays]
            for arrays in ((g, dt, trapezoid, rotation), weights, state)
        )
        return Mamba3Inputs(*low, *full), Mamba3Weights(*weights), Mamba3State(*state)

    return arguments


def segments(length):
    """Borders inside chunks, at one and at the end of a span, and a segment of a single token."""
    ids = np.zeros((2, length), np.int32)
    for row, starts in enumerate(([16, 40, 41, 128], [3, 64, 200])):
        for start in starts:
            ids[row, start:] += 1
    return ids


def run(inputs, weights, state, **options):
    return mamba3(inputs, weights, initial_state=state, **options)


recurrence = functools.partial(run, implementation="recurrent")


def run_packed(*arrays, **options):
    return run(*arrays, segment_ids=segments(arrays[0].v.shape[1]), **options)


def recurrence_in_pieces(inputs, weights, state):
    """The recurrence that keeps for its backward the states between pieces of 60 tokens alone.

    Without optimisation (tests/conftest.py) each step of a scan copies all that the scan stacks.
    """

    @jax.checkpoint
    def piece(state, inputs):
        outputs, state = recurrence(inputs, weights, state)
        return state, outputs

    pieces = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(len(x), -1, 60, *x.shape[2:]), 1, 0), inputs
    )
    state, outputs = jax.lax.scan(piece, state, pieces)
    return jnp.moveaxis(outputs, 0, 1).reshape(inputs.v.shape), state


packed_recurrence = functools.partial(run_packed, implementation="recurrent")


def at(inputs, t):
    return jax.tree.map(lambda x: x[:, t], inputs)


@pytest.mark.parametrize(
    ("ranks", "dtype", "bound"),
    [
        *((1, "float64", 1e-10), (1, "bfloat16", 2e-2)),
        *((4, "float64", 1e-10), (4, "float32", 2e-5)),
    ],
)
@pytest.mark.parametrize("regime", ["gentle", "mixture"])
def test_chunkwise_form_is_the_recurrence(draw, assert_same, regime, dtype, bound, ranks):
    # Spans of two chunks, the last one not full.
    assert layout_for(300, 1) == Layout(300, chunk_size=64, spans=3, padded=384)
    assert layout_for(300, 4) == Layout(300, chunk_size=16, spans=10, padded=320)
    arguments = draw(300, ranks, regime, dtype, groups=2 if ranks == 1 else 1)
    assert_same(run_packed, packed_recurrence, arguments, bound)


def test_gradients_stay_precise_over_spans_of_many_chunks(draw, assert_same):
    """Also those of the phases, whose terms nearly cancel over all tokens that follow."""
    length, ranks = 4200, 1
    layout = layout_for(length, ranks)
    assert layout.padded // layout.spans == 16 * layout.chunk_size
    arguments = draw(length, ranks, dtype="float32", groups=1)
    assert_same(run, recurrence_in_pieces, arguments, 2e-5)


@pytest.mark.parametrize("name", ["v", "rotation"])
def test_second_derivatives_are_refused(draw, name):
    inputs, *others = draw(30, ranks=2, dtype="float32")

    def second(form):
        """Only traced: what is refused, is refused then."""

        def steepness(x):
            def loss(inputs):
                return jnp.sum(form(inputs, *others)[0] ** 2)

            return jnp.sum(jax.grad(loss)(inputs._replace(**{name: x})).v ** 2)

        return jax.eval_shape(jax.grad(steepness), getattr(inputs, name))

    assert second(recurrence).shape == getattr(inputs, name).shape
    with pytest.raises(NotImplementedError, match="^implementation: expected .*got"):
        second(run)


@pytest.mark.parametrize("regime", ["0", "-20", "-1000"])
def test_extreme_decays_keep_full_precision(draw, assert_same, regime):
    assert_same(run, recurrence, draw(21, 2, regime, "float32"), 2e-5)


@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
def test_worked_example(implementation):
    """A state of one rotating pair that halves and turns by 90 degrees a token, by hand."""
    key = np.float32([1, 0]) * np.ones((1, 3, 1, 1, 1), np.float32)
    one, head = np.ones((1, 3, 1, 1), np.float32), np.ones((1, 3, 1), np.float32)
    decay, turn = np.float32(-np.log(2)) * head, np.float32(np.pi / 2) * head
    inputs = Mamba3Inputs(key, key, one, one, decay, head, head / 2, turn)
    none = np.zeros((1, 1, 2), np.float32)
    fn = jax.jit(functools.partial(mamba3, implementation=implementation))
    o, state = fn(inputs, Mamba3Weights(none, none, none[0, 0, :1]))
    gate = jax.nn.silu(1.0)
    np.testing.assert_allclose(o.ravel() / gate, [0.5, 0.5, 0.25], atol=1e-6)
    np.testing.assert_allclose(state.memory.ravel(), [-0.5, -0.25], atol=1e-6)


def test_fully_implicit_steps_without_rotation_are_mamba2(draw):
    inputs, weights, _ = draw(40, dtype="float32")
    q, k, v, z, g, dt, trapezoid, rotation = inputs
    inputs = inputs._replace(trapezoid=0 * trapezoid + 1, rotation=0 * rotation)
    weights = Mamba3Weights(*(0 * x for x in weights[:3]))
    o, state = jax.jit(mamba3)(inputs, weights)
    expected, memory = jax.jit(mamba2)(q[:, :, 0], k[:, :, 0], v, g, dt)
    np.testing.assert_allclose(o, expected * jax.nn.silu(z), atol=1e-5)
    np.testing.assert_allclose(state.memory, memory, atol=1e-5)


def test_ranks_without_values_leave_the_first_rank_alone(draw):
    inputs, weights, _ = draw(20, ranks=3, dtype="float32")
    first = np.arange(3)[:, None] == 0
    ones = np.ones_like(weights.v_rank)
    many = weights._replace(v_rank=ones * first, z_rank=ones, o_rank=ones * first)
    single = Mamba3Weights(weights.q_bias[:, :1], weights.k_bias[:, :1], weights.skip)
    fn = jax.jit(mamba3)
    expected, _ = fn(inputs._replace(q=inputs.q[:, :, :1], k=inputs.k[:, :, :1]), single)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(fn(inputs, many)[0], expected, atol=tolerance)


def test_only_differences_of_phases_matter(draw):
    inputs, weights, _ = draw(20, dtype="float32")
    zeros = mamba3_initial_state(inputs)
    turned = zeros._replace(phase=zeros.phase + 1.3)
    for fn in map(jax.jit, (run, recurrence)):
        expected, actual = fn(inputs, weights, zeros)[0], fn(inputs, weights, turned)[0]
        np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_phases_stay_precise_over_many_turns(draw):
    """The angle between keys and queries a token apart is as exact after 4,000 turns as at first."""
    length = 4000
    inputs, weights, _ = draw(1, dtype="float32")
    inputs = jax.tree.map(lambda x: np.repeat(x, length, 1), inputs)
    one = np.ones_like(inputs.dt)
    inputs = inputs._replace(rotation=0 * inputs.rotation + 2.5, dt=one, g=-0.1 * one)
    o, _ = jax.jit(mamba3)(inputs, weights)
    np.testing.assert_allclose(o[:, -1], o[:, 500], rtol=2e-5, atol=2e-4)


def test_segments_are_sequences_of_their_own(draw):
    inputs, weights, state = draw(70, ranks=4, dtype="float32")
    ids = np.asarray([[5] * 3 + [6] * 67] * 2)
    packed, last = jax.jit(run)(inputs, weights, state, segment_ids=ids)
    first, _ = jax.jit(run)(inputs, weights, state)
    nothing = jax.tree.map(np.zeros_like, state)
    second, alone = jax.jit(run)(at(inputs, slice(3, None)), weights, nothing)
    expected = np.concatenate([first[:, :3], second], axis=1)
    # Outputs reach 141.
    np.testing.assert_allclose(packed, expected, atol=2e-6 * np.abs(expected).max())
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), last, alone)


@pytest.mark.parametrize("ranks", [1, 4])
def test_prefill_and_steps_equal_one_pass(draw, ranks):
    inputs, weights, start = draw(70, ranks, dtype="float32")
    expected, final = jax.jit(run)(inputs, weights, start)
    outputs, state = jax.jit(run)(at(inputs, slice(0, 67)), weights, start)
    expected = np.asarray(expected)
    tolerance = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(outputs, expected[:, :67], atol=tolerance)
    step = jax.jit(mamba3_step)
    for t in range(67, 70):
        state, o = step(state, at(inputs, t), weights)
        np.testing.assert_allclose(o, expected[:, t], atol=tolerance)
    np.testing.assert_allclose(state.memory, final.memory, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_past_and_other_rows_do_not_depend_on_a_token_to_the_last_bit(draw, ranks):
    inputs, weights, state = draw(70, ranks, dtype="float32")
    fn = jax.jit(run)
    changed = jax.tree.map(np.copy, inputs)
    for x in changed:
        x[1, 23:] *= 0.7
    before, after = (np.asarray(fn(x, weights, state)[0]) for x in (inputs, changed))
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1, :23], after[1, :23])
    assert np.all(np.any(before[1, 23:] != after[1, 23:], axis=(-1, -2)))


def assert_close(actual, expected):
    pairs = zip(*map(jax.tree.leaves, jax.device_get((actual, expected))), strict=True)
    for x, y in pairs:
        assert np.linalg.norm(x - y) <= 2e-5 * np.linalg.norm(y)


def gradients(fn, inputs, weights, state, ids, cotangents):
    results, pullback = jax.vjp(lambda *x: fn(*x, segment_ids=ids), inputs, weights, state)
    return results, pullback(cotangents)


@pytest.fixture
def two_documents(draw):
    """Arguments of `gradients`, and what it makes of them: no cotangent is in the first document."""
    inputs, weights, state = draw(20, ranks=2, dtype="float32")
    ids = np.asarray([[0] * 7 + [1] * 13] * 2)
    cotangents = np.where(ids[..., None, None], np.cos(inputs.v), 0).astype(np.float32), state
    arguments = inputs, weights, state, ids, cotangents
    return arguments, jax.device_get(one_program(*arguments))


one_program = jax.jit(functools.partial(gradients, run))


def test_no_gradient_crosses_a_border(two_documents):
    _, (_, (of_inputs, _, of_state)) = two_documents
    for leaf in of_inputs:
        # The first token of a document has nothing to decay.
        assert np.all(leaf[:, :7] == 0) and np.all(np.any(leaf[:, 8:] != 0, axis=(0, 2)))
    assert not any(np.any(leaf) for leaf in of_state)


def test_vmap_runs_sequences_of_their_own(two_documents):
    (inputs, weights, state, ids, cotangents), expected = two_documents
    rows = jax.tree.map(lambda x: x[:, None], (inputs, state, ids, cotangents))
    mapped = jax.vmap(functools.partial(gradients, run), in_axes=(0, None, 0, 0, 0))
    actual = jax.device_get(jax.jit(mapped)(rows[0], weights, *rows[1:]))
    results, (of_inputs, of_weights, of_state) = actual
    of_weights = jax.tree.map(lambda x: np.sum(x, axis=0), of_weights)
    results, of_inputs, of_state = jax.tree.map(lambda x: x[:, 0], (results, of_inputs, of_state))
    assert_close((results, (of_inputs, of_weights, of_state)), expected)


def test_gradients_under_shard_map_equal_those_of_one_device(two_documents):
    (*arguments, ids, cotangents), expected = two_documents
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def sharded(inputs, weights, state, segment_ids):
        return jax.shard_map(
            lambda inputs, weights, state, ids: run(inputs, weights, state, segment_ids=ids),
            mesh=mesh,
            in_specs=(rows, replicated, rows, rows),
            out_specs=rows,
        )(inputs, weights, state, segment_ids)

    actual = jax.jit(functools.partial(gradients, sharded))(*arguments, ids, cotangents)
    assert_close(actual, expected)


def test_memory_of_forward_and_backward_is_linear_in_time():
    def temporary(length, ranks=4):
        def array(*shape, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct((1, length, *shape), dtype)

        head = array(16, dtype=jnp.float32)
        inputs = Mamba3Inputs(
            *(array(ranks, 1, 64), array(ranks, 1, 64), array(16, 64), array(16, 64)),
            *(head, head, head, array(16, dtype=jnp.float32)),
        )
        weight = jax.ShapeDtypeStruct((16, ranks, 64), jnp.float32)
        weights = Mamba3Weights(
            *(weight, weight, jax.ShapeDtypeStruct((16,), jnp.float32), weight, weight, weight)
        )

        def fn(inputs, weights, cotangent):
            return jax.vjp(lambda *x: mamba3(*x)[0], inputs, weights)[1](cotangent)

        compiled = jax.jit(fn).lower(inputs, weights, inputs.v).compile()
        return compiled.memory_analysis().temp_size_in_bytes, inputs.v.size * 2

    size, values = temporary(2048)
    assert size < 32 * values
    assert temporary(4096)[0] < 2.1 * size


BAD = {
    "q without ranks": ({"q": np.ones((2, 5, 2, 6))}, r"q: .*\[B T R G K\].*\(2, 5, 2, 6\)"),
    "k of another shape": ({"k": np.ones((2, 5, 1, 2, 8))}, r"k: .*\(2, 5, 1, 2, 6\).*8\)"),
    "v of another length": (
        {"v": np.ones((2, 6, 4, 5)), "z": np.ones((2, 6, 4, 5))},
        r"v: .*\(2, 5\).*\(2, 6\)",
    ),
    "z of another shape": ({"z": np.ones((2, 5, 4, 6))}, r"z: .*\(2, 5, 4, 5\).*6\)"),
    "heads that do not divide": (
        {"v": np.ones((2, 5, 3, 5)), "z": np.ones((2, 5, 3, 5))},
        "v: .*multiple of q's 2.*3",
    ),
    "dt with channels": ({"dt": np.ones((2, 5, 4, 1))}, r"dt: .*\(2, 5, 4\)"),
    "rotation by heads": ({"rotation": np.ones((2, 5, 4, 2))}, r"rotation: .*\[B T A\]"),
    "too many angles": ({"rotation": np.ones((2, 5, 4))}, "rotation: .*3.*4"),
    "integer v": ({"v": np.ones((2, 5, 4, 5), np.int32)}, "v: .*float32.*int32"),
    "dt in float16": ({"dt": np.ones((2, 5, 4), np.float16)}, "dt: .*float32.*float16"),
    "bias of another rank": ({"q_bias": np.ones((4, 2, 6))}, r"q_bias: .*\(4, 1, 6\)"),
    "skip by channel": ({"skip": np.ones((4, 5))}, r"skip: .*\(4,\).*\(4, 5\)"),
    "one rank weight": ({"v_rank": np.ones((4, 1, 5))}, "z_rank: .*1 ranks.*None"),
    "state transposed": (
        {"memory": np.ones((2, 4, 5, 6))},
        r"state.memory: .*\(2, 4, 6, 5\).*\(2, 4, 5, 6\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_is_named(draw, case):
    changes, message = BAD[case]
    changes = {n: x.astype(np.float32) if x.dtype == float else x for n, x in changes.items()}
    parts = draw(5, dtype="float32")
    replaced = [
        part._replace(**{name: x for name, x in changes.items() if name in part._fields})
        if not (isinstance(part, Mamba3State) and {"q", "k", "v"} & changes.keys())
        else part
        for part in parts
    ]
    with pytest.raises(ValueError, match=message):
        run(*replaced)


def test_several_ranks_need_their_weights(draw):
    inputs, weights, _ = draw(5, ranks=2, dtype="float32")
    with pytest.raises(ValueError, match="v_rank: .*2 ranks.*None"):
        mamba3(inputs, weights._replace(v_rank=None))


def test_unknown_implementations_and_kernels_are_refused(draw):
    arguments = draw(5, dtype="float32")
    with pytest.raises(ValueError, match="implementation: .*xla.*'cuda'"):
        run(*arguments, implementation="cuda")
    for kernels in ("pallas", "triton"):
        with pytest.raises(NotImplementedError, match=kernels):
            run(*arguments, implementation=kernels)
