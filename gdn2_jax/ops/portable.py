"""Keeps kernels out of programs that are exported, or that several platforms share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def unless_portable(
    kernels: Callable[..., tuple], form: Callable[..., tuple] | None, name: str
) -> Callable[..., tuple]:
    """`kernels`, but `form` where the program is exported or lowered for several platforms.

    Args:
      kernels: arrays -> arrays; not differentiated.
      form: computes the first results of `kernels`; the others are zeros. If None, such a program
        raises a NotImplementedError.
      name: of the implementation, for errors.
    """

    def call(*arrays):
        jaxpr = jax.make_jaxpr(kernels)(*arrays)
        return tuple(_kernels.bind(*arrays, kernels=jaxpr, form=form, name=name))

    return call


_kernels = Primitive("kernels_unless_portable")
_kernels.multiple_results = True
_kernels.def_abstract_eval(lambda *_, kernels, **__: kernels.out_avals)
_kernels.def_impl(lambda *arrays, kernels, **_: jaxpr_as_fun(kernels)(*arrays))


def _lower(context, *operands, kernels, form, name):
    program = context.module_context
    exported = program.lowering_parameters.for_export
    if form is not None and (exported or len(program.platforms) > 1):

        def whole(*arrays):
            results = form(*arrays)
            rest = kernels.out_avals[len(results) :]
            return *results, *(jnp.zeros(x.shape, x.dtype) for x in rest)

        return mlir.lower_fun(whole)(context, *operands)
    if exported:
        raise NotImplementedError(
            f'implementation="{name}": jax.export takes no custom calls without a guarantee of '
            'compatibility, as these kernels are; use None or "xla"'
        )
    return mlir.lower_fun(jaxpr_as_fun(kernels))(context, *operands)


mlir.register_lowering(_kernels, _lower)


def _differentiate(*_, name, **__):
    raise NotImplementedError(
        f'implementation="{name}": the kernels are differentiated once, in reverse mode; use "xla"'
    )


ad.primitive_jvps[_kernels] = _differentiate


def for_one_platform(x: jax.Array, name: str) -> jax.Array:
    """`x`; lowering it for several platforms raises a NotImplementedError naming the implementation."""
    return _one_platform.bind(x, name=name)


_one_platform = Primitive("for_one_platform")
_one_platform.def_abstract_eval(lambda x, **_: x)
_one_platform.def_impl(lambda x, **_: x)


def _lower_for_one_platform(context, x, *, name):
    if len(context.module_context.platforms) > 1:
        raise NotImplementedError(
            f'implementation="{name}": the kernels are for one platform; use None or "xla"'
        )
    return [x]


mlir.register_lowering(_one_platform, _lower_for_one_platform)
ad.deflinear2(_one_platform, lambda ct, _, name: [ct])
batching.defvectorized(_one_platform)
