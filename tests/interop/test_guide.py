"""The guide's blocks run as they stand, and what they build trains and decodes."""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "gdn2_jax" / "interop" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
LINEN, LOGICAL, NNX, OUTSIDE, RECURRENTGEMMA, PYTORCH, OPERATORS, EXPORT, SESSIONS = BLOCKS


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """What the blocks print in turn, as one script, and the names that each leaves."""
    names, after, printed = {}, {}, io.StringIO()
    with contextlib.chdir(tmp_path_factory.mktemp("guide")), contextlib.redirect_stdout(printed):
        for block in BLOCKS:
            if block != RECURRENTGEMMA:
                names = dict(names)
                exec(block, names)  # noqa: S102
                after[block] = names
    return printed.getvalue().splitlines(), after


def test_the_blocks_run_as_written(guide):
    assert guide[0] == [
        "(2, 8, 32) ['Dense_0', 'Dense_1', 'GatedDeltaNet2_0', 'LayerNorm_0', 'LayerNorm_1']",
        "('fsdp', 'tensor')",
        "True (32, 32)",
        "(2, 32) (2, 4, 8, 8)",
        "sigmoid model.layers.0.attn.w_proj.weight",
        "(3, 32)",
        "2 (2, 32)",
    ]


def test_a_user_writes_as_many_lines_as_the_guide_says():
    assert LINEN.count("# new") == 3 and "| flax.linen, as in flax's examples | 3, " in GUIDE
    assert LOGICAL.count("# new") == 3 and "as flax's lm1b | 3 |" in GUIDE
    assert OUTSIDE.count("# new") == 3 and "as bonsai's Qwen3 | 3 |" in GUIDE
    count = len([line for line in RECURRENTGEMMA.splitlines() if line])
    assert f"| recurrentgemma, from PyPI | {count} |" in GUIDE and count < 30


def test_a_swapped_linen_transformer_keeps_weights_trains_and_decodes(guide):
    linen = guide[1][LINEN]
    model, pretrained, params = linen["model"], linen["pretrained"], linen["params"]
    layers = model.gdn2_layers
    tokens = (np.arange(3, 7)[:, None] * np.arange(12) + 5) % 32
    positions = np.arange(12)[None]
    for i in range(2):
        block, old = dict(params[f"Block_{i}"]), dict(pretrained[f"Block_{i}"])
        assert ("GatedDeltaNet2_0" in block) == (i in layers)
        block.pop("GatedDeltaNet2_0", None)
        if i in layers:
            del old["MultiHeadDotProductAttention_0"]
        jax.tree.map(np.testing.assert_array_equal, block, old)
    np.testing.assert_array_equal(
        params["Embed_0"]["embedding"], pretrained["Embed_0"]["embedding"]
    )

    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.apply({"params": params}, tokens[:, :-1], positions[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(25):
        params, state, value = step(params, state)
        losses.append(value)
    assert losses[-1] < 0.3 * losses[0]

    # As flax's examples decode: a cache from init at full length, then token by token.
    full = jax.jit(model.apply)({"params": params}, tokens, positions)
    decoder = model.clone(decode=True)
    abstract = jax.eval_shape(decoder.init, jax.random.key(0), tokens, positions)["cache"]
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    advance = jax.jit(lambda *args: decoder.apply(*args, mutable=["cache"]))
    outputs = []
    for t in range(12):
        variables = {"params": params, "cache": cache}
        logits, updated = advance(variables, tokens[:, t : t + 1], positions[:, t : t + 1])
        cache = updated["cache"]
        outputs.append(logits)
    actual = np.concatenate(outputs, axis=1)
    np.testing.assert_allclose(actual, full, atol=1e-4 * np.abs(full).max())


def test_a_model_sharded_by_logical_axes_shards_the_layer_and_computes_the_same(guide):
    """A stand-in of flax's lm1b: no rules in force when parameters are made, only names."""
    names = guide[1][LOGICAL]
    layer = names["params"]["params"]["GatedDeltaNet2_0"]
    count = jax.device_count()
    for name in ("q_proj", "b_proj", "w_proj", "f_proj_0"):
        kernel = layer[name]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[0] == kernel.shape[0] // count
    rows = jax.NamedSharding(names["mesh"], jax.P("fsdp"))
    x = np.random.default_rng(0).normal(size=names["x"].shape).astype(np.float32)
    apply = jax.jit(names["block"].apply)
    actual = apply(names["params"], *jax.device_put((x, names["segment_ids"]), rows))
    expected = apply(jax.device_get(names["params"]), x, names["segment_ids"])
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_model_that_keeps_its_cache_outside_decodes_as_a_whole_call_does(guide):
    """A stand-in of bonsai's Qwen3, whose prompts are padded on the left."""
    names = guide[1][OUTSIDE]
    decoder, forward = names["decoder"], names["forward"]
    tokens = names["tokens"]
    before = jax.tree.map(jnp.copy, nnx.state(decoder))
    logits, cache = forward(decoder, decoder.init_cache(2), tokens)
    for _ in range(3):
        tokens = jnp.append(tokens, jnp.argmax(logits, -1)[:, None], axis=1)
        logits, cache = forward(decoder, cache, tokens[:, -1:])
    whole, _ = forward(decoder, decoder.init_cache(2), tokens)
    np.testing.assert_allclose(logits, whole, atol=1e-5)
    # Padding is as if it were not there, and no call has changed the module.
    alone, _ = forward(decoder, decoder.init_cache(1), tokens[:1, 2:])
    np.testing.assert_allclose(whole[:1], alone, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(decoder), before)


@pytest.mark.parametrize("name", ["chunk_kda", "chunk_gated_delta_rule"])
def test_gates_of_value_heads_in_half_precision_give_what_fla_defines(guide, name):
    names = guide[1][OPERATORS]
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 5, 2, 4)).astype(np.float32) / 2
    v = rng.normal(size=(1, 5, 4, 3)).astype(np.float32)
    gates = (1, 5, 4, 4) if name == "chunk_kda" else (1, 5, 4)
    g = -rng.random(gates).astype(np.float16)
    beta = rng.random((1, 5, 4)).astype(np.float32)
    o, state = names[name](q, k, v, g, beta, scale=1.0, implementation="recurrent")
    for head in range(4):
        expected = np.zeros((4, 3))
        for t in range(5):
            key, decay = k[0, t, head // 2].astype(np.float64), np.exp(g[0, t, head].astype(float))
            expected = np.reshape(decay, (-1, 1)) * expected
            expected += beta[0, t, head] * np.outer(key, v[0, t, head] - key @ expected)
            np.testing.assert_allclose(o[0, t, head], q[0, t, head // 2] @ expected, atol=1e-6)
        np.testing.assert_allclose(state[0, head], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("recurrentgemma") is None, reason="recurrentgemma is not installed"
)
def test_recurrentgemma_trains_and_samples_with_gdn2_for_its_local_attention(tmp_path):
    code = f"{RECURRENTGEMMA}\n{Path(__file__).with_name('recurrentgemma_swap.py').read_text()}"
    # -O leaves out the checks of types, which need an older typeguard.
    result = subprocess.run(
        [sys.executable, "-O", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout.splitlines()[-1])
    assert "w_proj" in results["swapped"]
    assert results["losses"][1] < 0.1 * results["losses"][0]
    assert results["sampled"] == results["expected"]
    assert len({tuple(row) for row in results["sampled"]}) == 3
