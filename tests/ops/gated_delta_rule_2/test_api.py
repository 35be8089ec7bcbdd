"""The public contract: dtypes, scale, choice of implementation, and an error for every misuse."""

import functools
import os
import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.ops.gated_delta_rule_2 import api
from gdn2_jax.ops.gated_delta_rule_2.chunkwise import chunkwise
from gdn2_jax.ops.gated_delta_rule_2.decode_step import decode_xla
from gdn2_jax.ops.gated_delta_rule_2.triton_kernels import form
from gdn2_jax.testing import OperatorInputs, operator_inputs

IMPLEMENTATIONS = ["xla", "recurrent"]


def draw(**options):
    return operator_inputs(2, 5, 2, 4, 3, value_heads=4, **options)


def step_arrays(inputs):
    return {"state": inputs.initial_state} | {
        name: getattr(inputs, name)[:, 0] for name in "qkvgbw"
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_result_and_cotangent_has_its_documented_dtype(implementation):
    inputs = draw()
    low = {
        "q": jnp.bfloat16,
        "k": jnp.float16,
        "v": jnp.float16,
        "b": jnp.bfloat16,
        "w": jnp.float32,
    }
    inputs = inputs._replace(**{n: getattr(inputs, n).astype(d) for n, d in low.items()})

    def fn(*arrays):
        *six, initial_state = arrays
        return gated_delta_rule_2(*six, initial_state=initial_state, implementation=implementation)

    def results(arrays):
        outputs, pullback = jax.vjp(fn, *arrays)
        return outputs, pullback(outputs)

    (outputs, state), gradients = jax.eval_shape(results, inputs[:7])
    assert (outputs.shape, outputs.dtype) == (inputs.v.shape, inputs.v.dtype)
    assert (state.shape, state.dtype) == ((2, 4, 4, 3), jnp.float32)
    for name, x, gradient in zip(OperatorInputs._fields, inputs, gradients):
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype), name


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_states_have_the_dtype_of_the_log_decay(dtype):
    inputs = draw(dtype=dtype, initial_state=False)
    with jax.enable_x64(True):
        outputs, state = jax.eval_shape(gated_delta_rule_2, *inputs[:6])
        arrays = step_arrays(draw(dtype=dtype))
        stepped, output = jax.eval_shape(lambda x: gated_delta_rule_2_step(**x), arrays)
    assert outputs.dtype == output.dtype == state.dtype == stepped.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale_multiplies_the_output_and_defaults_to_the_key_dimension(implementation):
    six = draw()[:6]
    fn = jax.jit(
        functools.partial(gated_delta_rule_2, implementation=implementation),
        static_argnames="scale",
    )
    default, state = fn(*six)
    scaled, scaled_state = fn(*six, scale=3.0)
    np.testing.assert_allclose(scaled, default * 6.0, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state, scaled_state)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_carry_the_scale(implementation):
    six = draw()[:6]

    def gradients(scale):
        def loss(*six):
            outputs, _ = gated_delta_rule_2(*six, scale=scale, implementation=implementation)
            return jnp.sum(outputs)

        return jax.jit(jax.grad(loss, argnums=range(6)))(*six)

    for one, twice in zip(gradients(1.0), gradients(2.0)):
        np.testing.assert_allclose(twice, 2 * one, rtol=1e-5, atol=1e-6)


def test_a_value_head_reads_its_groups_key_head():
    inputs = draw(initial_state=False)
    fn = jax.jit(gated_delta_rule_2)
    grouped, grouped_state = fn(*inputs[:6])
    key_side = {n: jnp.repeat(getattr(inputs, n), 2, axis=2) for n in "qkgb"}
    repeated, repeated_state = fn(*inputs._replace(**key_side)[:6])
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)
    np.testing.assert_allclose(grouped_state, repeated_state, atol=1e-6)


@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "tied"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gate_with_one_channel_counts_for_all_channels_of_its_head(implementation, heads):
    inputs = operator_inputs(2, 5, heads, 4, 3, value_heads=4)
    one = {n: getattr(inputs, n)[..., :1] for n in "gbw"}
    all_channels = {n: jnp.broadcast_to(x, getattr(inputs, n).shape) for n, x in one.items()}

    @jax.jit
    def run(gates):
        def fn(gates):
            arrays = inputs._asdict() | gates | {"implementation": implementation}
            tokens = {n: x[:, 0] for n, x in arrays.items() if n in "qkvgbw"}
            step = gated_delta_rule_2_step(inputs.initial_state, **tokens)
            return gated_delta_rule_2(**arrays), step

        results, pullback = jax.vjp(fn, gates)
        return results, pullback(results)[0]

    (results, gradients), (expected, of_channels) = run(one), run(all_channels)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), results, expected)
    for name, x in of_channels.items():
        np.testing.assert_allclose(gradients[name], x.sum(-1, keepdims=True), atol=1e-5)


