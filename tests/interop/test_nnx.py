"""The nnx modules: the linen layers' numbers, and natural parts of an nnx transformer."""

import functools
import operator

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gdn2_jax import layers
from gdn2_jax.interop import functional
from gdn2_jax.interop import nnx as mixers

WIDTH, VOCABULARY = 16, 13
# One small module of each kind.
SMALL = {
    "GatedDeltaNet2": {"num_heads": 2, "head_dim": 8, "implementation": "recurrent"},
    "KimiDeltaAttention": {"num_heads": 2, "head_dim": 8, "implementation": "recurrent"},
    "GatedDeltaNet": {"num_heads": 2, "head_dim": 8, "implementation": "recurrent"},
    "Mamba2": {"num_heads": 2, "head_dim": 8, "state_dim": 4, "implementation": "recurrent"},
    "Mamba3": {"num_heads": 2, "head_dim": 8, "state_dim": 4, "implementation": "recurrent"},
    "Attention": {"num_heads": 2, "context_length": 16},
    "SlidingWindowAttention": {"num_heads": 2, "window_size": 4},
}


def make(name="GatedDeltaNet2", **options):
    options = SMALL[name] | options
    return getattr(mixers, name)(in_features=WIDTH, rngs=nnx.Rngs(0), **options)


def inputs(*shape):
    # NumPy's: jnp would compile each slice.
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@nnx.jit
def call(module, *args):
    return module(*args)


def test_every_mixer_is_here():
    others = {"ShortConvolution", "SwiGLU"}
    assert set(SMALL) == set(layers.__all__) - others
    assert all(issubclass(getattr(mixers, name), mixers.Mixer) for name in SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_module_is_the_linen_layer_and_decodes_to_the_same(name):
    module, x = make(name), inputs(2, 7, WIDTH)
    segment_ids = np.array([[0] * 7, [1] * 3 + [2] * 4])
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    initial = module.linen.lazy_init(nnx.Rngs(0).params(), shape)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, initial)

    full = call(module, x, segment_ids)
    expected = jax.jit(module.linen.apply)({"params": params}, x, segment_ids)
    np.testing.assert_array_equal(full, expected)

    module.init_cache(x.shape)
    advance = nnx.jit(lambda module, x, ids: module(x, ids, decode=True))
    spans = [(0, 4), (4, 5), (5, 6), (6, 7)]
    outputs = [advance(module, x[:, a:b], segment_ids[:, a:b]) for a, b in spans]
    scale = np.abs(full).max()
    np.testing.assert_allclose(np.concatenate(outputs, 1), full, atol=2e-5 * scale)
    module.init_cache(x.shape)
    np.testing.assert_array_equal(advance(module, x[:, :4], segment_ids[:, :4]), outputs[0])


def test_parameters_and_cache_are_attributes_and_variables():
    module = make(param_dtype=jnp.bfloat16)
    assert isinstance(module.q_proj.kernel, nnx.Param) and isinstance(module.A_log, nnx.Param)
    assert module.g_proj_1.bias.shape == (16,) and module.q_conv1d.kernel.shape == (4, 16)
    assert not jax.tree.leaves(nnx.state(module, nnx.Cache))
    module.init_cache((3, 1, WIDTH), jnp.bfloat16)
    assert isinstance(module.state, nnx.Cache) and module.state.shape == (3, 2, 8, 8)
    assert module.state.dtype == jnp.float32
    assert module.q_conv1d.inputs.shape == (3, 3, 16)
    assert module.q_conv1d.inputs.dtype == jnp.bfloat16

    graph, params, cache = nnx.split(module, nnx.Param, nnx.Cache)
    merged, x = nnx.merge(graph, params, cache), inputs(3, 2, WIDTH)
    np.testing.assert_array_equal(call(merged, x), call(module, x))
    # Writing an attribute is all it takes to change a weight.
    module.o_proj.kernel[...] = jnp.zeros_like(module.o_proj.kernel[...])
    assert not np.any(call(module, x))


def test_parameters_are_arrays_under_axis_rules_too():
    with nn.logical_axis_rules((("embed", None), ("heads", None))):
        module = make()
        assert isinstance(module.q_proj.kernel[...], jax.Array)
    assert nnx.eval_shape(module, inputs(1, 2, WIDTH)).shape == (1, 2, WIDTH)


def test_gradients_are_those_of_linen():
    module, x = make(), inputs(1, 5, WIDTH)

    def loss(module, x):
        return jnp.sum(jnp.square(module(x)))

    def linen_loss(params, x):
        return jnp.sum(jnp.square(module.linen.apply({"params": params}, x)))

    gradients = nnx.jit(nnx.grad(loss))(module, x)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    expected = jax.jit(jax.grad(linen_loss))(params, x)
    actual = nnx.to_pure_dict(gradients)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-9), actual, expected
    )


def test_a_view_of_a_model_decodes():
    module, x = make(), inputs(2, 3, WIDTH)
    view = nnx.view(module, decode=True, batch_size=2)
    np.testing.assert_allclose(call(view, x), call(module, x), atol=1e-6)
    assert jnp.any(view.state[...] != 0) and not hasattr(module, "state")


