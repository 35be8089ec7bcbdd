"""Compiles the Triton kernels for a GPU that need not be here, and prints what they take of it.

    python tests/ops/gated_delta_rule_2/triton_resources.py 128 128 bfloat16 89

Key channels, value channels, dtype, compute capability without its point. One line a kernel: name,
bytes of shared memory, registers of a thread, warps, and bytes of stack (spills) of a thread.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.ops.gated_delta_rule_2.triton_kernels import form, plans

TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


FEW, MANY = 2, 64
"""Sequences, for both kinds of plans of the passes over states."""


def launches(key_dim, value_dim, dtype, capability=90):
    """What the forward, the forward that saves, the backward and a decoding step launch."""
    recorded = {}

    def record(kernel, arguments, outputs, grid, **options):
        name = kernel.fn.__name__ + (" saving" if options.get("SAVE") else "")
        if "state_pass" in name and arguments[0].shape[0] == FEW:
            name += " few"
        recorded[name] = kernel, [*arguments, *outputs], options
        return tuple(jnp.zeros(x.shape, x.dtype) for x in outputs)

    form.call_kernel = record
    form.import_error = lambda: None
    form.capability = plans.capability = lambda: capability

    def arrays(batch):
        key, value = (jax.ShapeDtypeStruct((batch, 70, 2, d), dtype) for d in (key_dim, value_dim))
        decay = jax.ShapeDtypeStruct(key.shape, "float32")
        return key, key, value, decay, key, value

    def run(*arrays):
        return gated_delta_rule_2(*arrays, implementation="triton")

    def step(*arrays):
        state = jnp.zeros((FEW, 2, key_dim, value_dim))
        return gated_delta_rule_2_step(state, *(x[:, 0] for x in arrays), implementation="triton")

    for batch in (FEW, MANY):
        jax.eval_shape(run, *arrays(batch))
        jax.eval_shape(lambda *x: jax.vjp(run, *x)[1](run(*x)), *arrays(batch))
    jax.eval_shape(step, *arrays(FEW))
    return recorded


def resources(kernel, arguments, options, capability):
    """Bytes of shared memory, registers, warps and bytes of stack."""
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    given = iter("i32" if isinstance(x, int) else TYPES[x.dtype.name] for x in arguments)
    signature = {n: "constexpr" if n in options else next(given) for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, options, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
    registers, stack = (re.search(x, report)[1] for x in (r"REG:(\d+)", r"STACK:(\d+)"))
    return compiled.metadata.shared, int(registers), warps, int(stack)


if __name__ == "__main__":
    key_dim, value_dim, dtype, capability = sys.argv[1:]
    for name, launch in launches(int(key_dim), int(value_dim), dtype, int(capability)).items():
        print(name, *resources(*launch, int(capability)), sep="\t", flush=True)