def test_no_implementation_named_works_under_cross_lowering():
    lowered = jax.jit(gated_delta_rule_2).trace(*draw()[:6]).lower(lowering_platforms=("cuda",))
    assert "stablehlo" in lowered.as_text()


def test_numpy_arrays_are_accepted():
    inputs = draw()
    expected, _ = gated_delta_rule_2(*inputs[:6])
    outputs, _ = gated_delta_rule_2(*map(np.asarray, inputs[:6]))
    np.testing.assert_array_equal(outputs, expected)


def array(*shape, dtype=jnp.float32):
    return np.ones(shape, dtype)


BAD_INPUTS = {
    "q in a list": ({"q": [[1.0]]}, "q: .*B T Hk K.*(1, 1)"),
    "q of three dimensions": ({"q": array(2, 5, 4)}, "q: .*B T Hk K.*(2, 5, 4)"),
    "empty sequence": ({"q": array(2, 0, 2, 4)}, "q: .*non-empty.*(2, 0, 2, 4)"),
    "v of three dimensions": ({"v": array(2, 5, 4)}, "v: .*B T Hv V.*(2, 5, 4)"),
    "k of another length": ({"k": array(2, 6, 2, 4)}, "k: .*(2, 5, 2, 4).*(2, 6, 2, 4)"),
    "g without channels": ({"g": array(2, 5, 2)}, "g: .*(2, 5, 2, 4).*(2, 5, 2)"),
    "g of half the channels": ({"g": array(2, 5, 2, 2)}, "g: .*(2, 5, 2, 4).*1.*4.*(2, 5, 2, 2)"),
    "b on the value side": ({"b": array(2, 5, 4, 4)}, "b: .*(2, 5, 2, 4).*(2, 5, 4, 4)"),
    "w on the key side": ({"w": array(2, 5, 2, 4)}, "w: .*(2, 5, 4, 3).*(2, 5, 2, 4)"),
    "v of another batch": ({"v": array(1, 5, 4, 3), "w": array(1, 5, 4, 3)}, "v: .*(2, 5).*(1, 5)"),
    "heads that do not divide": (
        {"v": array(2, 5, 3, 3), "w": array(2, 5, 3, 3)},
        "v: .*multiple of q's 2.*3",
    ),
    "fewer value heads": (
        {"v": array(2, 5, 1, 3), "w": array(2, 5, 1, 3)},
        "v: .*multiple of q's 2.*1",
    ),
    "integer v": ({"v": array(2, 5, 4, 3, dtype=jnp.int32)}, "v: .*float32.*int32"),
    "complex q": ({"q": array(2, 5, 2, 4, dtype=jnp.complex64)}, "q: .*float32.*complex64"),
    "g in bfloat16": ({"g": array(2, 5, 2, 4, dtype=jnp.bfloat16)}, "g: .*float32.*bfloat16"),
    "state of another shape": (
        {"initial_state": array(2, 2, 4, 3)},
        "initial_state: .*(2, 4, 4, 3).*(2, 2, 4, 3)",
    ),
    "state transposed": (
        {"initial_state": array(2, 4, 3, 4)},
        "initial_state: .*(2, 4, 4, 3).*(2, 4, 3, 4)",
    ),
    "state in bfloat16": (
        {"initial_state": array(2, 4, 4, 3, dtype=jnp.bfloat16)},
        "initial_state: .*float32.*bfloat16",
    ),
    "segment ids of one row": (
        {"segment_ids": array(5, dtype=jnp.int32)},
        "segment_ids: .*(2, 5).*(5,)",
    ),
    "segment ids that are floats": (
        {"segment_ids": array(2, 5)},
        "segment_ids: .*integer.*float32",
    ),
    "unknown implementation": ({"implementation": "cuda"}, "implementation: .*xla.*'cuda'"),
    "infinite scale": ({"scale": float("inf")}, "scale: .*finite.*inf"),
    "array scale": ({"scale": array(2)}, "scale: .*number"),
}


