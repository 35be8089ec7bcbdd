"""Dtypes, precision and range of the chunkwise forms."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

HIGHEST = jax.lax.Precision.HIGHEST
"""Products exact to the dtype on every backend."""


class Arithmetic(NamedTuple):
    """What matrix products read; sums, decays, states and the inverse keep full precision.

    Attributes:
      operand: dtype of most operands.
      precision: of products whose operands stay in full precision.
    """

    operand: jnp.dtype
    precision: jax.lax.Precision

    def product(self, axes: str, a: Array, b: Array, dtype: jnp.dtype | None = None) -> Array:
        """A batched matrix product, e.g. "ck,kv->cv", accumulated in at least float32.

        The result has `dtype`, or that of the accumulation if None.
        """
        inputs, output = axes.split("->")
        left, right = inputs.split(",")
        return jnp.einsum(
            f"...{left},...{right}->...{output}",
            a,
            b,
            precision=self.precision,
            preferred_element_type=dtype or jnp.promote_types(a.dtype, jnp.float32),
        )


def arithmetic_for(inputs: tuple[Array, ...], full: jnp.dtype) -> Arithmetic:
    """bf16 operands where every input is bf16 or fp16, `full` otherwise.

    Float32 operands beside bf16 ones use the backend's default (TF32 on a GPU), which exceeds what
    the inputs hold; with float32 inputs products are exact to float32 on every backend. So do
    fp16 inputs alone: TF32 has fp16's digits, and sums, states and scaled cotangents may leave
    fp16's range.
    """
    if all(x.dtype == jnp.float16 for x in inputs):
        return Arithmetic(jnp.dtype(jnp.float32), jax.lax.Precision.DEFAULT)
    if all(x.dtype in (jnp.bfloat16, jnp.float16) for x in inputs):
        return Arithmetic(jnp.dtype(jnp.bfloat16), jax.lax.Precision.DEFAULT)
    return Arithmetic(jnp.dtype(full), HIGHEST)


def finite_log_decay(g: Array) -> Array:
    """`g` with every value below the range of exp, -inf too, raised to one whose sums are finite.

    Changes no decay and no gradient: exp of both, and of all sums that they enter, is zero.
    """
    return jnp.maximum(g, math.log(jnp.finfo(g.dtype).smallest_subnormal) - 1)
