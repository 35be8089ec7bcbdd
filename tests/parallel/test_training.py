"""Training on meshes of eight simulated devices takes the steps that one device takes."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gdn2_jax.data import DataConfig
from gdn2_jax.models import Batch, DeltaRule, ModelConfig, SoftmaxAttention, StateSpace
from gdn2_jax.parallel import MeshConfig, gathered, make_mesh, on_mesh, put_batch
from gdn2_jax.training import OptimizerConfig, TrainingConfig
from gdn2_jax.training.run import check_mesh
from gdn2_jax.training.step import (
    abstract_state,
    compile_train_step,
    initial_state,
    state_shardings,
)

STEPS = 10


def configuration():
    model = ModelConfig(
        vocab_size=48,
        d_model=16,
        num_layers=4,
        hybrid=True,
        mixer=DeltaRule(num_heads=2, head_dim=8),
        attention=SoftmaxAttention(num_heads=2, window_size=12),
        mlp_dim=24,
        dtype="float32",
        remat="full",
        implementation="recurrent",
    )
    return TrainingConfig(
        model=model,
        data=DataConfig(sequence_length=40, reset_at_documents=True),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=0),
        steps=STEPS,
        global_batch_size=16,
        accumulation=2,
    )


def batches(config, count):
    """Documents of 1 to some 40 tokens that count upwards, so there is something to learn."""
    rng = np.random.default_rng(0)
    shape = (config.accumulation, config.microbatch_size, config.data.sequence_length)
    for _ in range(count):
        segment_ids = np.cumsum(rng.random(shape) < 0.05, axis=-1).astype(np.int32)
        tokens = (rng.integers(0, 48, shape[:2])[..., None] + np.arange(shape[2] + 1)) % 48
        tokens = tokens.astype(np.int32)
        weights = (rng.random(shape) < 0.9).astype(np.float32)
        yield Batch(tokens[..., :-1], tokens[..., 1:], weights, segment_ids)


@functools.cache
def compiled_step(mesh):
    return compile_train_step(configuration(), mesh)


@functools.cache
def first_state():
    return jax.device_get(jax.jit(initial_state, static_argnums=0)(configuration()))


def steps_on(mesh):
    """Metrics of each step, the first gradients (in AdamW's first moments) and all parameters."""
    config = configuration()
    state = jax.device_put(first_state(), state_shardings(config, mesh))
    metrics, gradients = [], None
    for batch in batches(config, STEPS):
        state, row = compiled_step(mesh)(state, put_batch(mesh, batch))
        metrics.append(jax.device_get(row))
        gradients = gradients or jax.device_get(state.opt_state[1][0].mu)
    return metrics, gradients, jax.device_get(state.params)


@functools.cache
def on_one_device():
    return steps_on(make_mesh(devices=jax.devices()[:1]))


def assert_same(actual, expected, tolerance):
    def compare(path, x, y):
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < tolerance, (jax.tree_util.keystr(path), error)

    jax.tree_util.tree_map_with_path(compare, actual, expected)


# With "data" alone training/test_step takes a step on eight devices; "fsdp" alone is a part of both
# meshes that have it.
MESHES = {
    "data 2, fsdp 4": MeshConfig(fsdp=4),
    "fsdp 2, sequence 2, tensor 2": MeshConfig(fsdp=2, sequence=2, tensor=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_ten_steps_on_a_mesh_are_those_of_one_device(name):
    """Documents and windows cross the borders of spans; of shorter spans test_layers tells."""
    expected_metrics, expected_gradients, expected_params = on_one_device()
    metrics, gradients, params = steps_on(make_mesh(MESHES[name]))
    assert_same(gradients, expected_gradients, 1e-5)
    np.testing.assert_allclose(metrics[0], expected_metrics[0], rtol=2e-6)
    np.testing.assert_allclose(metrics, expected_metrics, rtol=2e-4)
    assert expected_metrics[-1].loss < expected_metrics[0].loss - 0.3
    assert_same(params, expected_params, 1e-3)


@pytest.mark.slow
def test_no_device_holds_a_whole_sequence_or_the_whole_of_a_split_parameter():
    """Read off the shapes of the compiled program; a span has 20 tokens of 40."""
    mesh = make_mesh(MESHES["fsdp 2, sequence 2, tensor 2"])
    text = compiled_step(mesh).as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\[(\d[\d,]*)\]", text)}
    assert (4, 20, 16) in shapes
    assert not [shape for shape in shapes if 40 in shape]

    config = configuration()
    state = abstract_state(config, mesh)
    split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    assert sum(x.size for x in split) > 0.97 * sum(x.size for x in jax.tree.leaves(state))
    for x in (x for x in split if x.size >= 128):
        assert x.sharding.shard_shape(x.shape) in shapes
        assert x.shape not in shapes


def test_the_gradient_of_a_gathered_parameter_is_nowhere_summed_whole():
    mesh = make_mesh(MeshConfig(fsdp=8))
    names, whole = ("vocab", "embed"), ("vocab", None)

    def loss(table, ids):
        with on_mesh(mesh):
            return jax.numpy.sum(gathered(table, names, whole)[ids] ** 2)

    table = jax.ShapeDtypeStruct((48, 16), "float32", sharding=NamedSharding(mesh, P(None, "fsdp")))
    ids = jax.ShapeDtypeStruct((16, 8), "int32", sharding=NamedSharding(mesh, P("fsdp")))
    text = (
        jax.jit(jax.grad(loss), out_shardings=table.sharding).lower(table, ids).compile().as_text()
    )
    assert "f32[48,2]" in text
    assert not re.search(r"f32\[48,16\]\S* all-reduce", text)


@pytest.mark.slow
def test_what_the_forward_keeps_of_kernels_stays_split():
    """Their narrow copies are kept for the backward; gathered ones must not be."""
    config = configuration()
    model = dataclasses.replace(config.model, hybrid=False, dtype="bfloat16", remat="intermediates")
    mesh = make_mesh(MESHES["data 2, fsdp 4"])
    text = compile_train_step(dataclasses.replace(config, model=model), mesh).as_text()
    shapes = set(re.findall(r"\w+\[4,[\d,]*\]", text))
    assert "bf16[4,4,24]" in shapes
    assert not {"bf16[4,16,24]", "f32[4,16,24]"} & shapes


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        (
            {"mixer": DeltaRule(num_heads=3)},
            MeshConfig(tensor=2),
            "mixer.num_heads: expected a multiple of .*2, got 3",
        ),
        ({"mlp_dim": 30}, MeshConfig(tensor=4), "mlp_dim: expected a multiple of .*4, got 30"),
        (
            {"attention": SoftmaxAttention(num_heads=1)},
            MeshConfig(tensor=2),
            "attention.num_heads: .*2, got 1",
        ),
        (
            {"mixer": StateSpace(inner_dim=24, head_dim=8)},
            MeshConfig(tensor=2),
            "head_dim: .*2, got 3",
        ),
        ({"d_model": 20}, MeshConfig(fsdp=8), "d_model: expected a multiple of .*fsdp 8, got 20"),
        ({"mixer": StateSpace()}, MeshConfig(sequence=2), "sequence: expected 1 with mamba2, .* 2"),
        (
            {"mixer": SoftmaxAttention(kind="attention", num_heads=2)},
            MeshConfig(sequence=2),
            "sequence: expected 1 with attention",
        ),
        ({"length": 63}, MeshConfig(sequence=2), "sequence_length: .* multiple .* 2, got 63"),
        ({"rows": 4}, MeshConfig(fsdp=4), r"global_batch_size: .* of 16 .*= 8 .*, got 4"),
        ({}, MeshConfig(tensor=3), "the 8 devices, got data .the rest. x fsdp 1 .* tensor 3"),
        ({}, MeshConfig(data=2), "the 8 devices, got data 2 x fsdp 1 x sequence 1 x tensor 1"),
    ],
    ids=str,
)
def test_what_a_mesh_cannot_split_is_refused_by_name(changes, mesh, message):
    config = configuration()
    data = dataclasses.replace(config.data, sequence_length=changes.pop("length", 40))
    rows = changes.pop("rows", 16)
    model = dataclasses.replace(config.model, **changes)
    config = dataclasses.replace(config, model=model, data=data, global_batch_size=rows)
    with pytest.raises(ValueError, match=message):
        check_mesh(config, make_mesh(mesh))


def test_a_mesh_axis_has_at_least_one_device():
    with pytest.raises(ValueError, match="mesh.tensor: expected at least 1, got 0"):
        MeshConfig(tensor=0)
