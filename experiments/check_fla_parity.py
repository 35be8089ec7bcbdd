"""Holds the layer against flash-linear-attention's GatedDeltaNet2: same weights, same inputs.

    python experiments/check_fla_parity.py                   # on the CPU, by fla's naive recurrence
    python experiments/check_fla_parity.py --device cuda     # by fla's Triton kernels
    python experiments/check_fla_parity.py --device cuda --backward False   # compiles fewer of them

Needs torch, triton (to import fla, on the CPU as well), einops, packaging, fla-core and
flash-linear-attention (not its other dependencies). One line a tensor: the relative difference of the
two layers (Frobenius norm), and of each from ours in float64 by the token-by-token recurrence. Then
weights go to PyTorch and back: not a bit may change. The exit status is 1 when anything failed.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

# Both frameworks share the GPU; JAX would take most of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from gdn2_jax.command import require_positive, run_command

import jax
import jax.numpy as jnp

from gdn2_jax import GatedDeltaNet2
from gdn2_jax.interop.pytorch import (
    StoredTensor,
    layer_from_pytorch,
    layer_to_pytorch,
    open_tensors,
    write_tensors,
)
from gdn2_jax.rows import Column, format_header, format_row

# Bounds on the layers' difference. On a GPU fla multiplies float32 in TF32.
BOUNDS = {
    ("cpu", "float32"): 5e-6,
    ("cuda", "float32"): 5e-3,
    ("cpu", "bfloat16"): 3e-2,
    ("cuda", "bfloat16"): 3e-2,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The layer and its inputs."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Of both layers."""

    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16", "float32")
    """Of inputs and weights; A_log and dt_bias are always float32."""

    batch: int = 2
    """Sequences."""

    length: int = 200
    """Tokens in each; up to 64 fla runs its decoding kernel where there is no backward."""

    width: int = 256
    """Of the inputs."""

    heads: int = 2
    """Key heads."""

    value_heads: int = 4
    """Value heads."""

    head_dim: int = 128
    """Channels of each."""

    allow_negative_eigenvalues: bool = False
    """The erase gate reaches 2 instead of 1."""

    backward: bool = True
    """Compare the gradients of the inputs and of every weight, too."""

    seed: int = 0
    """Of weights and inputs."""

    def __post_init__(self):
        """Raises a ValueError naming the field."""
        require_positive(self, seed=0)


def main(options: Options) -> int:
    """Prints the table; returns the exit status."""
    start = time.perf_counter()
    try:
        import torch

        if options.device == "cuda":
            if not torch.cuda.is_available():
                raise ImportError("PyTorch finds no CUDA device")
            tune_nothing()
        module = import_fla(options.device)
    except ImportError as error:
        print(f"check_fla_parity.py: {error}", file=sys.stderr)
        return 1
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_platforms", "cpu" if options.device == "cpu" else "cuda,cpu")
    kind = jax.devices()[0].device_kind
    print(f"torch {torch.__version__}, jax {jax.__version__} on {kind}", flush=True)
    failed = 0
    for dtype in options.dtypes:

        def say(stage: str, dtype=dtype) -> None:
            seconds = time.perf_counter() - start
            print(f"{seconds:5.0f} s  {dtype}: {stage}", file=sys.stderr, flush=True)

        torch.manual_seed(options.seed)
        theirs = module.GatedDeltaNet2(
            hidden_size=options.width,
            num_heads=options.heads,
            num_v_heads=options.value_heads,
            head_dim=options.head_dim,
            allow_neg_eigval=options.allow_negative_eigenvalues,
        )
        theirs = theirs.to(options.device, getattr(torch, dtype))
        for parameter in (theirs.A_log, theirs.dt_bias):
            parameter.data = parameter.data.float()
        with torch.no_grad():
            theirs.o_norm.weight.uniform_(0.5, 1.5)
            theirs.g_proj[1].bias.normal_()
        failed += compare(options, dtype, theirs, say)
        changed = round_trip(theirs, layer(options))
        print(
            f"{dtype}: {len(theirs.state_dict())} weights there and back, changed: {changed}\n",
            flush=True,
        )
        failed += len(changed)
    if failed:
        print(f"FAILED: {failed} tensors differ", file=sys.stderr)
    return int(failed > 0)


