"""The Triton kernels on a CPU: by Triton's interpreter, and compiled for GPUs that nobody has here.

Skipped without triton and jax-triton, 190 MB of compilers, which `make test` does not install.
"""

import functools
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.ops.arguments import segment_starts
from gdn2_jax.ops.gated_delta_rule_2.triton_kernels import form, plans
from gdn2_jax.testing import Regime, assert_matches_recurrence, operator_inputs

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported
triton = pytest.importorskip("triton", reason="needs triton (pip install gdn2-jax[triton])")
if importlib.util.find_spec("jax_triton") is None:  # Torch brings triton alone.
    pytest.skip("needs jax-triton (pip install gdn2-jax[triton])", allow_module_level=True)

LOCK = threading.Lock()
LIMITS = {80: 163, 89: 99, 90: 227}
"""KiB of shared memory that a program may take, by compute capability (CUDA C++ Programming Guide)."""
kernels = functools.partial(gated_delta_rule_2, implementation="triton")


class Memory:
    """What the interpreter asks of a PyTorch tensor and of its storage, over a NumPy array."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        pass

    copy_ = set_

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


def interpret(
    kernel,
    arguments,
    outputs,
    grid,
    *,
    num_warps,
    num_stages,
    **constants,
):
    """`form.call_kernel` by the interpreter; outputs begin as NaN, as memory may."""

    def run(*arrays):
        memory = iter(np.array(x) for x in arrays)
        operands = [x if isinstance(x, int) else Memory(next(memory)) for x in arguments]
        results = tuple(np.full(x.shape, np.nan, x.dtype) for x in outputs)
        with LOCK:  # the interpreter has global variables
            kernel[grid](*operands, *map(Memory, results), **constants)
        return results

    arrays = [x for x in arguments if not isinstance(x, int)]
    return jax.pure_callback(run, outputs, *arrays, vmap_method="sequential")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Kernels run by the interpreter, which takes bfloat16 for uint16 and truncates to it: mended here."""
    from triton import language as tl
    from triton.runtime import interpreter as module

    types = {tl.bfloat16: ml_dtypes.bfloat16, tl.float32: np.float32}
    convert, patch = module._convert_float, module._patch_lang_tensor

    def rounded(x, source, target, mode):
        if source not in types or target not in types:
            return convert(x, source, target, mode)
        bits = f"uint{target.primitive_bitwidth}"
        return np.ascontiguousarray(x).view(types[source]).astype(types[target]).view(bits)

    def dot(self, a, b, total, *_):
        wide = []
        for x in (a, b):
            if x.dtype == tl.bfloat16:
                wide.append(x.data.view(ml_dtypes.bfloat16).astype(np.float32))
            else:  # TF32 has the first eleven bits.
                wide.append((np.ascontiguousarray(x.data).view(np.int32) & -8192).view(np.float32))
        return module.TensorHandle(np.matmul(*wide) + total.data, total.dtype.scalar)

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        # NumPy no longer takes an array of one number for a number.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(module, "_convert_float", rounded)
    monkeypatch.setattr(module, "_patch_lang_tensor", patch_tensor)
    monkeypatch.setattr(module.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(form, "call_kernel", interpret)
    monkeypatch.setattr(form, "capability", lambda: 90)
    monkeypatch.setattr(form, "import_error", lambda: None)  # JAX's CPU version has nothing for it


@pytest.mark.parametrize(
    "options",
    [
        {"regime": "resets", "segments": 3, "value_heads": 2},
        {"regime": "repeated_keys_borders", "dtype": "bfloat16"},
        {"regime": "positive_keys", "dtype": "float16", "segments": 9},
        {"regime": "mixture", "heads": 2, "value_heads": 2, "initial_state": False},
    ],
    ids=lambda x: x["regime"],
)
def test_kernels_match_the_recurrence(options):
    options = {"heads": 1, **options}
    inputs = operator_inputs(1, 70, key_dim=20, value_dim=24, **options)
    assert_matches_recurrence(kernels, inputs)


def test_closed_gates_of_one_number_a_head_have_no_gradient():
    """Where keys repeat, its sum over channels would add up what the clamp leaves in each of them."""
    closed = Regime(-1000.0, keys="repeated", erase=(1.0, 1.0))
    inputs = operator_inputs(1, 30, 1, 128, 64, regime=closed, dtype="bfloat16")
    assert_matches_recurrence(kernels, inputs._replace(g=inputs.g[..., :1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_repeated_key_reads_from_the_state_what_was_written_last(dtype):
    """It reads a sum over the chunk that telescopes, in which the roundings of all rows would add up."""
    repeated = Regime(0.0, keys="repeated", erase=(1.0, 1.0))
    *six, state, _ = operator_inputs(1, 64, 1, 16, regime=repeated, dtype=dtype)
    key = np.asarray(six[1][0, 0, 0], np.float64)
    read, expected = (
        key @ np.asarray(run(*six, initial_state=state)[1][0, 0])
        for run in (kernels, functools.partial(gated_delta_rule_2, implementation="recurrent"))
    )
    assert np.linalg.norm(read - expected) < 1e-2 * np.linalg.norm(expected)


def test_steps_match_the_recurrence():
    inputs = operator_inputs(2, 3, 2, 20, 40, value_heads=4, regime="extremes")
    state = inputs.initial_state
    outputs = []
    for t in range(3):
        token = (x[:, t] for x in inputs[:6])
        state, o = gated_delta_rule_2_step(state, *token, implementation="triton")
        outputs.append(o)
    expected = gated_delta_rule_2(
        *inputs[:6], initial_state=inputs.initial_state, implementation="recurrent"
    )
    np.testing.assert_allclose(np.stack(outputs, 1), expected[0], atol=1e-6)
    np.testing.assert_allclose(state, expected[1], atol=1e-6)


def test_a_state_may_grow_beyond_the_range_of_fp16_inside_a_chunk():
    inputs = operator_inputs(1, 64, 1, 32, dtype="bfloat16")
    inputs = inputs._replace(k=5 * inputs.k)
    state, expected = (
        gated_delta_rule_2(*inputs[:6], implementation=x)[1] for x in ("triton", "xla")
    )
    assert 1e8 < np.abs(expected).max() < 1e30
    assert np.linalg.norm(state - expected) < 0.1 * np.linalg.norm(expected)


@jax.jit
def both(arrays, state, cotangents, segment_ids=None):
    def run(arrays, state):
        return kernels(*arrays, initial_state=state, segment_ids=segment_ids)

    results, pullback = jax.vjp(run, arrays, state)
    return results, pullback(cotangents)


def by_token(results):
    """What belongs to a token: o, dq, dk, dv, dg, db and dw."""
    (outputs, _), (gradients, _) = results
    return [np.asarray(x[0]) for x in (outputs, *gradients)]


def test_no_bit_of_the_past_depends_on_the_future():
    *arrays, state, _ = operator_inputs(1, 70, 1, 16, regime="extremes")
    *others, _, _ = operator_inputs(1, 70, 1, 16, regime="borders", seed=1)
    for cut in (5, 24, 66):
        past = np.arange(70) < cut
        cotangents = jnp.where(past[:, None, None], arrays[2], 0), 0 * state
        changed = [jnp.where(past[:, None, None], x, y) for x, y in zip(arrays, others)]
        first, second = (by_token(both(x, state, cotangents)) for x in (arrays, changed))
        for x, y in zip(first, second, strict=True):
            np.testing.assert_array_equal(x[past], y[past])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_stays_in_its_document(dtype):
    *arrays, state, _ = operator_inputs(1, 70, 1, 16, dtype=dtype)
    # Token 37 shares a block of 16 rows with the next document.
    ids = jnp.asarray(np.searchsorted([10, 39], np.arange(70), side="right"), jnp.int32)[None]
    cotangents = arrays[2], state
    clean = by_token(both(arrays, state, cotangents, ids))
    arrays[1] = arrays[1].at[0, 37].set(jnp.nan)
    dirty = by_token(both(arrays, state, cotangents, ids))
    for name, x, y in zip(("o", "dq", "dk", "dv", "dg", "db", "dw"), clean, dirty, strict=True):
        # dg is a sum over a chunk's rows.
        tolerance = 1e-4 * np.abs(x).max() if name == "dg" else 0
        x, y = (z[ids[0] != 1].astype(np.float64) for z in (x, y))
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance, err_msg=name)
    assert np.isnan(dirty[0][37:39]).all() and np.isfinite(dirty[0][:37]).all()


def test_mapped_over_inside_shard_map_a_gradient_is_as_without():
    inputs = operator_inputs(2, 20, 1, 16, segments=2)
    *arrays, state, ids = inputs

    def loss(arrays, state, ids):
        o, final = kernels(*arrays, initial_state=state, segment_ids=ids)
        return jnp.sum(o**2) + jnp.sum(final**2)

    def of_each(arrays, state, ids):
        one = jax.grad(lambda *x: loss(*jax.tree.map(lambda x: x[None], x)))
        return jax.vmap(one)(arrays, state, ids)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    mapped = jax.shard_map(of_each, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    gradients = jax.jit(mapped)(arrays, state, ids)
    for x, y in zip(gradients, jax.grad(loss)(arrays, state, ids), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 20])
def test_rematerialized_inside_a_scan_a_gradient_is_as_by_xla(length):
    inputs = operator_inputs(1, length, 1, 16)

    def loss(implementation, v):
        @jax.checkpoint
        def layer(v, _):
            arrays = inputs._replace(v=v)[:6]
            return gated_delta_rule_2(*arrays, implementation=implementation)[0], None

        return jnp.sum(jax.lax.scan(layer, v, length=2)[0] ** 2)

    ours, expected = (jax.grad(functools.partial(loss, x))(inputs.v) for x in ("triton", "xla"))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_an_exported_program_holds_no_kernels_where_none_named_them():
    inputs = operator_inputs(1, 20, 1, 16, segments=2)

    def gradients(run, *arrays):
        results, pullback = jax.vjp(run, *arrays)
        return results, pullback(results)

    def xla(*arrays):
        *six, state = arrays
        ids = inputs.segment_ids
        return gated_delta_rule_2(*six, initial_state=state, segment_ids=ids, implementation="xla")

    starts = segment_starts(inputs.segment_ids)
    run = functools.partial(form.triton, starts=starts, scale=0.25, portable=True)
    exported = jax.export.export(jax.jit(functools.partial(gradients, run)), platforms=("cpu",))
    results = exported(*inputs[:7]).call(*inputs[:7])
    expected = jax.jit(functools.partial(gradients, xla))(*inputs[:7])
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="jax.export takes no custom calls"):
        jax.export.export(jax.jit(kernels), platforms=("cuda",))(*inputs[:6])


def test_a_second_derivative_is_refused_by_name():
    inputs = operator_inputs(1, 3, 1, 16)

    def loss(q):
        return jnp.sum(kernels(q, *inputs[1:6])[0] ** 2)

    with pytest.raises(NotImplementedError, match="differentiated once, in reverse mode"):
        jax.grad(lambda q: jnp.sum(jax.grad(loss)(q) ** 2))(inputs.q)


STORED = {
    (*map(int, sizes), dtype, capability)
    for capability, stored in plans.STORED.items()
    for _, *sizes, dtype in (name.removesuffix(" few").split() for name in stored)
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "key_dim, value_dim, dtype, capability",
    [
        (128, 128, "bfloat16", 80),
        (256, 256, "bfloat16", 89),
        (64, 64, "float32", 89),
        *sorted(STORED),
    ],
)
def test_kernels_fit_into_the_shared_memory_and_registers_of_gpus(
    key_dim, value_dim, dtype, capability
):
    script = Path(__file__).with_name("triton_resources.py")
    command = [sys.executable, script, *map(str, (key_dim, value_dim, dtype, capability))]
    compiled = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    report = subprocess.check_output(command, env=compiled, text=True)
    kernels = dict(line.split("\t", 1) for line in report.splitlines())
    # With few sequences the passes over states have other plans.
    assert len(kernels) == 10
    for numbers in kernels.values():
        shared, registers, warps = map(int, numbers.split("\t")[:3])
        assert shared <= LIMITS[capability] * 1024, report
        assert registers * 32 * warps <= 64 * 1024, report


def test_importing_the_package_imports_no_triton():
    code = "import sys, gdn2_jax; assert not {'triton', 'jax_triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
