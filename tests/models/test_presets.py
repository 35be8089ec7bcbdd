import math

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax.models import PRESETS, LanguageModel


def parameters(name):
    model = LanguageModel(PRESETS[name])
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "blocks", "whole"),
    [
        ("gdn2_100M", 101_598_096, 150_750_864),
        ("gdn2_305M", 239_272_896, 304_809_920),
        ("swa_gdn2_100M", 78_683_544, 127_836_312),
        ("gdn2_1.3B", 1_302_638_112, 1_450_096_416),
        ("swa_gdn2_1.3B", 1_300_314_384, 1_447_772_688),
    ],
)
def test_parameter_counts_are_those_of_the_official_models(name, blocks, whole):
    params = parameters(name)
    assert (count(params["layers"]), count(params)) == (blocks, whole)


@pytest.mark.parametrize(
    ("name", "entries"), [("gdn2_1.3B", 18 * 22 + 3), ("swa_gdn2_1.3B", 9 * 22 + 9 * 7 + 3)]
)
def test_each_layer_has_the_leaves_of_the_official_state_dict(name, entries):
    params = parameters(name)
    # Scanned leaves stand for one entry a layer; the official attention fuses q, k and v.
    stacked = sum(leaf.shape[0] for leaf in jax.tree.leaves(params["layers"]))
    fused = 2 * 9 if "swa" in name else 0
    assert stacked - fused + len(jax.tree.leaves(params)) - len(
        jax.tree.leaves(params["layers"])
    ) == (entries)


def test_tiny_preset_is_small_and_hybrid():
    assert PRESETS["tiny"].hybrid and count(parameters("tiny")) < 2_000_000
