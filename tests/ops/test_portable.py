"""Exported programs, and those for several platforms, hold a form in place of kernels."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2_step
from gdn2_jax.ops import choice
from gdn2_jax.ops.portable import unless_portable

X = jnp.arange(3.0)


def kernels(x):
    return x + 1, 2 * x


def form(x):
    return (x + 10,)


def test_a_portable_program_holds_the_form():
    run = jax.jit(unless_portable(kernels, form, "triton"))
    np.testing.assert_array_equal(run(X), (X + 1, 2 * X))
    for platforms in (("cpu",), ("cpu", "cuda")):
        exported = jax.export.export(run, platforms=platforms)(X)
        np.testing.assert_array_equal(exported.call(X), (X + 10, 0 * X))
    with pytest.raises(NotImplementedError, match="differentiated once"):
        jax.grad(lambda x: jnp.sum(run(x)[0]))(X)


def test_kernels_without_a_form_are_not_exported():
    run = jax.jit(unless_portable(kernels, None, "triton"))
    np.testing.assert_array_equal(run(X), (X + 1, 2 * X))
    with pytest.raises(
        NotImplementedError, match='implementation="triton": jax.export takes no cu'
    ):
        jax.export.export(run, platforms=("cuda",))(X)


def test_a_program_for_several_platforms_holds_the_hopper_kernels_for_one(monkeypatch):
    monkeypatch.setattr(choice, "hopper_attached", lambda: True)
    state, x = jnp.ones((1, 1, 128, 128)), jnp.ones((1, 1, 128), jnp.bfloat16)
    arrays = state, x, x, x, -jnp.ones(x.shape), x, x

    def step(implementation):
        run = functools.partial(gated_delta_rule_2_step, implementation=implementation)
        return jax.jit(jax.vmap(run))

    mapped = [y[None] for y in arrays]
    exported = jax.export.export(step(None), platforms=("cpu", "cuda"))(*mapped)
    assert "mosaic_gpu" in exported.mlir_module()
    for y, expected in zip(exported.call(*mapped), step("xla")(*mapped), strict=True):
        np.testing.assert_array_equal(y, expected)
    with pytest.raises(
        NotImplementedError, match='implementation="pallas": the kernels are for one'
    ):
        jax.export.export(step("pallas"), platforms=("cpu", "cuda"))(*mapped)
