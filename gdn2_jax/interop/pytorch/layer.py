"""The weights of one layer, for models that are not ours."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gdn2_jax.interop.pytorch.convert import (
    check_params,
    flatten,
    leaf_shapes,
    leaves_of_params,
    leaves_of_tensors,
    params_of_leaves,
    tensors_of_leaves,
)
from gdn2_jax.interop.pytorch.files import StoredTensor, unwrapped, without_wrappers
from gdn2_jax.interop.pytorch.layouts import Entry, layer_entries
from gdn2_jax.layers import (
    Attention,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    Mamba2,
    SlidingWindowAttention,
)

_MIXERS = {
    GatedDeltaNet2: "gdn2",
    KimiDeltaAttention: "kda",
    GatedDeltaNet: "gdn",
    Mamba2: "mamba2",
    SlidingWindowAttention: "attention",
    Attention: "attention",
}


def layer_from_pytorch(
    layer: nn.Module, tensors: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, Any]:
    """Returns a layer's parameters from a PyTorch state dict, in the state dict's dtypes.

    The names are as in the paper's repository and in flash-linear-attention. Their GDN-2 layers differ
    in `output_gate`: "silu" in the first, "sigmoid" in the second. Mamba-2's names are the same in
    mamba_ssm, transformers and flash-linear-attention. So is its function, which `Mamba2` computes
    where their `dt_limit` (`time_step_limit`) is (0, inf), `norm_before_gate` is False and biases
    are the convolution's alone; transformers' layer is `Mamba2(..., norm_groups=1)`.

    Args:
      layer: a `GatedDeltaNet2`, `KimiDeltaAttention`, `GatedDeltaNet`, `Mamba2` or attention module.
      tensors: NumPy arrays, PyTorch tensors, or the result of `open_tensors`.
      prefix: beginning of the names of the layer's tensors, as "model.layers.0.attn."; others
        are ignored. What torch.compile, DDP and FSDP put into names is taken out.

    Returns:
      The parameters, for `layer.apply({"params": params}, x)`.

    Raises:
      TypeError: the layer is of another kind.
      ValueError: tensors are missing, too many, of a wrong shape or not of floats; the message
        lists them all.
    """
    mixer, prefix = _mixer(layer), without_wrappers(prefix)
    own = {
        name.removeprefix(prefix): _stored(tensor)
        for name, tensor in unwrapped(tensors).items()
        if name.startswith(prefix)
    }
    name = f"{_output(mixer)}.weight"
    output = own.get(name)
    if output is None or len(output.shape) != 2:
        got = "none" if output is None else f"shape {output.shape}"
        raise ValueError(f"{prefix}{name}: expected a matrix, got {got}")
    abstract = _abstract_params(layer, width=output.shape[0])
    entries = _entries(mixer, abstract)
    return params_of_leaves(leaves_of_tensors(own, entries, leaf_shapes(abstract, entries)))


def layer_to_pytorch(
    layer: nn.Module, params: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Returns a PyTorch state dict of a layer's parameters, the inverse of `layer_from_pytorch`.

    Args:
      layer: as there.
      params: of the layer, as in `layer.init(...)["params"]`.
      prefix: put before every name.

    Returns:
      NumPy arrays, bfloat16 ones of ml_dtypes' type.

    Raises:
      TypeError: the layer is of another kind, or the parameters are no tree of dicts.
      ValueError: parameters are missing, too many or of a wrong shape; the message lists them all.
    """
    mixer, flat = _mixer(layer), flatten(params)
    output = flat.get((_output(mixer), "kernel"))
    if output is None or output.ndim != 2:
        raise ValueError(
            f"params: expected a layer's with {_output(mixer)}, got {', '.join(params)}"
        )
    check_params(params, _abstract_params(layer, width=output.shape[-1]))
    entries = _entries(mixer, params)
    tensors = tensors_of_leaves(leaves_of_params(params, entries), entries)
    return {prefix + name: np.asarray(t.read(), order="C") for name, t in tensors.items()}


def _mixer(layer: nn.Module) -> str:
    if getattr(layer, "num_householder", 1) > 1:
        raise TypeError(
            f"layer: expected num_householder 1, got {layer.num_householder}: "
            "flash-linear-attention orders the channels of several steps in another way"
        )
    for name in ("erase_gate", "write_gate"):
        if (structure := getattr(layer, name, "channel")) != "channel":
            raise TypeError(
                f"layer: expected {name} 'channel', as the PyTorch layers have no other, "
                f"got {structure!r}"
            )
    for kind, mixer in _MIXERS.items():
        if isinstance(layer, kind):
            return mixer
    names = ", ".join(kind.__name__ for kind in _MIXERS)
    got = f"{type(layer).__module__}.{type(layer).__name__}"
    raise TypeError(f"layer: expected a linen module, one of {names}, got {got}")


def _output(mixer: str) -> str:
    """The projection that tells the model's width."""
    return "out_proj" if mixer == "mamba2" else "o_proj"


def _abstract_params(layer: nn.Module, width: int) -> Any:
    x = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    return nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])


def _entries(mixer: str, params: Any) -> list[Entry]:
    """Those of the parameters that the layer has: convolutions and decay are optional."""
    flat = flatten(params)
    return [entry for entry in layer_entries(mixer) if all(path in flat for path in entry.paths)]


def _stored(tensor: Any) -> StoredTensor:
    if isinstance(tensor, StoredTensor):
        return tensor
    array = _numpy(tensor) if hasattr(tensor, "detach") else np.asarray(tensor)
    return StoredTensor(array.shape, array.dtype, lambda: array)


def _numpy(tensor: Any) -> np.ndarray:
    """The numbers of a PyTorch tensor; its own conversion does not know bfloat16."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
