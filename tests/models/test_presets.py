import math

import jax
import pytest

from gdn2_jax.models import PRESETS, matched_preset, model_sizes
from gdn2_jax.models.sizes import abstract_variables

# Both count every preset, which is traced once a process.
pytestmark = pytest.mark.xdist_group("test_presets and test_mixer_table")

SCALES = [
    f"{prefix}{{}}_{size}"
    for size in ("tiny", "30M", "100M", "305M", "1.3B")
    for prefix in ("", "swa_")
]
RECURRENT = (
    *("gdn2", "kda", "gdn", "deltanet", "gated_deltaproduct"),
    *("mamba2", "mamba3", "mamba3_mimo"),
)


def shapes(name):
    return abstract_variables(PRESETS[name], 4096)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def state_floats(name):
    """Of each recurrent layer, for one sequence."""
    return model_sizes(PRESETS[name], 4096).state


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
    params = shapes(name)["params"]
    assert (count(params["layers"]), count(params)) == (blocks, whole)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("kda_1.3B", 1_300_647_456),
        ("swa_kda_1.3B", 1_303_300_368),
        ("gdn_1.3B", 1_302_417_216),
        ("swa_gdn_1.3B", 1_304_185_248),
        ("attention_1.3B", 1_305_953_280),
    ],
)
def test_parameter_counts_of_the_matched_paper_models(name, blocks):
    assert count(shapes(name)["params"]["layers"]) == blocks


@pytest.mark.parametrize(
    ("mixer", "count_of_one"),
    [
        ("gdn2", 29_454_480),
        ("kda", 20_054_160),
        ("gdn", 23_691_424),
        ("mamba2", 28_779_328),
        ("mamba3", 29_094_144),
        ("mamba3_mimo", 30_052_608),
        ("attention", 21_233_664),
    ],
)
def test_mixers_of_the_paper_models_have_as_many_parameters_as_their_authors_layers(
    mixer, count_of_one
):
    for name, layers in ((f"{mixer}_1.3B", 18), (f"swa_{mixer}_1.3B", 9)):
        block = shapes(name)["params"]["layers"]["block"]
        assert count(block["mixer"]) == layers * count_of_one


@pytest.mark.parametrize("scale", SCALES)
def test_all_mixers_of_a_scale_match_in_parameters_and_recurrent_ones_in_state(scale):
    def block_parameters(mixer):
        return model_sizes(PRESETS[scale.format(mixer)], 4096).block_parameters

    blocks = block_parameters("gdn2")
    state = state_floats(scale.format("gdn2"))
    for mixer in RECURRENT:
        assert state_floats(scale.format(mixer)) == state, mixer
    attention = ("attention",) + (() if "swa" in scale else ("sliding_window_attention",))
    for mixer in RECURRENT + attention:
        assert abs(block_parameters(mixer) / blocks - 1) < 0.02, mixer


def test_paper_models_have_262144_state_floats_a_layer():
    assert state_floats("gdn2_1.3B") == state_floats("swa_gdn2_1.3B") == 262_144


@pytest.mark.parametrize(
    ("name", "entries"), [("gdn2_1.3B", 18 * 22 + 3), ("swa_gdn2_1.3B", 9 * 22 + 9 * 7 + 3)]
)
def test_each_layer_has_the_leaves_of_the_official_state_dict(name, entries):
    params = shapes(name)["params"]
    # Scanned leaves stand for one entry a layer; the official attention fuses q, k and v.
    stacked = sum(leaf.shape[0] for leaf in jax.tree.leaves(params["layers"]))
    fused = 2 * 9 if "swa" in name else 0
    assert stacked - fused + len(jax.tree.leaves(params)) - len(
        jax.tree.leaves(params["layers"])
    ) == (entries)


def test_tiny_preset_is_small_and_hybrid():
    assert PRESETS["tiny"].hybrid and count(shapes("tiny")["params"]) < 2_000_000


def test_a_matched_preset_differs_in_mixer_and_mlp_alone():
    assert matched_preset("tiny", "gdn2") == "swa_gdn2_tiny"
    assert matched_preset("kda_1.3B", "mamba3_mimo") == "mamba3_mimo_1.3B"
    names = ("mixer", "mlp_dim")
    for name, config in PRESETS.items():
        other = PRESETS[matched_preset(name, "kda")]
        assert {field: value for field, value in vars(config).items() if field not in names} == {
            field: value for field, value in vars(other).items() if field not in names
        }


def test_an_unknown_preset_or_mixer_is_named():
    with pytest.raises(ValueError, match="^name: expected a preset.*got 'huge'"):
        matched_preset("huge", "kda")
    with pytest.raises(ValueError, match="^mixer: expected one of gdn2, kda.*got 'mamba9'"):
        matched_preset("tiny", "mamba9")