def test_a_linen_layer_goes_on_from_a_cache_that_its_caller_keeps():
    layer = layers.GatedDeltaNet2(**SMALL["GatedDeltaNet2"])
    x = inputs(2, 5, WIDTH)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    expected = jax.jit(layer.apply)({"params": params}, x)
    advance = jax.jit(functools.partial(functional.advance, layer))
    empty = cache = functional.empty_cache(layer, 2, WIDTH)
    first, cache = advance(params, cache, x[:, :4])
    last, _ = advance(params, cache, x[:, 4:])
    np.testing.assert_allclose(np.concatenate([first, last], 1), expected, atol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(empty))


def test_malformed_uses_are_named():
    with pytest.raises(ValueError, match="^decode: expected a cache, got none: call init_cache"):
        make(decode=True)(inputs(1, 1, WIDTH))
    with pytest.raises(ValueError, match="^x: expected a last axis of 16, got"):
        make()(inputs(1, 1, WIDTH + 1))
    with pytest.raises(ValueError, match="^expand_v: expected"):
        make(expand_v=0.3)
    with pytest.raises(TypeError, match="heads_of_cattle"):
        make(heads_of_cattle=3)


@pytest.mark.parametrize("name", SMALL)
def test_a_cache_of_another_batch_is_named(name):
    module = make(name, decode=True)
    module.init_cache((2, 1, WIDTH))
    with pytest.raises(ValueError, match="^cache: expected the batch of x, 3, got .* for 2"):
        module(inputs(3, 1, WIDTH))


def test_layers_stacked_by_vmap_are_scanned_with_remat_and_decode():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.attention = mixers.GatedDeltaNet2(
                in_features=WIDTH, rngs=rngs, **SMALL["GatedDeltaNet2"]
            )

        def __call__(self, x):
            return x + self.attention(x)

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return Layer(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def scan(layer, x):
        return nnx.remat(lambda layer, x: layer(x))(layer, x)

    def loop(layers, x):
        graph, state = nnx.split(layers)
        for i in range(2):
            x = nnx.merge(graph, jax.tree.map(operator.itemgetter(i), state))(x)
        return x

    layers, x = nnx.jit(lambda: stack(nnx.Rngs(0)))(), inputs(2, 4, WIDTH)
    assert layers.attention.q_proj.kernel.shape == (2, WIDTH, 16)
    results = []
    for run in (scan, loop):
        loss = nnx.value_and_grad(lambda layers, x, run=run: jnp.sum(jnp.square(run(layers, x))))
        results.append(nnx.jit(loss)(layers, x))
    chex.assert_trees_all_close(*map(nnx.to_pure_dict, (g for _, g in results)), rtol=1e-4)
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)

    full = nnx.jit(scan)(layers, x)
    nnx.vmap(lambda layer: layer.attention.init_cache(x.shape), out_axes=None)(layers)
    layers.set_attributes(decode=True)
    advance = nnx.jit(scan)
    decoded = jnp.concatenate([advance(layers, x[:, :2]), advance(layers, x[:, 2:])], axis=1)
    np.testing.assert_allclose(decoded, full, atol=2e-5 * jnp.abs(full).max())


class Block(nnx.Module):
    def __init__(self, use_attention, *, rngs):
        self.norm1 = nnx.RMSNorm(WIDTH, rngs=rngs)
        if use_attention:
            self.attention = nnx.MultiHeadAttention(
                num_heads=2, in_features=WIDTH, decode=False, rngs=rngs
            )
        else:
            self.attention = mixers.GatedDeltaNet2(
                num_heads=2, in_features=WIDTH, head_dim=8, implementation="recurrent", rngs=rngs
            )
        self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        options = {}
        if isinstance(self.attention, nnx.MultiHeadAttention) and not self.attention.decode:
            options["mask"] = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), **options)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A decoder in the style of flax's own nnx examples."""

    def __init__(self, attention_layers, *, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(i in attention_layers, rngs=rngs) for i in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def init_cache(self, shape):
        for block in self.blocks:
            block.attention.init_cache((*shape, WIDTH))


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(tokens[:, :-1]), tokens[:, 1:]
        )
        return losses.mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def advance(model, tokens):
    return jnp.argmax(model(tokens)[:, -1:], axis=-1)


@pytest.mark.slow
def test_an_nnx_transformer_trains_and_decodes():
    model = Transformer((1,), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    # Each row counts upwards by a step of its own, which only the past tells.
    starts, steps = jnp.arange(8)[:, None, None], jnp.arange(1, 5)[:, None]
    tokens = ((starts + steps * jnp.arange(12)) % VOCABULARY).reshape(-1, 12)
    losses = [float(train_step(model, optimizer, tokens)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]

    prompt, length = tokens[::5, :6], 12
    expected = prompt
    full = nnx.jit(lambda model, tokens: jnp.argmax(model(tokens), axis=-1))
    for _ in range(6, length):
        padded = jnp.pad(expected, ((0, 0), (0, length - expected.shape[1])))
        expected = jnp.append(expected, full(model, padded)[:, expected.shape[1] - 1][:, None], 1)

    model.set_attributes(decode=True)
    model.init_cache((prompt.shape[0], length))
    for t in range(prompt.shape[1]):  # nnx.MultiHeadAttention decodes one token at a time.
        token = advance(model, prompt[:, t : t + 1])
    generated = [prompt, token]
    for _ in range(6, length - 1):
        generated.append(advance(model, generated[-1]))
    np.testing.assert_array_equal(jnp.concatenate(generated, 1), expected)
    assert jnp.mean(expected == tokens[::5]) > 0.7
