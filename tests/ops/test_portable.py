"""Exported programs, and those for several platforms, hold a form in place of kernels."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

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