def escape(pattern):
    return pattern.replace("(", r"\(").replace(")", r"\)")


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_a_bad_input_is_named_with_what_was_expected_and_what_came(case):
    changes, message = BAD_INPUTS[case]
    arguments = draw()._asdict() | changes
    with pytest.raises(ValueError, match=escape(message)):
        gated_delta_rule_2(**arguments)


# The cases that mean something without the time axis.
BAD_STEP_INPUTS = [
    "g of half the channels",
    "b on the value side",
    "w on the key side",
    "v of another batch",
    "heads that do not divide",
    "fewer value heads",
    "integer v",
    "complex q",
    "g in bfloat16",
    "unknown implementation",
    "infinite scale",
    "array scale",
]


@pytest.mark.parametrize("case", BAD_STEP_INPUTS)
def test_a_bad_input_of_the_step_is_named_too(case):
    changes, message = BAD_INPUTS[case]
    changes = {n: x[:, 0] if getattr(x, "ndim", 0) == 4 else x for n, x in changes.items()}
    message = escape(message.replace("5, ", "").replace(", 5", ","))
    with pytest.raises(ValueError, match=message):
        gated_delta_rule_2_step(**step_arrays(draw()) | changes)


def test_a_sequence_given_to_the_step_is_an_error():
    arrays = step_arrays(draw()) | {"q": draw().q}
    with pytest.raises(ValueError, match=r"q: .*\[B Hk K\].*\(2, 5, 2, 4\)"):
        gated_delta_rule_2_step(**arrays)


def test_a_bad_state_of_the_step_is_named():
    for state, message in (
        (jnp.ones((2, 4, 3, 4)), r"state: .*\(2, 4, 4, 3\).*\(2, 4, 3, 4\)"),
        (jnp.ones((2, 4, 4, 3), jnp.float16), "state: expected float32 or bfloat16 .*got float16"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_delta_rule_2_step(**step_arrays(draw()) | {"state": state})


def test_bad_seeds_of_the_rounding_are_named():
    narrow = jnp.ones((2, 4, 4, 3), jnp.bfloat16)
    for state, seeds, message in (
        (narrow, jnp.ones(2, int), r"expected shape \(2, 4\), got \(2,\)"),
        (narrow, jnp.ones((2, 4)), "expected integers, got float32"),
        (narrow.astype(float), jnp.ones((2, 4), int), "expected None beside a state in float32"),
    ):
        with pytest.raises(ValueError, match=f"^rounding_seeds: {message}"):
            gated_delta_rule_2_step(**step_arrays(draw()) | {"state": state}, rounding_seeds=seeds)


def test_float64_inputs_need_a_float64_log_decay_and_state():
    inputs = draw(dtype="float64")
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match="g: .*float64.*float32"):
            gated_delta_rule_2(*inputs._replace(g=inputs.g.astype(jnp.float32))[:6])
        with pytest.raises(ValueError, match="initial_state: .*float64.*float32"):
            gated_delta_rule_2(*inputs[:6], initial_state=inputs[6].astype(jnp.float32))
        with pytest.raises(ValueError, match="state: expected float64 beside .*got bfloat16"):
            state = inputs[6].astype(jnp.bfloat16)
            gated_delta_rule_2_step(**step_arrays(inputs) | {"state": state})


@pytest.mark.parametrize("kernels", ["pallas", "triton"])
def test_kernels_say_that_they_cannot_serve_here(kernels):
    inputs = draw()
    with pytest.raises(NotImplementedError, match=f'"{kernels}": .*; use "xla"'):
        gated_delta_rule_2(*inputs[:6], implementation=kernels)
    with pytest.raises(NotImplementedError, match=f'"{kernels}": .*; use "xla"'):
        gated_delta_rule_2_step(**step_arrays(inputs), implementation=kernels)


@pytest.mark.parametrize(
    "gpu, installed, key_dim, dtype, expected",
    [
        ("9.0", True, 64, "bfloat16", "pallas"),
        ("9.0", True, 96, "bfloat16", "triton"),
        ("9.0", True, 64, "float32", "triton"),
        ("8.0", True, 64, "bfloat16", "triton"),
        ("12.0", True, 64, "bfloat16", "triton"),
        ("8.0", False, 64, "bfloat16", "xla"),
        ("8.0", "broken", 64, "bfloat16", "xla"),
        ("8.0", True, 320, "bfloat16", "xla"),
        ("7.5", True, 64, "bfloat16", "xla"),
        ("gfx942", True, 64, "bfloat16", "xla"),
    ],
)
def test_none_takes_the_kernels_of_the_gpu_that_is_there(
    gpu, installed, key_dim, dtype, expected, monkeypatch
):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=gpu)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(form, "import_error", lambda: "broken" if installed == "broken" else None)
    chosen = []

    def noting(name, form):
        return lambda *arrays, scale, **_: chosen.append(name) or form(*arrays, scale)

    for name, module in (("pallas", "hopper"), ("triton", "triton")):
        monkeypatch.setattr(api, module, noting(name, chunkwise))
    monkeypatch.setattr(api, "decode_kernel", noting("pallas", decode_xla))
    monkeypatch.setattr(
        api, "decode_triton", lambda *x: chosen.append("triton") or decode_xla(*x[:7], None, x[7])
    )
    inputs = operator_inputs(1, 2, 1, key_dim, 64, dtype=dtype)
    if expected == "triton":  # In fp32 "xla" is faster there.
        wide = (jax.ShapeDtypeStruct((1, 2, 1, 192), "float32"),) * 6
        jax.eval_shape(lambda *x: gated_delta_rule_2(*x), *wide)
        assert not chosen
    jax.eval_shape(lambda *x: gated_delta_rule_2(*x), *inputs[:6])
    whole, chosen[:] = (chosen or ["xla"])[0], []
    jax.eval_shape(lambda x: gated_delta_rule_2_step(**x), step_arrays(inputs))
    assert whole == (chosen or ["xla"])[0] == expected


