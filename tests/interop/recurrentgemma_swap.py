"""Trains and samples from a Griffin model of recurrentgemma whose local attention is GDN-2.

Run after the guide's block, in one process: it prints what tests/interop/test_guide.py compares.
"""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from recurrentgemma import common
from recurrentgemma.jax import Griffin, Sampler

sentences = ["the cat sat on the mat", "the dog sat on the log"] * 20
written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences),
    model_writer=written,
    vocab_size=40,
    pad_id=3,
    hard_vocab_limit=False,
    minloglevel=2,
)
vocab = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
recurrent, attention = common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION
config = common.GriffinConfig(
    vocab_size=vocab.vocab_size(),
    width=32,
    mlp_expanded_width=64,
    num_heads=2,
    block_types=(recurrent, attention),
    embeddings_scale_by_sqrt_dim=True,
    attention_window_size=16,
    logits_soft_cap=30.0,
)
model = Griffin(config, gradient_checkpointing=False)
ids = [vocab.bos_id()] + vocab.EncodeAsIds(". ".join(sentences))
tokens = jnp.array(ids[:264]).reshape(8, 33)
positions = jnp.tile(jnp.arange(32), (8, 1))
params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :1], positions[:1, :1])["params"]
optimizer = optax.adam(1e-2)


@jax.jit
def step(params, state):
    def loss(params):
        logits, _ = model.apply({"params": params}, tokens[:, :-1], positions, return_cache=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


state, losses = optimizer.init(params), []
for _ in range(30):
    params, state, value = step(params, state)
    losses.append(float(value))

# Prompts of several lengths, which the sampler pads on the left, and an empty one.
prompts = ["the cat", "the dog sat on", ""]
sampler = Sampler(model=model, vocab=vocab, params=params)
sampled = sampler(prompts, total_generation_steps=6, end_sampling_at_eos_token=False, echo=True)


@jax.jit
def logits_of(tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    return model.apply({"params": params}, tokens, positions, return_cache=False)[0]


def continue_by_full_forwards(prompt):
    ids = [vocab.bos_id(), *vocab.EncodeAsIds(prompt)]
    for _ in range(6):
        padded = np.pad(ids, (0, 32 - len(ids)))[None]
        ids.append(int(np.argmax(logits_of(padded)[0], axis=-1)[len(ids) - 1]))
    return ids


results = {
    "losses": [losses[0], losses[-1]],
    "swapped": sorted(params["blocks.1"]["attention_block"]["gdn2"]),
    "sampled": [row.tolist() for row in sampled.tokens],
    "expected": [continue_by_full_forwards(prompt) for prompt in prompts],
}
print(json.dumps(results))
