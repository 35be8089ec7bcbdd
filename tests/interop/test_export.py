"""Exported programs run in a process that has JAX and nothing of this package."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import gated_delta_rule_2, gated_delta_rule_2_step
from gdn2_jax.interop.export import export_decode, export_forward, export_prefill
from gdn2_jax.models import DeltaRule, LanguageModel, ModelConfig, SoftmaxAttention, generate
from gdn2_jax.models.sizes import abstract_variables
from gdn2_jax.ops import choice

SERVER = """
import sys
import jax, numpy as np

folder = sys.argv[1]
def program(name):
    with open(f"{folder}/{name}", "rb") as file:
        return jax.export.deserialize(bytearray(file.read()))

files = np.load(f"{folder}/params.npz")
params = {}
for name in files:
    *path, last = name.split("/")
    node = params
    for key in path:
        node = node.setdefault(key, {})
    node[last] = files[name]
tokens = np.load(f"{folder}/tokens.npy")
prefill, decode = program("prefill"), jax.jit(program("decode").call, donate_argnums=1)
logits, cache = prefill.call(params, tokens)
for _ in range(4):
    tokens = np.append(tokens, np.argmax(logits, -1)[:, None].astype(np.int32), 1)
    logits, cache = decode(params, cache, tokens[:, -1:])
np.save(f"{folder}/new.npy", tokens)
np.save(f"{folder}/logits.npy", program("forward").call(params, tokens))
assert not any(name.split(".")[0] in ("gdn2_jax", "flax", "pallas") for name in sys.modules)
"""


@pytest.fixture
def model(random_params):
    config = ModelConfig(
        vocab_size=31,
        d_model=32,
        num_layers=2,
        mixer=DeltaRule(num_heads=2, head_dim=8),
        hybrid=True,
        attention=SoftmaxAttention(num_heads=2, window_size=4),
        mlp_dim=24,
        dtype="float32",
    )
    return config, random_params(LanguageModel(config), jnp.zeros((1, 1), jnp.int32))


def test_a_fresh_process_serves_what_was_exported(model, tmp_path):
    config, params = model
    programs = {
        "forward": export_forward(config, params, length=9),
        "prefill": export_prefill(config, params, length=5),
        "decode": export_decode(config, params),
    }
    for name, exported in programs.items():
        assert exported.platforms == ("cpu", "cuda")
        (tmp_path / name).write_bytes(exported.serialize())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    flat = {"/".join(part.key for part in path): leaf for path, leaf in leaves}
    np.savez(tmp_path / "params.npz", **flat)
    # Another batch than any that was traced.
    prompt = np.random.default_rng(0).integers(0, 31, (3, 5), np.int32)
    np.save(tmp_path / "tokens.npy", prompt)
    result = subprocess.run(
        [sys.executable, "-c", SERVER, tmp_path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    served = np.load(tmp_path / "new.npy")
    expected = generate(config, params, prompt, max_new_tokens=4, temperature=0)
    np.testing.assert_array_equal(served, expected)
    logits = jax.jit(LanguageModel(config).apply)({"params": params}, served)
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), logits, atol=1e-5 * jnp.abs(logits).max()
    )


def kernel_sized(config, **options):
    """A configuration that the Hopper kernels serve, and its abstract parameters."""
    mixer = DeltaRule(num_heads=1, head_dim=128)
    config = dataclasses.replace(config, dtype="bfloat16", mixer=mixer, **options)
    return config, abstract_variables(config, 1)["params"]


def test_programs_are_the_same_on_a_machine_with_a_hopper_gpu(model, monkeypatch):
    programs = []
    for attached in (False, True):
        monkeypatch.setattr(choice, "hopper_attached", lambda a=attached: a)
        programs.append(export_decode(*kernel_sized(model[0])).mlir_module())
    assert programs[0] == programs[1]


def test_a_kernel_is_exported_for_its_platform_alone(model):
    sized = kernel_sized(model[0], implementation="pallas")
    exported = export_decode(*sized, batch_size=2, platforms=("cuda",))
    assert "mosaic_gpu" in exported.mlir_module() and len(exported.serialize()) > 0


@pytest.mark.parametrize("attached", [False, True], ids=["anywhere", "beside-a-hopper-gpu"])
def test_an_operator_of_any_batch_size_is_exported_at_the_kernels_sizes(monkeypatch, attached):
    monkeypatch.setattr(choice, "hopper_attached", lambda: attached)

    def arrays(*leading):
        shapes = [jax.ShapeDtypeStruct((*leading, 1, 128), jnp.bfloat16)] * 6
        shapes[3] = jax.ShapeDtypeStruct((*leading, 1, 128), jnp.float32)
        return shapes

    (batch,) = jax.export.symbolic_shape("batch")
    state = jax.ShapeDtypeStruct((batch, 1, 128, 128), jnp.float32)
    step = jax.export.export(jax.jit(gated_delta_rule_2_step), platforms=("cuda",))
    assert step(state, *arrays(batch)).in_avals[0].shape[0] == batch
    whole = jax.export.export(jax.jit(gated_delta_rule_2), platforms=("cpu", "cuda"))
    assert whole(*arrays(batch, 64)).in_avals[0].shape[0] == batch
    (length,) = jax.export.symbolic_shape("length")
    with pytest.raises(
        NotImplementedError, match='^q: only implementation="recurrent" takes a sym'
    ):
        whole(*arrays(2, length))
