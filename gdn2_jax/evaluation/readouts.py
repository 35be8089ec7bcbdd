"""What a language model has learnt, beside its loss: use of long context, recall, gates."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int, Int64

from gdn2_jax.data.packing import Excerpt, PackedSequences
from gdn2_jax.data.store import TokenStore
from gdn2_jax.layers.decay import decay_rate
from gdn2_jax.models import ModelConfig
from gdn2_jax.models.language_model import LanguageModel

# Number of positions whose logits are in memory at once.
_POSITIONS = 256


@functools.partial(jax.jit, static_argnames="config")
def token_results(
    config: ModelConfig,
    params: Any,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Returns the loss of each target in nats, and whether the model's first guess is right."""
    hidden: Any = LanguageModel(config).apply({"params": params}, inputs, head=False)
    kernel = params["lm_head"]["kernel"].astype(hidden.dtype)
    padding = -inputs.shape[1] % _POSITIONS

    def blocks(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), -1, _POSITIONS, *x.shape[2:]), 1, 0)

    def one(block):
        hidden, targets = block
        logits = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - chosen
        return loss, jnp.argmax(logits, axis=-1) == targets

    losses, right = (
        jnp.moveaxis(x, 0, 1).reshape(len(inputs), -1)[:, : inputs.shape[1]]
        for x in jax.lax.map(one, (blocks(hidden), blocks(targets)))
    )
    return losses, right


class LossByPosition(NamedTuple):
    """Losses of tokens by how much text stands before them.

    Attributes:
      ends: position after the last token of each bin.
      losses: mean loss of its tokens, in nats.
      windows: texts that were read.
      whole_documents: whether each is the start of one document; otherwise documents follow each
        other, since too few are that long.
    """

    ends: list[int]
    losses: list[float]
    windows: int
    whole_documents: bool


