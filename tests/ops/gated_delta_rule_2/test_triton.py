"""The Triton kernels on a CPU: by Triton's interpreter, and compiled for GPUs that nobody has here.

Skipped without triton, 190 MB of compilers, which `make test` does not install.
"""

import functools
import os

import jax
import ml_dtypes
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2
from gdn2_jax.ops.gated_delta_rule_2.triton import form
from gdn2_jax.testing import assert_matches_recurrence, operator_inputs

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported
triton = pytest.importorskip("triton", reason="needs triton (pip install triton)")

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
    input_output_aliases=None,
    **constants,
):
    """`form.call_kernel` by the interpreter; outputs begin as NaN, as memory may."""

    def run(*arrays):
        memory = iter(np.array(x) for x in arrays)
        operands = [x if isinstance(x, int) else Memory(next(memory)) for x in arguments]
        results = tuple(np.full(x.shape, np.nan, x.dtype) for x in outputs)
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
        wide = [
            x.data.view(ml_dtypes.bfloat16).astype(np.float32) if x.dtype == tl.bfloat16 else x.data
            for x in (a, b)
        ]
        return module.TensorHandle(np.matmul(*wide) + total.data, total.dtype.scalar)

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        # NumPy no longer takes an array of one number for a number.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(module, "_convert_float", rounded)
    monkeypatch.setattr(module, "_patch_lang_tensor", patch_tensor)
    monkeypatch.setattr(module.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(form, "call_kernel", interpret)
    monkeypatch.setattr(form, "_attached", lambda: True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("regime", ["resets", "repeated_keys_borders", "positive_keys"])
def test_kernels_match_the_recurrence(regime, dtype):
    inputs = operator_inputs(
        *(1, 70, 1, 20, 24), value_heads=2, regime=regime, dtype=dtype, segments=3
    )
    assert_matches_recurrence(kernels, inputs)
