"""Google DeepMind's gemma with GDN-2 for its local attention, where that package is installed.

It brings some 150 others, so it is no part of this project's installations.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdn2_jax import GatedDeltaNet2

pytest.importorskip("gemma")

from gemma.gm.nn import _config, _modules, _transformer

LENGTH = 12


class GDN2(nn.Module):
    """The call of gemma's Attention."""

    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(self, x, segment_pos, cache, attn_mask):
        layer = GatedDeltaNet2(self.num_heads, self.head_dim, decode=True, parent=None)
        # gemma wants a shape in every call of `param`.
        params = self.param("gdn2", lambda key, *_, **__: layer.init(key, x)["params"], ())
        variables = {"params": params}
        if cache is not None and "gdn2" in cache:
            variables["cache"] = cache["gdn2"]
        y, updated = layer.apply(variables, x, mutable=["cache"])
        return None if cache is None else {**cache, "gdn2": updated["cache"]}, y


@pytest.fixture
def model(monkeypatch):
    """A small model of a local and a global layer."""
    original = _modules.Attention

    def attention(**options):
        if options["attn_type"] is _modules.AttentionType.LOCAL_SLIDING:
            return GDN2(options["num_heads"], options["head_dim"])
        return original(**options)

    attention.init_cache = original.init_cache
    monkeypatch.setattr(_modules, "Attention", attention)
    local, everywhere = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
    config = _config.TransformerConfig(
        num_embed=32,
        embed_dim=32,
        hidden_dim=64,
        num_heads=2,
        head_dim=16,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=(local, everywhere),
        sliding_window_size=4,
    )
    return _transformer.Transformer(config=config, dtype=jnp.float32, tokens="batch.tokens")


def test_gemma_trains_and_decodes_with_gdn2_for_its_local_attention(model):
    tokens = 1 + (jnp.arange(3, 7)[:, None] * jnp.arange(LENGTH) + 5) % 31
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    assert "w_proj" in params["layer_0"]["attn"]["gdn2"]
    assert "gdn2" not in params["layer_1"]["attn"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.apply({"params": params}, tokens[:, :-1]).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(60):
        params, state, value = step(params, state)
        losses.append(value)
    assert losses[-1] < 0.3 * losses[0]

    full = jax.jit(model.apply)({"params": params}, tokens).logits
    cache = model.init_cache(batch_size=4, dtype=jnp.float32, cache_length=LENGTH)
    advance = jax.jit(functools.partial(model.apply, {"params": params}))
    outputs = []
    for t in range(LENGTH):
        mask = jnp.broadcast_to(jnp.arange(LENGTH) <= t, (4, 1, LENGTH))
        positions = jnp.full((4, 1), t)
        output = advance(
            tokens[:, t : t + 1], positions=positions, cache=cache, attention_mask=mask
        )
        cache = output.cache
        outputs.append(output.logits)
    actual = jnp.concatenate(outputs, axis=1)
    np.testing.assert_allclose(actual, full, atol=1e-4 * jnp.abs(full).max())
