"""Checkpoints that flash-linear-attention's own models saved, where it is installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.interop.pytorch import load_pretrained, open_tensors, save_pretrained

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
models = pytest.importorskip("fla.models")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "mixer"), [("KDA", "kda"), ("GatedDeltaNet", "gdn")])
def test_a_sharded_checkpoint_comes_in_and_goes_back_bit_for_bit(tmp_path, name, mixer, dtype):
    sizes = {"hidden_size": 64, "num_heads": 2, "head_dim": 16, "num_hidden_layers": 3}
    theirs = getattr(models, f"{name}Config")(vocab_size=100, **sizes)
    kind = getattr(models, f"{name}ForCausalLM")
    model = kind(theirs).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")

    config, params = load_pretrained(tmp_path / "theirs")
    ours = config.mixer
    assert (ours.kind, config.num_layers, ours.head_dim) == (mixer, 3, 16)
    assert config.norm_epsilon == theirs.norm_eps and ours.expand_v == theirs.expand_v
    assert params["embed"]["embedding"].dtype == jnp.dtype(dtype)

    save_pretrained(tmp_path / "ours", config, params)
    before = model.state_dict()
    for tensor_name, tensor in open_tensors(tmp_path / "ours").items():
        expected = before[tensor_name].float().numpy()
        np.testing.assert_array_equal(tensor.read().astype(np.float32), expected)
    after = kind.from_pretrained(tmp_path / "ours").state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
