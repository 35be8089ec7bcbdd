import dataclasses

import pytest

from gdn2_jax.models import PRESETS, ModelConfig
from gdn2_jax.models.blocks import MIXERS

SIZES = {"d_model": 64, "num_layers": 2, "mlp_dim": 96, "attention_heads": 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("d_model", -1),
        ("num_layers", 0),
        ("mixer", "mamba9"),
        ("num_heads", 0),
        ("num_value_heads", 17),
        ("expand_v", 0.3),
        ("decay_lower_bound", -6.0),
        ("decay_lower_bound", 0.0),
        ("erase_gate", "head"),
        ("write_gate", "head"),
        ("output_gate", "swish"),
        ("ssm_head_dim", 0),
        ("mamba3_form", "miso"),
        ("mimo_rank", 0),
        ("context_length", 0),
        ("window_size", 0),
        ("mlp_dim", 0),
        ("dtype", "int8"),
        ("param_dtype", "float8"),
        ("dtype", "float64"),
        ("param_dtype", "float64"),
        ("loss_blocks", 0),
        ("remat", "some"),
        ("implementation", "triton"),
    ],
)
def test_an_impossible_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*got {value!r}"):
        ModelConfig(**SIZES | {field: value})


def test_hybrid_needs_pairs_of_layers_and_heads_that_divide_the_width():
    with pytest.raises(ValueError, match="^num_layers: expected an even number"):
        ModelConfig(**SIZES | {"num_layers": 3}, hybrid=True)
    with pytest.raises(ValueError, match="^attention_heads: "):
        ModelConfig(**SIZES | {"attention_heads": 3}, hybrid=True)
    assert ModelConfig(**SIZES | {"attention_heads": 3, "num_layers": 3})


def test_state_space_mixers_need_whole_heads_and_key_channels_in_pairs():
    with pytest.raises(ValueError, match="^ssm_inner_dim: expected a multiple of ssm_head_dim 64"):
        ModelConfig(**SIZES, mixer="mamba2", ssm_inner_dim=100)
    with pytest.raises(ValueError, match="^ssm_state_dim: expected a multiple of 4"):
        ModelConfig(**SIZES, mixer="mamba3", ssm_state_dim=6)
    assert ModelConfig(**SIZES, mixer="kda", ssm_inner_dim=100, ssm_state_dim=6)


def test_replace_validates_again():
    with pytest.raises(ValueError, match="^vocab_size: "):
        dataclasses.replace(PRESETS["tiny"], vocab_size=-1)


def test_configs_are_hashable_and_every_mixer_name_is_accepted():
    assert hash(ModelConfig(**SIZES)) == hash(ModelConfig(**SIZES))
    assert {ModelConfig(**SIZES, mixer=name).mixer for name in MIXERS} == set(MIXERS)
