import dataclasses
import json
from pathlib import Path

import pytest

from gdn2_jax.models import (
    MIXERS,
    PRESETS,
    DeltaRule,
    ModelConfig,
    SoftmaxAttention,
    StateSpace,
    config_from_json,
    with_state_rounding,
)

SIZES = {"d_model": 64, "num_layers": 2, "mlp_dim": 96}
SIZES["attention"] = SoftmaxAttention(num_heads=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("d_model", -1),
        ("num_layers", 0),
        ("context_length", 0),
        ("mlp_dim", 0),
        ("mlp_dim", 1.5),
        ("d_model", "16"),
        ("num_layers", True),
        ("unroll", 1),
        ("norm_epsilon", "1e-5"),
        ("dtype", "int8"),
        ("param_dtype", "float8"),
        ("dtype", "float64"),
        ("param_dtype", "float64"),
        ("loss_blocks", 0),
        ("remat", "some"),
        ("implementation", "cuda"),
    ],
)
def test_an_impossible_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*got {value!r}"):
        ModelConfig(**SIZES | {field: value})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (DeltaRule, "kind", "mamba9"),
        (DeltaRule, "num_heads", 0),
        (DeltaRule, "num_value_heads", 17),
        (DeltaRule, "expand_v", 0.3),
        (DeltaRule, "decay_lower_bound", -6.0),
        (DeltaRule, "decay_lower_bound", 0.0),
        (DeltaRule, "erase_gate", "head"),
        (DeltaRule, "write_gate", "head"),
        (DeltaRule, "output_gate", "swish"),
        (StateSpace, "head_dim", 0),
        (StateSpace, "inner_dim", 100),
        (StateSpace, "state_dim", 6),
        (StateSpace, "mimo_rank", 0),
        (StateSpace, "mimo_rank", 4),  # mamba2 has none
        (SoftmaxAttention, "window_size", 0),
    ],
)
def test_an_impossible_field_of_a_mixer_is_named(kind, field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*got {value!r}"):
        kind(**{field: value})


def test_hybrid_needs_pairs_of_layers_and_heads_that_divide_the_width():
    with pytest.raises(ValueError, match="^num_layers: expected an even number"):
        ModelConfig(**SIZES | {"num_layers": 3}, hybrid=True)
    odd = {"attention": SoftmaxAttention(num_heads=3)}
    with pytest.raises(ValueError, match="^attention.num_heads: "):
        ModelConfig(**SIZES | odd, hybrid=True)
    assert ModelConfig(**SIZES | odd | {"num_layers": 3})


def test_replace_validates_again():
    with pytest.raises(ValueError, match="^vocab_size: "):
        dataclasses.replace(PRESETS["tiny"], vocab_size=-1)


def test_configs_are_hashable_and_every_mixer_name_is_accepted():
    assert hash(ModelConfig(**SIZES)) == hash(ModelConfig(**SIZES))
    assert {
        ModelConfig(**SIZES | {"d_model": 72}, mixer=mixer).mixer for mixer in MIXERS.values()
    } == {*MIXERS.values()}


@pytest.mark.parametrize(
    "name", ["swa_gdn2_tiny", "mamba3_mimo_tiny", "mamba3_tiny", "attention_tiny"]
)
def test_a_configuration_survives_json(name):
    fields = json.loads(json.dumps(dataclasses.asdict(PRESETS[name])))
    assert config_from_json(fields) == PRESETS[name]


def test_a_configuration_of_version_0_1_is_read():
    """Its fields of all mixers lay side by side; these are four of its presets."""
    written = json.loads(Path(__file__).with_name("configs_0_1.json").read_text())
    for name, fields in written.items():
        compiled = {x: fields[x] for x in ("remat", "unroll")}  # as then; presets learn
        assert config_from_json(fields) == dataclasses.replace(PRESETS[name], **compiled)


def test_only_delta_rules_keep_their_state_rounded():
    config = with_state_rounding(PRESETS["gdn2_tiny"], "nearest")
    assert config.mixer.state_rounding == "nearest"
    assert with_state_rounding(PRESETS["mamba2_tiny"], None) == PRESETS["mamba2_tiny"]
    with pytest.raises(
        ValueError, match="^state_rounding: expected None with mamba2, got 'nearest'$"
    ):
        with_state_rounding(PRESETS["mamba2_tiny"], "nearest")