@pytest.mark.parametrize("implementation", [None, "pallas", "xla", "recurrent"])
def test_triton_is_imported_only_where_its_kernels_may_run(implementation, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(form, "import_error", lambda: pytest.fail("triton is imported"))
    monkeypatch.setattr(api, "hopper", lambda *arrays, scale=None: chunkwise(*arrays[:8], 1.0))
    monkeypatch.setattr(api, "decode_kernel", lambda *x, scale=None: decode_xla(*x[:8], 1.0))
    inputs = operator_inputs(1, 2, 1, 64, 64, dtype="bfloat16")
    run = functools.partial(gated_delta_rule_2, implementation=implementation)
    jax.eval_shape(run, *inputs[:6])
    step = functools.partial(gated_delta_rule_2_step, implementation=implementation)
    jax.eval_shape(lambda x: step(**x), step_arrays(inputs))


# What jax-triton 0.3 and 0.4 do to every Triton program of the process when they are imported.
JAX_TRITON = (
    'os.environ["TRITON_CACHE_DIR"] = ""',
    'os.environ.pop("TRITON_CACHE_DIR", None)',
    'os.environ["TRITON_CACHE_DIR"] = ""; raise ImportError("versions do not go together")',
)


@pytest.mark.parametrize("before", [None, "", "mine"])
@pytest.mark.parametrize("line", JAX_TRITON)
def test_other_triton_programs_of_the_process_keep_their_cache(line, before, tmp_path, monkeypatch):
    (tmp_path / "jax_triton.py").write_text(f"import os\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    del sys.modules["jax_triton"]
    monkeypatch.setenv("TRITON_CACHE_DIR", before or "")
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    error = form.import_error.__wrapped__()
    assert error is None or "versions do not go together" in error
    assert (error is None) == ("raise" not in line)
    assert os.environ.get("TRITON_CACHE_DIR") == before


def test_a_triton_that_cannot_be_imported_is_no_obstacle_to_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setattr(form, "capability", lambda: 80)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(form, "import_error", form.import_error.__wrapped__)
    inputs = draw()
    jax.eval_shape(gated_delta_rule_2, *inputs[:6])
    with pytest.raises(NotImplementedError, match="jax_triton cannot be imported .Module.*xla"):
        gated_delta_rule_2(*inputs[:6], implementation="triton")


def test_triton_says_that_it_has_no_state_in_bfloat16():
    arrays = step_arrays(draw()) | {"state": jnp.ones((2, 4, 4, 3), jnp.bfloat16)}
    with pytest.raises(NotImplementedError, match="keeps the state in float32, got bfloat16"):
        gated_delta_rule_2_step(**arrays, implementation="triton")