def layer(options: Options, **attributes) -> GatedDeltaNet2:
    """Our layer with the sizes of fla's."""
    return GatedDeltaNet2(
        num_heads=options.heads,
        num_value_heads=options.value_heads,
        head_dim=options.head_dim,
        allow_negative_eigenvalues=options.allow_negative_eigenvalues,
        output_gate="sigmoid",
        **attributes,
    )


def compare(options: Options, dtype: str, theirs, say: Callable) -> int:
    """Prints the differences of outputs and gradients; returns how many are too large."""
    params = layer_from_pytorch(layer(options), host(theirs.state_dict()))
    rng = np.random.default_rng(options.seed)
    shape = (options.batch, options.length, options.width)
    x, cotangent = (rng.normal(size=shape).astype(params["q_proj"]["kernel"].dtype) for _ in "xy")

    def run_ours():
        ours = run(layer(options), params, x, cotangent, options.backward)
        say("ours")
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
            judge = layer(options, dtype=jnp.float64, implementation="recurrent")
            wide_x, wide_cotangent = x.astype(np.float64), cotangent.astype(np.float64)
            exact = run(judge, wide, wide_x, wide_cotangent, options.backward)
        say("ours in float64")
        return ours, exact

    # What XLA compiles and what Triton compiles, at the same time.
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(run_ours)
        fla = run_fla(theirs, x, cotangent, options, say)
        ours, exact = ours.result()

    bound = BOUNDS[options.device, dtype]
    columns = [
        Column(dtype, "name", width=-24),
        *(Column(name, name, ".1e") for name in ("ours - fla", "ours - exact", "fla - exact")),
        Column("bound", "bound", ".0e"),
    ]
    print(format_header(columns))
    failed = 0
    for name in fla:
        row = {"name": name, "bound": bound, "ours - fla": difference(ours[name], fla[name])}
        row["ours - exact"] = difference(ours[name], exact[name])
        row["fla - exact"] = difference(fla[name], exact[name])
        passed = row["ours - fla"] <= bound
        failed += not passed
        print(format_row(columns, row if passed else row | {"error": "NO"}), flush=True)
    return failed


def run_fla(theirs, x, cotangent, options: Options, say: Callable) -> dict[str, np.ndarray]:
    """Output and gradients of fla's layer, by the names of PyTorch."""
    import torch

    tensor = to_torch(x, options.device).requires_grad_(options.backward)
    with torch.set_grad_enabled(options.backward):
        output = theirs.train(options.backward)(tensor)[0]
    results = {"output": to_numpy(output)}
    say("fla forward")
    if options.backward:
        output.backward(to_torch(cotangent, options.device))
        results["d input"] = to_numpy(tensor.grad)
        results |= {f"d {name}": to_numpy(p.grad) for name, p in theirs.named_parameters()}
        say("fla backward")
    return results


def run(module, params, x, cotangent, backward: bool) -> dict[str, np.ndarray]:
    """Output and gradients of a layer of ours, by the names of PyTorch."""

    @jax.jit
    def evaluate(params, x, cotangent):
        output, vjp = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
        return output, vjp(cotangent) if backward else None

    output, gradients = evaluate(params, x, cotangent)
    results = {"output": np.asarray(output)}
    if backward:
        results["d input"] = np.asarray(gradients[1])
        weights = layer_to_pytorch(module, gradients[0])
        results |= {f"d {name}": gradient for name, gradient in weights.items()}
    return results


