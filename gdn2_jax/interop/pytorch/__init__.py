"""Weights of PyTorch models, both ways, without PyTorch.

Two naming styles: "paper", the paper's own repository, and "fla", flash-linear-attention and its
Hugging Face checkpoints.
"""

from gdn2_jax.interop.pytorch.files import StoredTensor, open_tensors, write_tensors
from gdn2_jax.interop.pytorch.layer import layer_from_pytorch, layer_to_pytorch
from gdn2_jax.interop.pytorch.model import (
    Pretrained,
    convert_pretrained,
    load_pretrained,
    pretrained_config,
    save_pretrained,
)

__all__ = [
    "Pretrained",
    "StoredTensor",
    "convert_pretrained",
    "layer_from_pytorch",
    "layer_to_pytorch",
    "load_pretrained",
    "open_tensors",
    "pretrained_config",
    "save_pretrained",
    "write_tensors",
]