def loss_by_position(
    config: ModelConfig,
    params: Any,
    store: TokenStore,
    *,
    length: int,
    windows: int = 64,
    batch_size: int = 8,
    bins: int = 32,
) -> LossByPosition:
    """Evaluates held-out texts of `length` tokens, such as eight times those of training.

    At most `windows` texts are read: the starts of as many documents of that length. Positions are
    in `bins` of one size, whose number divides the length.
    """
    sizes = np.diff(store.offsets)
    long = np.flatnonzero(sizes > length)
    whole_documents = len(long) >= min(windows, 4)
    if whole_documents:
        chosen = long[np.linspace(0, len(long) - 1, min(windows, len(long))).astype(int)]
        starts = store.offsets[chosen]
    else:
        count = min(windows, (store.num_tokens - 1) // length)
        starts = np.arange(count) * length
    losses = []
    for i in range(0, len(starts), batch_size):
        # The last rows of the last batch are read twice, so that all batches have one shape.
        rows = starts[np.minimum(np.arange(i, i + batch_size), len(starts) - 1)]
        tokens = np.stack([store.tokens[s : s + length + 1] for s in rows]).astype(np.int32)
        loss, _ = token_results(config, params, tokens[:, :-1], tokens[:, 1:])
        losses.append(np.asarray(loss)[: len(starts) - i])
    means = np.concatenate(losses).mean(0, dtype=np.float64).reshape(bins, -1).mean(1)
    ends = np.arange(1, bins + 1) * (length // bins)
    return LossByPosition(ends.tolist(), means.tolist(), len(starts), whole_documents)


def count_in_training(
    store: TokenStore, training: TokenStore, vocab_size: int
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
    """Returns the pairs of neighbouring tokens in `store`, sorted, and how often training has each.

    A pair (first, second) is the number first * vocab_size + second.
    """
    pairs = np.unique(_pairs(store.tokens, vocab_size))
    counts = np.zeros(len(pairs) + 1, np.int64)
    for start in range(0, training.num_tokens - 1, 2**24):
        some = _pairs(training.tokens[start : start + 2**24 + 1], vocab_size)
        places = np.searchsorted(pairs, some)
        places[pairs[np.minimum(places, len(pairs) - 1)] != some] = len(pairs)
        counts += np.bincount(places, minlength=len(counts))
    return pairs, counts[:-1]


def _pairs(tokens, vocab_size: int) -> Int64[np.ndarray, "..."]:
    tokens = np.asarray(tokens).astype(np.int64)
    return tokens[..., :-1] * vocab_size + tokens[..., 1:]


class RareRecall(NamedTuple):
    """First guesses at the second token of pairs that are rare in training.

    Attributes:
      second: share of right guesses where the pair stood before in the same text, so that it can be
        recalled.
      first: accuracy where it did not: what the model knows without the text.
      second_count: how many tokens.
      first_count: how many tokens.
    """

    second: float
    first: float
    second_count: int
    first_count: int


def rare_recall(
    config: ModelConfig,
    params: Any,
    sequences: PackedSequences | Excerpt,
    *,
    pairs: Int64[np.ndarray, " N"],
    counts: Int64[np.ndarray, " N"],
    rare: int,
    batch_size: int,
) -> RareRecall:
    """Measures recall on real text: does a rare pair of tokens, once seen, come to mind again?

    As in "Zoology: measuring and improving recall" (arXiv 2312.04927), where pairs are called
    n-grams and the second occurrences "AR hits". `count_in_training` gives all pairs of tokens in the
    sequences and how often training has each; a pair is rare if that is less than `rare`.
    """
    vocab_size = config.vocab_size
    right, seen = [], []
    for start in range(0, len(sequences), batch_size):
        if start + batch_size > len(sequences) and start:
            break  # so that all batches have one shape
        rows = [sequences[i] for i in range(start, min(start + batch_size, len(sequences)))]
        inputs, targets = (np.stack(arrays) for arrays in zip(*(row[:2] for row in rows)))
        numbers = _pairs(np.concatenate([inputs, targets[:, -1:]], axis=1), vocab_size)
        places = np.minimum(np.searchsorted(pairs, numbers), len(pairs) - 1)
        is_rare = np.where(pairs[places] == numbers, counts[places], 0) < rare
        hits = np.asarray(token_results(config, params, inputs, targets)[1])
        right.append(hits[is_rare])
        seen.append(occurred_before(numbers)[is_rare])
    right, seen = np.concatenate(right), np.concatenate(seen)

    def share(which):
        return float(right[which].mean()) if which.any() else float("nan")

    return RareRecall(share(seen), share(~seen), int(seen.sum()), int((~seen).sum()))


def occurred_before(numbers: Int64[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """Whether each number stands in its row before, too."""
    before = np.ones(numbers.shape, bool)
    for row, numbers_of_row in zip(before, numbers, strict=True):
        row[np.unique(numbers_of_row, return_index=True)[1]] = False
    return before


class GateStatistics(NamedTuple):
    """The gates of a trained GDN-2, by layer.

    Attributes:
      erase: histogram of b over [0, 1], or [0, 2] if that is its range; shares of the tokens and
        channels, [layers][bins].
      write: a histogram of w over [0, 1].
      keep: a histogram of exp(g) over [0, 1].
      saturated: shares of b, w and exp(g) within a twentieth of either end of their range.
      correlation: over the tokens, of b's mean and w's mean in a head, for b's channels are those of
        keys and w's those of values; the mean over the heads. NaN where a gate does not move.
      difference: mean distance of these two means.
    """

    erase: list[list[float]]
    write: list[list[float]]
    keep: list[list[float]]
    saturated: dict[str, list[float]]
    correlation: list[float]
    difference: list[float]


def gate_statistics(
    config: ModelConfig, params: Any, inputs: Int[Array, "B T"], bins: int = 50
) -> GateStatistics:
    """Measures the gates of a model with a mixer of kind "gdn2" on a text.

    Raises:
      ValueError: if the model has another mixer.
    """
    if config.mixer.kind != "gdn2":
        raise ValueError(f"mixer: expected gdn2, got {config.mixer.kind}")
    gates = jax.device_get(_gates(config, params, inputs))
    upper = {
        "erase": 2.0 if config.mixer.allow_negative_eigenvalues else 1.0,
        "write": 1.0,
        "keep": 1.0,
    }
    histograms, saturated = {}, {}
    for name, layers in gates.items():
        top = upper[name]
        counts = [np.histogram(layer, bins, (0, top))[0] / layer.size for layer in layers]
        histograms[name] = [count.round(6).tolist() for count in counts]
        saturated[name] = [
            float(np.mean((layer < 0.05 * top) | (layer > 0.95 * top))) for layer in layers
        ]
    tokens = (1, 2)
    b, w = (np.asarray(gates[name], np.float64).mean(-1) for name in ("erase", "write"))
    difference = np.abs(b - w).mean((*tokens, 3))
    b, w = (x - x.mean(tokens, keepdims=True) for x in (b, w))
    with np.errstate(invalid="ignore"):
        correlation = (b * w).mean(tokens) / (b.std(tokens) * w.std(tokens))
    return GateStatistics(
        **histograms,
        saturated=saturated,
        correlation=correlation.mean(-1).tolist(),
        difference=difference.tolist(),
    )


@functools.partial(jax.jit, static_argnames="config")
def _gates(config, params, inputs) -> dict[str, Float[Array, "layers B T H C"]]:
    """b, w and exp(g) of all layers, from the results of the projections."""
    tied = config.mixer.write_gate == "tied"
    wanted = ("b_proj", "f_proj_1") if tied else ("b_proj", "w_proj", "f_proj_1")
    _, variables = LanguageModel(config).apply(
        {"params": params},
        inputs,
        head=False,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name in wanted,
    )
    flat: dict[Any, Any] = traverse_util.flatten_dict(variables["intermediates"])
    found = {path[-2]: value[0].astype(jnp.float32) for path, value in flat.items()}
    heads = config.mixer.num_heads

    def split(x):
        return x.reshape(*x.shape[:-1], heads, -1)

    def mean(value):
        return jnp.broadcast_to(value.mean(-1, keepdims=True), value.shape)

    def gate(logits, structure):
        value = jax.nn.sigmoid(split(logits))
        return mean(value) if structure == "scalar" else value

    mixer = params["layers"]["block"]["mixer"]
    a_log = mixer["A_log"][:, None, None, :, None]
    f = split(found["f_proj_1"]) + mixer["dt_bias"][:, None, None]
    if config.mixer.decay_lower_bound is None:
        g = -decay_rate(a_log, jnp.float32) * jax.nn.softplus(f)
    else:
        g = config.mixer.decay_lower_bound * jax.nn.sigmoid(decay_rate(a_log, jnp.float32) * f)
    scale = 2 if config.mixer.allow_negative_eigenvalues else 1
    erase = gate(found["b_proj"], config.mixer.erase_gate)
    return {
        "erase": scale * erase,
        "write": mean(erase) if tied else gate(found["w_proj"], config.mixer.write_gate),
        "keep": jnp.exp(g),
    }
