import dataclasses

import pytest

from gdn2_jax.models import PRESETS
from gdn2_jax.training.flops import peak_flops, training_flops_per_token


def test_paper_models_spend_six_flops_a_weight_and_little_more():
    recurrent = training_flops_per_token(PRESETS["gdn2_1.3B"], 4096)
    # Blocks and head, less what is no matrix product: norms, A_log, dt_bias, one bias.
    weights = 1_302_638_112 + 2304 * 32000 - 18 * (2 * 2304 + 16 + 2048 + 128 + 2048)
    assert recurrent == 6 * weights + 18 * 3 * 6 * 16 * 128 * 128


def test_attention_counts_the_keys_inside_the_window_only():
    config = PRESETS["swa_gdn2_1.3B"]
    per_key = 9 * 3 * 4 * 2304
    growth = training_flops_per_token(config, 4096) - training_flops_per_token(config, 2048)
    # The mean over queries: 1024.5 keys at length 2048; at 4096 the second half sees 2048 each.
    assert growth == pytest.approx(per_key * ((1024.5 + 2048) / 2 - 1024.5))


def test_full_attention_counts_every_earlier_key():
    config = PRESETS["attention_1.3B"]
    growth = training_flops_per_token(config, 4096) - training_flops_per_token(config, 2048)
    assert growth == pytest.approx(18 * 3 * 4 * 2304 * (4097 - 2049) / 2)


def test_a_recurrence_counts_its_reads_and_writes():
    def recurrence(config):
        mixer = dataclasses.replace(config.mixer, head_dim=256, num_heads=8)
        wide = dataclasses.replace(config, mixer=mixer)
        same = training_flops_per_token(wide, 1) - training_flops_per_token(config, 1)
        # Projections keep their size, but for the gates of 8 heads: the state doubles.
        return same + 18 * 6 * 2 * 2304 * 8

    assert recurrence(PRESETS["gdn_1.3B"]) == 18 * 3 * 6 * 262_144


def test_a_model_is_traced_once_however_often_steps_are_logged(monkeypatch):
    count = training_flops_per_token(PRESETS["gdn2_tiny"], 256)
    monkeypatch.delattr("jax.eval_shape")
    assert training_flops_per_token(PRESETS["gdn2_tiny"], 256) == count


def test_peak_is_that_of_the_most_specific_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None
