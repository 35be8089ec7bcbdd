"""What mixers are made of: projections, parameters of heads, and the state between calls."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.short_convolution import ShortConvolution
from gdn2_jax.parallel import beside, dense_product, partitioned

_OF_THE_INPUT = frozenset(
    ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "w_proj", "g_proj", "f_proj_0", "g_proj_0")
)
"""Projections of mixers whose input is the layer's."""


@flax.struct.dataclass
class MergedKernels:
    """Kernels of projections that read the same input, side by side.

    Attributes:
      kernel: of all.
      columns: name, first and last column of each.
    """

    kernel: Float[Array, "*layers D F"]
    columns: tuple[tuple[str, int, int], ...] = flax.struct.field(pytree_node=False)


def merge_projections(params: dict, dtype: Any) -> dict:
    """Parameters whose layers project their input by one product, for decoding.

    A step of decoding is bound by reading weights: several small products read them more slowly than
    one large product does.

    Args:
      params: of a model or a layer.
      dtype: of the merged kernels, the model's compute dtype.

    Returns:
      The parameters with a `MergedKernels` named "merged" in each layer that has such projections,
      in their place. The kernels must not be split over devices.
    """
    children = {
        name: merge_projections(x, dtype) if isinstance(x, dict) else x
        for name, x in params.items()
    }
    names = [
        name for name in children if name in _OF_THE_INPUT and set(children[name]) == {"kernel"}
    ]
    if len(names) < 2:
        return children
    kernels = [children.pop(name)["kernel"].astype(dtype) for name in names]
    stops = list(itertools.accumulate(kernel.shape[-1] for kernel in kernels))
    columns = tuple(zip(names, [0, *stops], stops))
    return children | {"merged": MergedKernels(jnp.concatenate(kernels, axis=-1), columns)}


def dense(
    module: Any,
    name: str,
    features: int,
    axes: tuple[str | None, str | None] = ("embed", "heads"),
    *,
    kernel_init: Initializer | None = None,
    use_bias: bool = False,
    split_channels: bool = True,
) -> Callable[[Array], Array]:
    """A projection with the dtypes, the initialiser and the names of axes of `module`.

    It is a part of the merged product where there is one.

    `axes` are our names of the kernel's two axes; `split_channels` is that of `dense_product`.
    """
    merged = module.get_variable("params", "merged")
    for part, start, stop in merged.columns if merged else ():
        if part == name:
            return lambda x: dense_product(
                x.astype(merged.kernel.dtype), merged.kernel, (((x.ndim - 1,), (0,)), ((), ()))
            )[..., start:stop]
    like = module.kernel_init
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=partitioned(kernel_init or like, *axes, like=like),
        bias_init=partitioned(nn.initializers.zeros, axes[1], like=like),
        dot_general=functools.partial(dense_product, split_channels=split_channels),
        name=name,
    )


def short_convolution(module: Any, name: str, **options: Any) -> ShortConvolution:
    """A `ShortConvolution` with the size, dtype, names of axes and cache of `module`."""
    return ShortConvolution(
        module.conv_size,
        param_dtype=module.param_dtype,
        axes_like=module.kernel_init,
        decode=module.decode,
        name=name,
        **options,
    )


def per_head(module: Any, name: str, init: Callable[..., Array], *shape: int) -> Array:
    """A float32 parameter of `module`; its first axis is the heads."""
    names = ("heads", *(None for _ in shape[1:]))
    init = partitioned(init, *names, like=module.kernel_init)
    return module.param(name, init, shape, jnp.float32)


def from_cached_state(
    module: nn.Module,
    zeros: Mapping[str, Any],
    segment_ids: Int[Array, "B T"] | None,
    like: Array,
    advance: Callable[..., tuple],
) -> Array:
    """Runs `advance` from the state in the "cache" collection, and keeps the state after it.

    A row starts from zeros where the document of its first token is not that of its last token in
    the call before.

    Args:
      module: has the cache.
      zeros: shapes and dtypes of the state's arrays [B, ...], by their names in the cache.
      segment_ids: document of each token; None continues the last one.
      like: array [B, T, ...]; on a mesh of Explicit axes documents are split as its rows.
      advance: function of the state's arrays; returns the outputs and the arrays after them.

    Returns:
      The outputs.
    """
    variables = [
        module.variable("cache", name, jnp.zeros, x.shape, x.dtype) for name, x in zeros.items()
    ]
    document = module.variable("cache", "segment_id", jnp.zeros, like.shape[:1], jnp.int32)
    state = [variable.value for variable in variables]
    if segment_ids is not None:
        restarts = beside(segment_ids[:, 0], like) != beside(document.value, like)
        state = [jnp.where(jnp.expand_dims(restarts, range(1, x.ndim)), 0, x) for x in state]
    outputs, state = advance(*state)
    if not module.is_initializing():
        for variable, value in zip(variables, state, strict=True):
            variable.value = value
        if segment_ids is not None:
            document.value = segment_ids[:, -1].astype(jnp.int32)
    return outputs