def round_trip(theirs, module) -> list[str]:
    """Weights that differ after fla -> ours -> a file -> fla."""
    import torch

    before = host(theirs.state_dict())
    arrays = layer_to_pytorch(module, layer_from_pytorch(module, before))
    stored = {n: StoredTensor(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "layer.pt"
        write_tensors(path, stored)
        after = torch.load(path, weights_only=True)
        reread = {name: tensor.read() for name, tensor in open_tensors(path).items()}
    theirs.load_state_dict(after, strict=True)
    return [
        name
        for name, tensor in before.items()
        if after[name].dtype != tensor.dtype
        or not torch.equal(after[name], tensor)
        or reread[name].tobytes() != arrays[name].tobytes()
    ]


def tune_nothing() -> None:
    """Leaves Triton one configuration of each kernel; call it before fla is imported.

    fla lists up to two dozen for each, and ships no tuned ones for this layer. Any will do where
    nothing is timed, but compiling and timing all takes many minutes. This takes the listed one with
    the fewest stages and the smallest tiles, which needs the least shared memory and compiles fast,
    of the usual four warps where there is one; or the next where that does not fit the GPU.
    """
    from triton.runtime.autotuner import Autotuner, OutOfResources

    def demand(config) -> tuple[int, int, int]:
        tiles = sum(size for size in config.kwargs.values() if isinstance(size, int))
        return config.num_stages, tiles, abs(config.num_warps - 4)

    def init(self, *args, wrapped=Autotuner.__init__, **kwargs):
        wrapped(self, *args, **kwargs)
        first, *self.others = sorted(self.configs, key=demand)
        self.configs = [first]

    def run(self, *args, wrapped=Autotuner.run, **kwargs):
        while True:
            try:
                return wrapped(self, *args, **kwargs)
            except OutOfResources:
                if not self.others:
                    raise
                self.configs = [self.others.pop(0)]

    Autotuner.__init__, Autotuner.run = init, run


def import_fla(device: str) -> types.ModuleType:
    """The module of fla's layer; on the CPU with its naive functions in the place of kernels.

    Raises:
      ImportError: something is not installed.
    """
    found = importlib.util.find_spec("fla")
    folders = (
        [Path(folder) / "layers" for folder in found.submodule_search_locations] if found else []
    )
    folders = [str(folder) for folder in folders if (folder / "gdn2.py").is_file()]
    if not folders:
        raise ImportError("flash-linear-attention with its layer gdn2 is not installed")
    if importlib.util.find_spec("transformers") is None:
        # The package itself would import all layers, and some of them that library.
        package = types.ModuleType("fla.layers")
        package.__path__ = folders
        sys.modules["fla.layers"] = package
    module = importlib.import_module("fla.layers.gdn2")
    if device == "cpu":
        use_naive(module)
    return module


def use_naive(module: types.ModuleType) -> None:
    """Replaces what fla has only as kernels by its naive recurrence and torch's own functions."""
    import torch
    from fla.ops.gdn2 import naive_recurrent_gdn2
    from torch.nn import functional

    def recurrence(q, k, v, g, b, w, initial_state, output_final_state, **_):
        q, k = (
            u.float() * torch.rsqrt(u.float().square().sum(-1, keepdim=True) + 1e-6) for u in (q, k)
        )
        o, state = naive_recurrent_gdn2(
            q, k, v, g, b, w, initial_state=initial_state, output_final_state=output_final_state
        )
        return o.to(v.dtype), state

    def convolution(self, x, **_):
        y = functional.conv1d(
            x.float().mT, self.weight.float(), padding=self.kernel_size[0] - 1, groups=x.shape[-1]
        )
        return functional.silu(y[..., : x.shape[1]].mT).to(x.dtype), None

    def gated_norm(self, x, z):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float() * torch.sigmoid(z.float())).to(x.dtype)

    module.chunk_gdn2 = module.fused_recurrent_gdn2 = recurrence
    module.ShortConvolution.forward = convolution
    module.FusedRMSNormGated.forward = gated_norm


def host(tensors) -> dict:
    """PyTorch tensors, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def to_torch(array: np.ndarray, device: str):
    """An array as a tensor of its dtype; NumPy's bfloat16 is unknown to PyTorch."""
    import torch

    wide = torch.tensor(array.astype(np.float32))
    return wide.to(device, getattr(torch, array.dtype.name))


def to_numpy(tensor) -> np.ndarray:
    """A tensor as float64."""
    return tensor.detach().double().cpu().numpy()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The relative difference in the Frobenius norm."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


if __name__ == "__main__":
    sys.exit(run_command("check_fla_parity.py", main, Options, __doc__))
